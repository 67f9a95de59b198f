"""Images of a source in batches on the mesh, at full quality and in order, for evaluation."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int32, UInt8

from data_pipelines import image_ops, transforms
from data_pipelines.features import Example
from data_pipelines.image_ops import UnreadableImage, is_tolerable
from data_pipelines.readers.folder import FolderReader
from data_pipelines.source import Source
from owl_det import console, sharding
from owl_det.config import PreprocessConfig
from owl_det.errors import DataError, SourceError


class Loaded(NamedTuple):
    """One batch; the last may be filled up with black images beyond `indices`."""

    indices: range  # of the source, of all processes
    images: UInt8[Array, "b H W 3"]  # split over the mesh's data shards
    is_readable: Bool[np.ndarray, " b"]
    sizes: Int32[Array, "b 2"]  # height, width in pixels, split like `images`; 1 of fillers


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
        missing = source.missing(self.num_images) if isinstance(source, FolderReader) else []
        if not is_tolerable(len(missing), self.num_images):
            raise SourceError(
                f"{source.name}: {len(missing)} of {self.num_images} images are not there, such as "
                f"{missing[0]}",
                keys="add them, or correct the key `images` of the source",
                flags="add them, or correct --images",
            )

    def batches(self, label: str) -> Iterator[Loaded]:
        """Raises `DataError` after the last if more than 1 % of the images cannot be read."""
        count, number = jax.process_count(), jax.process_index()
        local = self.batch_size // count
        placement = sharding.batch_sharding(self.mesh)
        self.num_unreadable = 0
        progress = console.progress(
            total=self.num_images, label=label, unit="image", leave=False, is_shown=number == 0
        )
        # Decoding and resizing release the interpreter lock.
        with ThreadPoolExecutor() as pool, progress:
            for start in range(0, self.num_images, self.batch_size):
                self.before_batch()
                indices = range(start, min(start + self.batch_size, self.num_images))
                mine = range(start + number * local, start + (number + 1) * local)
                wanted = [i for i in mine if i < self.num_images]
                pixels = np.zeros((local, self.image_size, self.image_size, 3), np.uint8)
                is_readable = np.zeros(local, bool)
                sizes = np.ones((local, 2), np.int32)
                for row, example in enumerate(pool.map(self._example, wanted)):
                    if example is not None:
                        pixels[row], is_readable[row] = example.image, True
                        sizes[row] = example.original_size
                images, of_images = (
                    jax.make_array_from_process_local_data(placement, x) for x in (pixels, sizes)
                )
                everywhere = multihost_utils.process_allgather(is_readable, tiled=True)
                loaded = Loaded(indices, images, np.asarray(everywhere), of_images)
                self.num_unreadable += int((~loaded.is_readable[: len(indices)]).sum())
                yield loaded
                progress.update(len(indices))
        if early := image_ops.take_early_ends():
            logging.warning("%d images end early: read as far as they go", early)
        if not is_tolerable(self.num_unreadable, self.num_images):
            raise DataError(
                f"{self.source.name}: {self.num_unreadable} of {self.num_images} images cannot be "
                "read, more than 1 %; mend or remove those that the log names"
            )

    def _example(self, index: int) -> Example | None:
        try:
            return transforms.eval_example(
                self.source[index], image_size=self.image_size, preprocess=self.preprocess
            )
        except UnreadableImage as error:
            logging.warning("Skipped image %d of %s: %s", index, self.source.name, error)
            return None
