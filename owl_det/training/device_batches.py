"""The batches of a training, placed on its devices."""

import itertools
from collections.abc import Generator, Iterator

import jax
from jax.sharding import Mesh

from data_pipelines.batch_spec import COUNTS
from data_pipelines.input import TrainInput
from owl_det import sharding
from owl_det.config import Config
from owl_det.types import Batch, batch_of


def device_batches(
    data: TrainInput, first_step: int, config: Config, mesh: Mesh
) -> Generator[tuple[Batch, dict[str, int]], None, None]:
    """Global batches on the mesh, and what was left out of this process's part."""
    placement = sharding.batch_sharding(mesh)
    host_batches = data.batches(
        first_step,
        num_data_shards=sharding.num_data_shards(mesh),
        process=jax.process_index(),
        num_processes=jax.process_count(),
    )
    try:
        for arrays in host_batches:
            totals = arrays["counts"].sum(0).tolist()
            batch = jax.tree.map(
                lambda x: jax.make_array_from_process_local_data(placement, x), batch_of(arrays)
            )
            yield batch, dict(zip(COUNTS, totals, strict=True))
    finally:
        host_batches.close()


def with_first(
    batches: Generator[tuple[Batch, dict[str, int]], None, None],
) -> Iterator[tuple[Batch, dict[str, int]]]:
    """The same batches, the first of which is made now."""
    first = next(batches)
    return itertools.chain([first], batches)
