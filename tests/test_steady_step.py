"""After its first call a step neither compiles anything nor fetches anything from the host."""

from typing import Any

import jax
import numpy as np
import pytest

from owl_det import sharding, train_step
from owl_det.config import MeshConfig
from tests import tiny

NUM_STEPS = 100


def test_hundred_steps_compile_and_transfer_nothing() -> None:
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    config = tiny.config(
        num_steps=NUM_STEPS + 1,
        model__image__num_layers=1,
        model__text__num_layers=1,
        optimizer__clip={"scope": "shared_text"},
        schedule={"kind": "cosine", "warmup_steps": 5},
    )
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2])
    host_batch = tiny.batch(config, sharding.num_data_shards(mesh))
    batch = jax.device_put(host_batch, sharding.batch_sharding(mesh))
    shapes = jax.eval_shape(lambda: train_step.init_state(config))
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
            kept.append(jax.block_until_ready(metrics))  # CPU devices share the threads they need
        # The guard sees what comes from the host: a batch that was not put on the devices.
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            step(state, jax.tree.map(np.asarray, host_batch))
    assert len(compilations) == 1
    losses = [float(metrics["loss"]) for metrics in kept]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
