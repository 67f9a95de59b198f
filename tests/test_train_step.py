"""The step: its loss and slope, clipping against plain loops, one device against eight."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from owl_det import path_rules, sharding
from owl_det.config import MeshConfig
from owl_det.training import objectives, train_step
from owl_det.types import Batch, TrainState
from tests import tiny

NOISE = {
    "model__image__dropout_rate": 0.1,
    "model__text__dropout_rate": 0.1,
    "model__image__droplayer_rate": 0.3,
    "model__text__droplayer_rate": 0.3,
    "selection__token_drop_rate": 0.5,
    "selection__instance_top_k": 6,
}
KEY = jax.random.key(7)


def _compiled(config: Any) -> Any:
    return jax.jit(
        lambda p, b: train_step.loss_and_gradients(p, b, KEY, config=config, num_data_shards=1)
    )


def _gradients(config: Any, params: Any, batch: Batch) -> tuple[Any, Any]:
    return _compiled(config)(params, batch)


def _assert_close(ours: Any, theirs: Any, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=path_rules.path_name(path))


def _one(batch: Batch, i: int) -> Batch:
    """A batch of one example (with the whole query table)."""
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(Batch)}
    return Batch(
        **{k: v if k == "query_table" else v[i : i + 1] for k, v in fields.items() if v is not None}
    )


@pytest.fixture(scope="module")
def params() -> Any:
    return tiny.params(tiny.config(), seed=3)


SMALL = {
    "batch_size": 4,
    "model__image__num_layers": 1,
    "model__text__num_layers": 1,
    "model__image__dropout_rate": 0.1,
    "optimizer__clip": {"scope": "none"},
    "loss": {"class_weight": 2.0, "l1_weight": 3.0, "giou_weight": 4.0, "objectness_weight": 0.5},
}


class _Small:
    """The compiled step of one small detector, its start and one batch."""

    def __init__(self) -> None:
        self.config = tiny.config(**SMALL)
        start = train_step.init_state(self.config, tiny.params(self.config, seed=3))
        self.batch = tiny.batch(self.config)
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        self._step = train_step.jit_train_step(self.config, mesh, start)
        # As arrays of NumPy: to compute with them compiles nothing, and no step reuses them.
        self.start: TrainState = jax.device_get(start)

    def step(self, state: TrainState, batch: Batch | None = None) -> tuple[TrainState, Any]:
        return jax.device_get(self._step(state, batch or self.batch))

    def loss(self, params: Any) -> float:
        return float(self.step(dataclasses.replace(self.start, params=params))[1]["loss"])


@pytest.fixture(scope="module")
def small() -> _Small:
    return _Small()


def test_steps_on_one_batch_lower_its_loss_and_move_every_parameter(small: _Small) -> None:
    state, losses = small.start, []
    for _ in range(8):
        state, metrics = small.step(state)
        losses.append(float(metrics["loss"]))
    assert int(state.step) == 8
    assert np.mean(losses[-3:]) < 0.9 * losses[0], losses
    before = jax.tree_util.tree_leaves_with_path(small.start.params)
    for (path, old), new in zip(before, jax.tree.leaves(state.params), strict=True):
        assert np.isfinite(new).all() and np.abs(new - old).max() > 0, path_rules.path_name(path)


def test_a_step_goes_down_the_slope_of_its_loss(small: _Small) -> None:
    """The loss on both sides of the start, along the gradient that the step has taken."""
    state, metrics = small.step(small.start)
    rate = float(metrics["learning_rate"])
    assert rate == pytest.approx(small.config.optimizer.learning_rate)
    taken = jax.tree.map(lambda old, new: (old - new) / rate, small.start.params, state.params)
    norm = float(np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(taken))))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-3)
    along = np.float32(2e-3 / norm)
    ahead, behind = (
        small.loss(jax.tree.map(lambda p, g, s=sign: p + s * along * g, small.start.params, taken))
        for sign in (1, -1)
    )
    np.testing.assert_allclose((ahead - behind) / (2 * along), norm**2, rtol=0.05)


def test_the_loss_is_the_weighted_sum_of_its_parts(small: _Small) -> None:
    _, metrics = small.step(small.start)
    weights = {"class": 2.0, "l1": 3.0, "giou": 4.0, "objectness": 0.5}
    total = sum(weight * float(metrics[name]) for name, weight in weights.items())
    assert min(float(metrics[name]) for name in weights) > 0
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)


def test_fillers_of_a_last_batch_do_not_count(small: _Small) -> None:
    half = dataclasses.replace(small.batch, is_example=np.array([True, True, False, False]))
    image = np.array(half.image)
    image[2:] = 0
    other = dataclasses.replace(half, image=image)
    (ours, metrics), (theirs, again) = (small.step(small.start, b) for b in (half, other))
    assert float(metrics["loss"]) != float(small.step(small.start)[1]["loss"])
    np.testing.assert_allclose(metrics["loss"], again["loss"], rtol=1e-6)
    _assert_close(ours.params, theirs.params)


def test_a_state_that_was_kept_goes_on_to_the_same_bits(small: _Small) -> None:
    """Noise is drawn from the number of the step, so that nothing else has to be kept."""
    first, _ = small.step(small.start)
    on, metrics = small.step(first)
    again, same = small.step(jax.tree.map(np.copy, first))
    jax.tree.map(np.testing.assert_array_equal, on, again)
    assert float(metrics["loss"]) == float(same["loss"])
    later = dataclasses.replace(small.start, step=np.asarray(1, np.int32))
    assert float(small.step(later)[1]["loss"]) != small.loss(small.start.params)


@pytest.mark.slow
def test_exact_clipping_equals_a_loop_over_examples(params: Any) -> None:
    config = tiny.config(batch_size=4, optimizer__clip={"scope": "exact", "norm": 0.5})
    unclipped = tiny.config(batch_size=4, optimizer__clip={"scope": "none"})
    batch = tiny.batch(config)
    ours, metrics = _gradients(config, params, batch)
    total = jax.tree.map(jnp.zeros_like, params)
    num_clipped = 0
    take_one = _compiled(unclipped)
    for i in range(4):
        gradient, _ = take_one(params, _one(batch, i))
        norm = float(
            np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(gradient)))
        )
        num_clipped += norm > 0.5
        factor = min(1.0, 0.5 / norm) / 4
        total = jax.tree.map(lambda t, g, f=factor: t + f * g, total, gradient)
    assert num_clipped == round(4 * float(metrics["clipped_share"])) > 0
    _assert_close(ours, total)


@pytest.mark.slow
def test_shared_text_clipping_equals_its_definition(params: Any) -> None:
    config = tiny.config(batch_size=4, optimizer__clip={"scope": "shared_text", "norm": 0.5})
    batch = tiny.batch(config)
    ours, _ = _gradients(config, params, batch)
    examples, text_key = objectives.split_batch(batch, KEY)
    context = objectives.context_of(config, batch, text_key)

    def table_of(text: Any) -> jax.Array:
        return objectives.embed_query_table({"text": text}, batch.query_table, context)

    table, back = jax.vjp(table_of, params["text"])
    image_side = {k: v for k, v in params.items() if k != "text"}
    total, table_total = jax.tree.map(jnp.zeros_like, image_side), np.zeros(table.shape)
    for i in range(4):
        example = jax.tree.map(lambda x, i=i: x[i : i + 1], examples)

        def loss(p: Any, queries: jax.Array, example: Any = example) -> jax.Array:
            return objectives.example_losses(p, example, queries, context)[0][0]

        queries = table[batch.query_index[i]][None]
        g_params, g_queries = jax.grad(loss, argnums=(0, 1))(image_side, queries)
        factor = min(1.0, 0.5 / float(optax.tree.norm((g_params, g_queries)))) / 4
        total = jax.tree.map(lambda t, g, f=factor: t + f * g, total, g_params)
        np.add.at(table_total, np.asarray(batch.query_index[i]), factor * np.asarray(g_queries[0]))
    text = back(jnp.asarray(table_total, jnp.float32))[0]
    _assert_close(ours, {**total, "text": text})


@pytest.mark.nightly
def test_frozen_parameters_do_not_count_in_the_norm(params: Any) -> None:
    clip = {"scope": "global", "norm": 1e-3}
    frozen = tiny.config(
        batch_size=4, optimizer__clip=clip, optimizer__frozen=("^text/token_embedding$", "^box_")
    )
    free = tiny.config(batch_size=4, optimizer__clip={"scope": "none"})
    batch = tiny.batch(frozen)
    ours, metrics = _gradients(frozen, params, batch)
    theirs, _ = _gradients(free, params, batch)
    theirs["text"]["token_embedding"] *= 0
    theirs["box_head"] = jax.tree.map(jnp.zeros_like, theirs["box_head"])
    squares = sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(theirs))
    np.testing.assert_allclose(metrics["gradient_norm"], np.sqrt(squares), rtol=1e-4)
    _assert_close(ours, jax.tree.map(lambda g: g * 1e-3 / np.sqrt(squares), theirs))


@pytest.mark.nightly
@pytest.mark.parametrize("scope", ["shared_text", "exact"])
def test_microbatches_change_nothing(params: Any, scope: str) -> None:
    taken = []
    for microbatch in (1, 4):
        config = tiny.config(
            batch_size=4, optimizer__clip={"scope": scope, "microbatch": microbatch}, **NOISE
        )
        taken.append(_gradients(config, params, tiny.batch(config))[0])
    _assert_close(*taken)


@pytest.mark.nightly
def test_global_clipping_equals_optax(params: Any) -> None:
    clipped = tiny.config(optimizer__clip={"scope": "global", "norm": 0.1})
    plain = tiny.config(optimizer__clip={"scope": "none"})
    batch = tiny.batch(plain)
    ours, _ = _gradients(clipped, params, batch)
    gradients, _ = _gradients(plain, params, batch)
    wanted, _ = optax.clip_by_global_norm(0.1).update(gradients, optax.EmptyState())
    _assert_close(ours, wanted)


@pytest.mark.nightly
@pytest.mark.parametrize("scope", ["global", "shared_text"])
def test_filler_examples_change_nothing(params: Any, scope: str) -> None:
    config = tiny.config(batch_size=4, optimizer__clip={"scope": scope})
    batch = tiny.batch(config)
    half = dataclasses.replace(batch, is_example=jnp.array([True, True, False, False]))
    other = dataclasses.replace(half, image=half.image.at[2:].set(0))
    ours, metrics = _gradients(config, params, half)
    theirs, again = _gradients(config, params, other)
    _assert_close(ours, theirs)
    np.testing.assert_allclose(metrics["loss"], again["loss"], rtol=1e-6)


@pytest.mark.nightly
def test_selecting_everything_changes_nothing(params: Any) -> None:
    plain = tiny.config(optimizer__clip={"scope": "none"})
    batch = tiny.batch(plain)
    wanted, metrics = _gradients(plain, params, batch)
    for changes in ({"selection__token_drop_rate": 0.0}, {"selection__instance_top_k": 16}):
        config = tiny.config(optimizer__clip={"scope": "none"}, **changes)
        ours, again = _gradients(config, params, batch)
        np.testing.assert_allclose(again["loss"], metrics["loss"], rtol=1e-6)
        _assert_close(ours, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["shared_text", "exact", "global"])
def test_eight_devices_equal_one(params: Any, scope: str) -> None:
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    config = tiny.config(optimizer__clip={"scope": scope, "norm": 0.5}, **NOISE)
    wanted, metrics = _gradients(config, params, tiny.batch(config, 1))
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    batch = jax.device_put(tiny.batch(config, 4), sharding.batch_sharding(mesh))
    placed = jax.device_put(params, sharding.parameter_shardings(params, mesh))
    ours, again = jax.jit(
        lambda p, b: train_step.loss_and_gradients(
            p, b, KEY, config=config, num_data_shards=4, mesh=mesh
        )
    )(placed, batch)
    np.testing.assert_allclose(again["loss"], metrics["loss"], rtol=1e-4, atol=1e-6)
    _assert_close(ours, wanted)
    # One step of gradient descent from there.
    one = train_step.train_step(
        train_step.init_state(config, params),
        tiny.batch(config, 1),
        config=config,
        num_data_shards=1,
    )[0]
    state = train_step.init_state(config, params)
    placement = sharding.state_shardings(state, params, mesh)
    step = train_step.jit_train_step(config, mesh, state)
    eight = step(jax.device_put(jax.tree.map(jnp.copy, state), placement), batch)[0]
    _assert_close(eight.params, one.params)
    kernel = eight.params["image"]["transformer"]["blocks"]["mlp_in"]["kernel"]
    assert kernel.sharding == NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))


@pytest.mark.nightly
def test_contrastive_gradients_of_eight_devices_equal_those_of_one() -> None:
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    source = {"kind": "shapes_world", "split": "image_text", "image_size": 32, "num_images": 64}
    config = tiny.config(
        task="contrastive",
        model__contrastive="softmax",
        model__image__num_layers=1,
        model__text__num_layers=1,
        model__text__num_positions=16,
        data__train={"shapes": source},
        data__with_captions=True,
        optimizer__clip={"scope": "global", "norm": 0.5},
    )
    params = tiny.params(config, seed=3)
    wanted, metrics = _gradients(config, params, tiny.batch(config, 1))
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    batch = jax.device_put(tiny.batch(config, 4), sharding.batch_sharding(mesh))
    placed = jax.device_put(params, sharding.parameter_shardings(params, mesh))
    ours, again = jax.jit(
        lambda p, b: train_step.loss_and_gradients(
            p, b, KEY, config=config, num_data_shards=4, mesh=mesh
        )
    )(placed, batch)
    np.testing.assert_allclose(again["loss"], metrics["loss"], rtol=1e-4, atol=1e-6)
    _assert_close(ours, wanted)


@pytest.mark.nightly
def test_objectness_reaches_only_its_head(params: Any) -> None:
    config = tiny.config(
        optimizer__clip={"scope": "none"},
        loss={"class_weight": 0.0, "l1_weight": 0.0, "giou_weight": 0.0},
    )
    gradients, _ = _gradients(config, params, tiny.batch(config))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        reached = float(jnp.abs(leaf).max())
        assert (reached > 0) == path_rules.path_name(path).startswith("objectness_head"), path
