"""Batches for training: a pure function of (seed, number of the example).

`TrainInput.example(i)` makes example `i` from nothing but the config, so its only state is the
number of the next one: a resumed run, or one on another number of processes, sees the same
stream. Two keys look at a data shard's whole part of a batch, `max_distinct_queries` and
`batch_negatives`: with those the number of data shards matters too. tf.data runs that function in
parallel; where TensorFlow is not installed a thread pool does, with the same result.
"""

import dataclasses
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from absl import logging

from data_pipelines import (
    batching,
    query_sets,
    sampling,
    tokenizer,
    transforms,
)
from data_pipelines.batch_spec import Arrays
from data_pipelines.features import Names, Record
from data_pipelines.image_ops import UNREADABLE_SHARE, UnreadableImage, is_tolerable
from data_pipelines.open_source import open_source
from owl_det.config import Config
from owl_det.errors import DataError
from owl_det.optional import is_installed

if TYPE_CHECKING:
    from data_pipelines.teacher_cache import CacheRequest

MAX_STAND_INS = 16  # tries to replace one unreadable image
MAX_NAMES = 1203  # of a source whose names a model keeps: as many as LVIS has
_LISTED_KINDS = ("shapes_world", "coco", "voc", "yolo", "tfds")  # their categories are a list


class TrainInput:
    """The training examples of one config."""

    def __init__(self, config: Config, cached: "CacheRequest | None" = None):
        """Opens all sources, and of `config.distill.cache` what `cached` asks for.

        Raises `DataError` if one is missing, malformed or empty.
        """
        data = config.data
        self.config = config
        self.sources = [open_source(entry, data.path) for entry in data.train.values()]
        self.mixture = sampling.Mixture(
            [len(s) for s in self.sources], [s.weight for s in data.train.values()], config.seed
        )
        # The text tower sees lower case: "Dog" of one source and "dog" of another are one name.
        known = [c for s in self.sources for c in s.categories]
        self.pool = query_sets.Pool.of(
            [dataclasses.replace(category, name=category.name.lower()) for category in known]
        )
        self.tokenizer = tokenizer.build(config.model.text, data.tokenizer)
        augment = data.augment
        self.grid_probabilities = np.array(augment.mosaic_probabilities)
        self.grid_probabilities = self.grid_probabilities / self.grid_probabilities.sum()
        self.max_tiles = max(augment.mosaic_sizes) ** 2
        self.packing = batching.Packing(
            max_instances=data.max_instances,
            max_queries=data.max_queries,
            min_queries=data.min_queries,
            max_tiles=self.max_tiles,
            num_positions=config.model.text.num_positions,
            prompt_mode=data.train_prompts,
            shuffle_labels=data.shuffle_labels,
            with_captions=data.with_captions,
            with_names=data.batch_negatives,
        )
        self.has_regions = bool(config.distill.active())
        self.cache = None
        if cached is not None:
            from data_pipelines.teacher_cache import TeacherCache

            by_name = dict(zip(data.train, self.sources, strict=True))
            self.cache = TeacherCache(config, by_name, cached)
        self.unreadable: dict[tuple[int, int], str] = {}  # (source, index) -> reason
        self._lock = threading.Lock()

    @property
    def version(self) -> str:
        """Of the mixture: resuming on other data is refused by comparing this."""
        return "+".join(s.version for s in self.sources)

    @property
    def names(self) -> Names:
        """What a model learns to find, each text once: the names of the sources that have a list.

        Left out are sources of free texts (captions, pseudo boxes) and very long lists.
        """
        entries = self.config.data.train.values()
        listed = (
            category.name
            for entry, opened in zip(entries, self.sources, strict=True)
            if entry.kind in _LISTED_KINDS and len(opened.categories) <= MAX_NAMES
            for category in opened.categories
        )
        names: dict[str, str] = {}
        for name in listed:
            names.setdefault(name.lower(), name)  # "Dog" of one source, "dog" of another
        return tuple(names.values())

    def example(self, number: int) -> Arrays:
        """Example `number` of the endless stream, packed.

        An unreadable image is replaced by a stand-in that depends only on its place in the stream.
        """
        augment = self.config.data.augment
        stand_ins: dict[int, int] = {}
        while True:
            rng = sampling.example_rng(self.config.seed, number)
            grid = int(rng.choice(augment.mosaic_sizes, p=self.grid_probabilities))
            places = [self._locate(number, tile, stand_ins) for tile in range(grid * grid)]
            records = [self._read(place) for place in places]
            example = transforms.train_example(
                records,
                grid=grid,
                augment=augment,
                image_size=self.config.model.image_size,
                preprocess=self.config.preprocess,
                rng=rng,
            )
            bad = np.flatnonzero(example.tile_image_id < 0)
            if not len(bad):
                break
            for tile in bad:
                self._report_unreadable(places[tile])
                stand_ins[int(tile)] = stand_ins.get(int(tile), 0) + 1
        example.counts["unreadable_images"] = sum(stand_ins.values())
        arrays = batching.pack_example(example, self.pool, self.tokenizer, self.packing, rng)
        if self.has_regions:
            from data_pipelines import teacher_regions

            # A generator of its own: examples are the same with and without distillation.
            rng = sampling.regions_rng(self.config.seed, number)
            drawn = teacher_regions.draw(example, self.config.distill.regions, rng)
            arrays |= drawn.arrays()
            if self.cache is not None:
                arrays |= self.cache.arrays(places, example, drawn, arrays)
        return arrays

    def batches(
        self, first_step: int, *, num_data_shards: int, process: int = 0, num_processes: int = 1
    ) -> Generator[Arrays, None, None]:
        """This process's part of the batches from `first_step` on, without end.

        `num_data_shards` is their number over all processes. Part p holds the examples
        p·b/P … (p + 1)·b/P − 1 of each batch of b.
        """
        if self.config.batch_size % num_data_shards or num_data_shards % num_processes:
            raise DataError(
                f"config.batch_size: {self.config.batch_size} does not divide over "
                f"{num_data_shards} "
                f"data shards of {num_processes} processes"
            )
        local = self.config.batch_size // num_processes

        def make(position: int) -> Arrays:
            step, i = divmod(position, local)
            return self.example(step * self.config.batch_size + process * local + i)

        run = _tf_data_batches if is_installed("tensorflow") else _thread_pool_batches
        engine = "tf.data" if run is _tf_data_batches else "threads (TensorFlow is not installed)"
        logging.info("Input: %s, read by %s", ", ".join(s.name for s in self.sources), engine)
        workers = self.config.data.num_workers or os.cpu_count() or 1
        shards = num_data_shards // num_processes
        batches = run(make, first_step * local, local, workers)
        for step, batch in enumerate(batches, start=first_step):
            rngs = None
            if self.config.data.batch_negatives:
                first = step * self.config.batch_size + process * local
                rngs = [sampling.negatives_rng(self.config.seed, first + i) for i in range(local)]
            limit = self.config.data.max_distinct_queries
            yield batching.finish_batch(batch, shards, limit, rngs)

    def _locate(self, number: int, tile: int, stand_ins: dict[int, int]) -> tuple[int, int]:
        """The first readable image for a tile; skips those known to be unreadable."""
        slot = number * self.max_tiles + tile
        for attempt in range(stand_ins.get(tile, 0), MAX_STAND_INS):
            place = self.mixture.locate(slot, attempt)
            if place not in self.unreadable:
                stand_ins[tile] = attempt
                return place
        raise DataError(f"no readable image found for example {number} after {MAX_STAND_INS} tries")

    def _read(self, place: tuple[int, int]) -> Record | None:
        try:
            return self.sources[place[0]][place[1]].lowered()
        except UnreadableImage as error:
            logging.warning("Skipped an image: %s", error)
            return None

    def _report_unreadable(self, place: tuple[int, int]) -> None:
        """Remembers the image. Raises `DataError` when too many of a source are unreadable."""
        number, index = place
        current = self.sources[number]
        with self._lock:
            self.unreadable[place] = f"{current.name}[{index}]"
            count = sum(place[0] == number for place in self.unreadable)
        if not is_tolerable(count, len(current)):
            raise DataError(
                f"{current.name}: {count} of {len(current)} images cannot be read, more than "
                f"{UNREADABLE_SHARE:.0%}; the log above names them. Mend or remove them"
            )


