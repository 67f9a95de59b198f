"""The training step without data: shapes of its state and batch, and the step lowered from them.

Nothing is allocated, so that a step over many devices can be looked at before it runs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from owl_det import sharding
from owl_det.config import Config
from owl_det.errors import ConfigError
from owl_det.training import train_step
from owl_det.types import Batch, TrainState


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


def batch_shapes(config: Config, num_shards: int = 1) -> Batch:
    """Shapes and dtypes of a training batch, as `data_pipelines.input` makes it.

    Raises `ConfigError` where the batch does not divide into `num_shards` data shards.
    """
    data, b = config.data, config.batch_size
    if b % num_shards:
        raise ConfigError(
            f"config.batch_size: {b} is no multiple of the {num_shards} data shards (config.mesh)"
        )
    m, q, t = data.max_instances, data.max_queries, max(data.augment.mosaic_sizes) ** 2
    side, length = config.model.image_size, config.model.text.num_positions

    def of(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    shapes: dict[str, Any] = {
        "image": of(b, side, side, 3, dtype=jnp.uint8),
        "is_example": of(b, dtype=bool),
        "image_id": of(b, dtype=jnp.int32),
        "original_size": of(b, 2, dtype=jnp.int32),
        "boxes": of(b, m, 4, dtype=jnp.float32),
        "is_instance": of(b, m, dtype=bool),
        "is_crowd": of(b, m, dtype=bool),
        "instance_labels": of(b, m, q, dtype=bool),
        "instance_scores": of(b, m, dtype=jnp.float32),
        "query_table": of(num_table_rows(config, num_shards), length, dtype=jnp.int32),
        "query_index": of(b, q, dtype=jnp.int32),
        "is_query": of(b, q, dtype=bool),
        "tile_boxes": of(b, t, 4, dtype=jnp.float32),
        "tile_of_instance": of(b, m, dtype=jnp.int32),
        "tile_image_id": of(b, t, dtype=jnp.int32),
    }
    if data.with_captions:
        shapes["caption_tokens"] = of(b, t, length, dtype=jnp.int32)
        shapes["is_caption"] = of(b, t, dtype=bool)
    return Batch(**shapes)


def num_table_rows(config: Config, num_shards: int = 1) -> int:
    """Rows of a batch's query table: distinct texts, or as many as could be needed."""
    data = config.data
    return num_shards * data.max_distinct_queries or config.batch_size * data.max_queries


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
