"""Per-example clipping: what must not matter (cutting, fillers, copies) and what is refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from owl_det.errors import ConfigError
from owl_det.training import objectives, train_step
from owl_det.types import Batch
from tests import tiny

KEY = jax.random.key(11)
PER_EXAMPLE = ("shared_text", "exact")


def _config(scope: str, microbatch: int = 4, norm: float = 0.5) -> Any:
    clip = {"scope": scope, "microbatch": microbatch, "norm": norm}
    return tiny.config(batch_size=4, optimizer__clip=clip)


@pytest.fixture(scope="module")
def params() -> Any:
    return tiny.params(tiny.config(), seed=3)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return tiny.batch(_config("exact"))


_compiled: dict[Any, Any] = {}


def _take(config: Any, params: Any, batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
    key = (config.optimizer.clip, batch.image.shape)
    if key not in _compiled:
        _compiled[key] = jax.jit(
            lambda p, b: train_step.loss_and_gradients(p, b, KEY, config=config, num_data_shards=1)
        )
    return _compiled[key](params, batch)


def _assert_close(ours: Any, theirs: Any) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def _rows(batch: Batch, rows: list[int]) -> Batch:
    index = jnp.array(rows)
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(Batch)}
    return Batch(
        **{k: v if k == "query_table" else v[index] for k, v in fields.items() if v is not None}
    )


@pytest.mark.slow
@pytest.mark.parametrize("scope", PER_EXAMPLE)
def test_cutting_into_microbatches_changes_nothing(params: Any, batch: Batch, scope: str) -> None:
    whole, metrics = _take(_config(scope, 4), params, batch)
    halves, again = _take(_config(scope, 2), params, batch)
    _assert_close(halves, whole)
    for name, value in metrics.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    "scope",
    [
        pytest.param("shared_text", marks=pytest.mark.slow),
        pytest.param("exact", marks=pytest.mark.nightly),
    ],
)
def test_fillers_and_copies(params: Any, batch: Batch, scope: str) -> None:
    """Fillers count nowhere; an example that stands twice weighs twice, and is clipped as alone."""
    config = _config(scope)
    filled = dataclasses.replace(
        _rows(batch, [0, 1, 2, 3]), is_example=jnp.array([True, True, False, False])
    )
    other = dataclasses.replace(
        _rows(batch, [0, 1, 1, 0]), is_example=jnp.array([True, True, False, False])
    )
    copies = _rows(batch, [0, 1, 0, 1])
    wanted, metrics = _take(config, params, filled)
    for variant in (other, copies):
        gradients, again = _take(config, params, variant)
        _assert_close(gradients, wanted)
        for name, value in metrics.items():
            np.testing.assert_allclose(again[name], value, rtol=1e-4, err_msg=name)


@pytest.mark.nightly
def test_a_large_limit_is_the_plain_mean(params: Any, batch: Batch) -> None:
    loose, metrics = _take(_config("shared_text", norm=1e6), params, batch)
    plain, wanted = _take(_config("none"), params, batch)
    _assert_close(loose, plain)
    assert metrics["clipped_share"] == 0
    np.testing.assert_allclose(metrics["loss"], wanted["loss"], rtol=1e-5)


@pytest.mark.slow
def test_a_gradient_that_is_no_number_is_not_hidden(params: Any, batch: Batch) -> None:
    broken = {**params, "merge_norm": jax.tree.map(lambda p: p * jnp.nan, params["merge_norm"])}
    gradients, metrics = _take(_config("shared_text"), broken, batch)
    assert np.isnan(metrics["loss"]) and np.isnan(metrics["gradient_norm"])
    assert np.isnan(np.asarray(gradients["box_head"]["dense_0"]["kernel"])).any()


@pytest.mark.parametrize("scope", PER_EXAMPLE)
def test_a_microbatch_that_does_not_divide_is_refused(
    params: Any, batch: Batch, scope: str
) -> None:
    with pytest.raises(ConfigError, match="clip.microbatch: 3 does not divide the 4 examples"):
        jax.eval_shape(lambda: _take(_config(scope, 3), params, batch))


@pytest.mark.nightly
def test_noise_of_a_text_depends_on_the_text_alone() -> None:
    """Not on its row in the table, which differs with the number of data shards."""
    config = tiny.config(model__text__dropout_rate=0.3, model__text__droplayer_rate=0.5)
    params, batch = tiny.params(config), tiny.batch(config)
    rows = jnp.array([[49406, i, 49407, 0, 0, 0, 0, 0] for i in (5, 6, 7, 5)])

    @jax.jit
    def encode(tokens: Any, key: Any) -> Any:
        context = objectives.context_of(config, batch, key)
        return objectives.embed_query_table(params, tokens, context)

    first, moved = encode(rows, KEY), encode(rows[::-1], KEY)
    np.testing.assert_allclose(first, moved[::-1], atol=1e-6)
    np.testing.assert_allclose(first[0], first[3], atol=1e-6)
    other = encode(rows, jax.random.key(12))
    assert not np.allclose(first, other, atol=1e-3)
