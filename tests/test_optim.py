"""Schedules at points worked out by hand, learning-rate groups, Adafactor, sharding rules."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from owl_det import path_rules, sharding
from owl_det.config import MeshConfig, OptimizerConfig, ScheduleConfig
from owl_det.errors import ConfigError
from owl_det.modeling import build
from owl_det.training import optim, train_step
from tests import tiny


@pytest.mark.parametrize(
    ("config", "step", "factor"),
    [
        (ScheduleConfig(kind="cosine", warmup_steps=10), 0, 0.1),
        (ScheduleConfig(kind="cosine", warmup_steps=10), 4, 0.5),
        (ScheduleConfig(kind="cosine", warmup_steps=10), 55, 0.5),
        (ScheduleConfig(kind="cosine", warmup_steps=10), 100, 0.0),
        (ScheduleConfig(kind="inverse_sqrt", warmup_steps=0, timescale=4), 3, 1.0),
        (ScheduleConfig(kind="inverse_sqrt", warmup_steps=0, timescale=4), 64, 0.25),
        (ScheduleConfig(kind="constant", warmup_steps=0, cooldown_steps=20), 79, 1.0),
        (ScheduleConfig(kind="constant", warmup_steps=0, cooldown_steps=20), 95, 0.25),
    ],
)
def test_schedule(config: ScheduleConfig, step: int, factor: float) -> None:
    np.testing.assert_allclose(optim.schedule(config, 100)(step), factor, atol=1e-6)


def test_groups_move_at_their_own_rates() -> None:
    config = tiny.config(
        optimizer={
            "kind": "sgd",
            "learning_rate": 0.5,
            "text_learning_rate": 0.25,
            "frozen": ["box_head/"],
        }
    )
    optimizer = optim.build(config.optimizer, config.schedule, config.num_steps)

    @jax.jit
    def take() -> Any:
        state = train_step.init_state(config)
        ones = jax.tree.map(jnp.ones_like, state.params)
        return optimizer.update(ones, state.opt_state, state.params)[0]

    updates = take()
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        name = path_rules.path_name(path)
        rate = 0.0 if name.startswith("box_head") else 0.25 if name.startswith("text/") else 0.5
        np.testing.assert_allclose(leaf, -rate, err_msg=name)


def test_weight_decay_spares_gains_and_biases() -> None:
    """Without a gradient a parameter moves by learning rate times decay times itself, or not."""
    config = tiny.config(
        model__contrastive="sigmoid",
        optimizer={"kind": "sgd", "weight_decay": 0.5, "frozen": ["box_head/"]},
    )
    rates = config.optimizer.learning_rate, config.optimizer.text_learning_rate
    shapes = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    zeros = jax.tree.map(np.zeros_like, ones)
    optimizer = optim.build(config.optimizer, config.schedule, config.num_steps)
    updates, _ = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(zeros, ones)
    spared = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        name = path_rules.path_name(path)
        if not np.any(leaf):
            spared.add(name.split("/")[-1].split("_")[-1] if "box_head" not in name else "frozen")
            continue
        np.testing.assert_allclose(leaf, -0.5 * rates[name.startswith("text/")], err_msg=name)
    assert spared == {"bias", "scale", "frozen"}


def test_a_pattern_that_fits_nothing_is_an_error() -> None:
    params = tiny.params(tiny.config())
    with pytest.raises(ConfigError, match="bocks"):
        optim.groups(params, OptimizerConfig(frozen=("bocks/",)))


def test_a_pattern_may_lie_within_another() -> None:
    params = tiny.params(tiny.config())
    both = OptimizerConfig(frozen=("^text/", "^text/token_embedding$"))
    found = optim.groups(params, both)
    assert set(jax.tree.leaves(found["text"])) == {"frozen"}


def test_adafactor_factors_within_layers() -> None:
    config = tiny.config(
        optimizer={"kind": "adafactor"},
        model__image={
            "patch_size": 8,
            "width": 64,
            "num_layers": 40,
            "num_heads": 2,
            "mlp_width": 64,
            "droplayer_rate": 0.0,
        },
    )
    state = jax.eval_shape(lambda: train_step.init_state(config))
    shapes = {
        path_rules.path_name(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    }
    rows = {k: v for k, v in shapes.items() if "v_row" in k and "image" in k and "mlp_in" in k}
    assert any(shape == (40, 64) for shape in rows.values()), rows
    # 40 x 64 norms are large enough to factor, were the layer axis an axis like others.
    norms = {k: v for k, v in shapes.items() if "norm_1" in k and "image" in k}
    full = [v for k, v in norms.items() if k.split("/v/")[0] != k]
    assert full and all(shape == (40, 64) for shape in full), norms


def test_adafactor_first_step_by_hand() -> None:
    transform = optim.adafactor_direction(0.9, 0.999)
    params = {"x": jnp.zeros((2, 3))}
    gradient = np.array([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0]], np.float32)
    update, _ = transform.update({"x": jnp.asarray(gradient)}, transform.init(params), params)
    # The first decay is 0: the second moment is g² (not factored, it is small); the ratio is the
    # sign, its root mean square is below one, and the momentum takes a tenth of it.
    np.testing.assert_allclose(update["x"], 0.1 * np.sign(gradient), atol=1e-3)


def test_sharding_errors() -> None:
    params = tiny.params(tiny.config())
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=4))
    with pytest.raises(ConfigError, match=r"mesh.tensor: 4 does not divide .*blocks/out/kernel"):
        sharding.parameter_shardings(params, mesh)
    with pytest.raises(ConfigError, match="does not make"):
        sharding.make_mesh(MeshConfig(data=3, fsdp=1, tensor=1))
