"""The training step without data: shapes of its state and batch, and the step lowered from them.

Nothing is allocated, so that a step over many devices can be looked at before it runs.
"""

from typing import Any

import jax
from jax.sharding import Mesh

from data_pipelines import batch_spec
from owl_det import sharding
from owl_det.config import Config
from owl_det.errors import ConfigError
from owl_det.training import train_step
from owl_det.types import Batch, TrainState, batch_of


def state_shapes(config: Config) -> TrainState:
    """Shapes and dtypes of the state before the first step.

    Raises `ConfigError` with distillation branches, whose teachers are files.
    """
    if config.distill.active():
        raise ConfigError(
            "config.distill: what a step with branches holds depends on its teachers' checkpoints, "
            "which a look at shapes does not open; set the weights to 0 and task to detection"
        )
    return jax.eval_shape(lambda: train_step.init_state(config))


def batch_shapes(config: Config, num_data_shards: int = 1) -> Batch:
    """Shapes and dtypes of a training batch, as `data_pipelines.input` makes it.

    Raises `ConfigError` where the batch does not divide into `num_data_shards`.
    """
    if config.batch_size % num_data_shards:
        raise ConfigError(
            f"config.batch_size: {config.batch_size} is no multiple of the {num_data_shards} data "
            "shards (config.mesh)"
        )
    sizes = batch_spec.axis_sizes(config, num_data_shards)
    fields = batch_spec.present(config).items()
    return batch_of({n: jax.ShapeDtypeStruct(f.shape(sizes), f.dtype) for n, f in fields})


def lower(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """The step as it trains over `mesh`, ready to be compiled.

    Raises `ConfigError` for a config that does not fit the mesh.
    """
    state = state_shapes(config)
    batch = batch_shapes(config, sharding.num_data_shards(mesh))
    placement = sharding.state_shardings(state, state.params, mesh)
    placed_state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placement
    )
    split = sharding.batch_sharding(mesh)
    placed_batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), batch
    )
    step: Any = train_step.jit_train_step(config, mesh, state)
    return step.lower(placed_state, placed_batch)


def memory_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
    """What one device holds during a compiled step, by the compiler's plan.

    `arguments` are state and batch, `temporaries` all that lives only within the step; `total`
    counts the new state once, as it takes the old one's place.
    """
    plan: Any = compiled.memory_analysis()
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return {
        "arguments": plan.argument_size_in_bytes,
        "temporaries": plan.temp_size_in_bytes,
        "total": held + plan.temp_size_in_bytes,
    }