def _thread_pool_batches(
    make: Callable[[int], Arrays], first: int, batch_size: int, workers: int
) -> Iterator[Arrays]:
    """Batches of `make(first)`, `make(first + 1)` …; threads run up to two batches ahead."""
    pending: deque[Future[Arrays]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for position in itertools.count(first):
            pending.append(pool.submit(make, position))
            if len(pending) == 3 * batch_size:
                yield batching.stack([pending.popleft().result() for _ in range(batch_size)])


def _tf_data_batches(
    make: Callable[[int], Arrays], first: int, batch_size: int, workers: int
) -> Iterator[Arrays]:
    """The same batches, made by tf.data's parallel map."""
    import tensorflow as tf

    errors: list[Exception] = []

    def make_values(position: np.ndarray) -> list[np.ndarray]:
        try:
            return list(make(int(position)).values())
        except Exception as error:  # TensorFlow would keep only its text
            errors.append(error)
            raise

    template = make(first)
    dtypes = [value.dtype for value in template.values()]

    def load(position: Any) -> Any:
        values = tf.numpy_function(make_values, [position], dtypes, stateful=False)
        for value, example in zip(values, template.values(), strict=True):
            value.set_shape(example.shape)
        return dict(zip(template, values, strict=True))

    options = tf.data.Options()
    options.threading.private_threadpool_size = workers
    dataset = (
        tf.data.Dataset.range(first, np.iinfo(np.int64).max)
        .map(load, num_parallel_calls=workers, deterministic=True)
        .batch(batch_size, drop_remainder=True)
        .prefetch(2)
        .with_options(options)
    )
    try:
        yield from cast(Iterator[Arrays], dataset.as_numpy_iterator())
    except tf.errors.OpError:
        if errors:
            raise errors[0] from None
        raise
