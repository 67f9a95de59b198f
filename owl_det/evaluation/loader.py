"""Images of a source in batches on the mesh, at full quality and in order, for evaluation."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int32, UInt8

from data_pipelines import image_ops, transforms
from data_pipelines.features import Example, Record
from data_pipelines.image_ops import UnreadableImage, is_tolerable
from data_pipelines.source import Source
from owl_det import console, sharding
from owl_det.config import PreprocessConfig
from owl_det.errors import DataError
from owl_det.evaluation import data_check


class SourceBatch(NamedTuple):
    """One batch; the last may be filled up with black images beyond `indices`."""

    indices: range  # of the source, of all processes
    images: UInt8[Array, "b H W 3"]  # split over the mesh's data shards
    is_readable: Bool[np.ndarray, " b"]
    sizes: Int32[Array, "b 2"]  # height, width in pixels, split like `images`; 1 of fillers
    own_records: Mapping[int, Record]  # by index: the readable images that this process decoded


class Loader:
    """Every image once, as many times as it is iterated, with a progress bar.

    `batch_size` is rounded up to a multiple of the mesh's data shards.
    """

    def __init__(
        self,
        source: Source,
        mesh: Mesh,
        *,
        image_size: int,
        preprocess: PreprocessConfig,
        batch_size: int,
        max_images: int = 0,
    ) -> None:
        """`max_images` 0 takes all.

        Raises `DataError` if of a folder's images more than 1 % are not there: now, not later.
        """
        self.source, self.mesh = source, mesh
        self.image_size, self.preprocess = image_size, preprocess
        shards = sharding.num_data_shards(mesh)
        self.batch_size = -(-batch_size // shards) * shards
        self.num_images = min(len(source), max_images or len(source))
        self.num_unreadable = 0  # in the last pass
        self.before_batch: Callable[[], None] = lambda: None  # what it raises ends the pass
        data_check.require_files(source, max_images)

    def batches(self, label: str) -> Iterator[SourceBatch]:
        """Raises `DataError` after the last if more than 1 % of the images cannot be read."""
        self.num_unreadable = 0
        progress = console.progress(
            total=self.num_images,
            label=label,
            unit="image",
            leave=False,
            is_shown=jax.process_index() == 0,
        )
        # Decoding and resizing release the interpreter lock.
        with ThreadPoolExecutor() as pool, progress:
            for start in range(0, self.num_images, self.batch_size):
                self.before_batch()
                batch = self._batch(start, pool)
                num_images = len(batch.indices)
                self.num_unreadable += int((~batch.is_readable[:num_images]).sum())
                yield batch
                progress.update(num_images)
        if early := image_ops.take_early_ends():
            logging.warning("%d images end early: read as far as they go", early)
        if not is_tolerable(self.num_unreadable, self.num_images):
            raise DataError(
                f"{self.source.name}: {self.num_unreadable} of {self.num_images} images cannot be "
                "read, more than 1 %; mend or remove those that the log names"
            )

    def records(self, batch: SourceBatch) -> list[Record | None]:
        """The labels of a batch's images, in order; None where the image cannot be read.

        Images that other processes decoded are read here; one that is gone since counts as
        unreadable.
        """
        return [
            self._record(batch, index) if batch.is_readable[row] else None
            for row, index in enumerate(batch.indices)
        ]

    def _batch(self, start: int, pool: ThreadPoolExecutor) -> SourceBatch:
        local, side = self.batch_size // jax.process_count(), self.image_size
        first = start + jax.process_index() * local
        indices = range(start, min(start + self.batch_size, self.num_images))
        pixels = np.zeros((local, side, side, 3), np.uint8)
        is_readable = np.zeros(local, bool)
        sizes = np.ones((local, 2), np.int32)
        records: dict[int, Record] = {}
        own = range(first, min(first + local, self.num_images))
        for row, loaded in enumerate(pool.map(self._read, own)):
            if loaded is not None:
                record, example = loaded
                records[first + row], is_readable[row] = record, True
                pixels[row], sizes[row] = example.image, example.original_size
        placement = sharding.batch_sharding(self.mesh)
        images, sizes_on_mesh = (
            jax.make_array_from_process_local_data(placement, x) for x in (pixels, sizes)
        )
        everywhere = np.asarray(multihost_utils.process_allgather(is_readable, tiled=True))
        return SourceBatch(indices, images, everywhere, sizes_on_mesh, records)

    def _read(self, index: int) -> tuple[Record, Example] | None:
        try:
            record = self.source[index]
            example = transforms.eval_example(
                record, image_size=self.image_size, preprocess=self.preprocess
            )
        except UnreadableImage as error:
            logging.warning("Skipped image %d of %s: %s", index, self.source.name, error)
            return None
        return record, example

    def _record(self, batch: SourceBatch, index: int) -> Record | None:
        if index in batch.own_records:
            return batch.own_records[index]
        try:
            return self.source[index]
        except UnreadableImage as error:
            logging.warning("Skipped image %d of %s: %s", index, self.source.name, error)
            self.num_unreadable += 1
            return None
