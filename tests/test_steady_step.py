"""After its first call a step neither compiles anything nor fetches anything from the host."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from owl_det import sharding
from owl_det.config import MeshConfig
from owl_det.training import step_shapes, train_step
from owl_det.types import Batch
from tests import tiny

NUM_STEPS = 100


def _host_batch(config: Any) -> Batch:
    """Black images without instances, but with queries: something to learn."""
    shapes = step_shapes.batch_shapes(config)
    empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    real = {name: np.ones_like(getattr(empty, name)) for name in ("is_example", "is_query")}
    return dataclasses.replace(empty, **real)


@pytest.mark.slow
def test_hundred_steps_compile_and_transfer_nothing() -> None:
    config = tiny.config(
        batch_size=2,
        num_steps=NUM_STEPS + 1,
        model__image__num_layers=1,
        model__text__num_layers=1,
        model__text__vocabulary_size=64,
        schedule={"kind": "cosine", "warmup_steps": 5},
    )
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    host_batch = _host_batch(config)
    batch = jax.device_put(host_batch, sharding.batch_sharding(mesh))
    shapes = step_shapes.state_shapes(config)
    placement = sharding.state_shardings(shapes, shapes.params, mesh)
    state = jax.jit(lambda: train_step.init_state(config), out_shardings=placement)()
    step = train_step.jit_train_step(config, mesh, shapes)

    compilations: list[str] = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    state, metrics = step(state, batch)
    assert len(compilations) == 1  # the listener hears them
    kept = [metrics]
    with jax.transfer_guard("disallow"):
        for _ in range(NUM_STEPS):
            state, metrics = step(state, batch)
            kept.append(metrics)
        jax.block_until_ready(state)
        assert len(compilations) == 1
        # The guard sees what comes from the host: a batch that was not put on the device.
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            step(state, host_batch)
    losses = [float(metrics["loss"]) for metrics in kept]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
