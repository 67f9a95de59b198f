"""Random access to image-text pairs, for contrastive training and retrieval.

Where every pair lies is found out once, when the source is opened, and kept in memory (40 bytes a
pair of a .tar file); nothing is written beside the data.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Int64

from data_pipelines.features import Category, Record
from data_pipelines.image_ops import UnreadableImage
from data_pipelines.label_counts import LabelCounts
from data_pipelines.readers.image_text_shards import LocatedShards, Place, Sample, Unreadable
from owl_det.errors import DataError

_MAX_LOGGED = 5  # unreadable samples of a data set that are named when it is opened


class ImageTextReader:
    """Images with captions, without boxes and names. Implements `source.Source`.

    What cannot be read is a record too, which raises when it is asked for: so it is counted, and
    too much of it stops a training, as everywhere.
    """

    categories: tuple[Category, ...] = ()
    counts: LabelCounts | None = None  # there are no boxes

    def __init__(self, shards: LocatedShards):
        """Goes through all shards. Raises `DataError` if there is no pair, or a file vanishes."""
        self.name, self.version = shards.name, shards.version
        self._shards = shards
        self._reasons: dict[int, str] = {}  # of what is known to be unreadable, by index
        with ThreadPoolExecutor() as pool:
            parts = list(pool.map(partial(_locate, shards), range(len(shards))))
        self._starts = np.cumsum([0, *(len(part.numbers) for part in parts)])
        self._numbers = [part.numbers for part in parts]
        for start, part in zip(self._starts, parts, strict=False):
            self._reasons |= {int(start) + i: text for i, text in part.reasons.items()}
        self._report(sum(part.num_without_text for part in parts))

    def _report(self, num_without_text: int) -> None:
        """Logs what was found and what is missing. Raises `DataError` if there is no pair."""
        for text in list(self._reasons.values())[:_MAX_LOGGED]:
            logging.warning("%s: %s", self.name, text)
        num_lost = len(self._reasons)
        num_pairs = len(self) - num_lost
        logging.info("%s: %d image-text pairs, %d unreadable", self.name, num_pairs, num_lost)
        if num_lost > _MAX_LOGGED:
            logging.warning("%s: %d of %d are unreadable", self.name, num_lost, len(self))
        if num_pairs == 0:
            reason = f": {self._reasons[0]}" if self._reasons else ""
            raise DataError(f"{self.name}: holds no image-text pair that can be read{reason}")
        if num_without_text:
            logging.warning(
                "%s: %d of %d images have no caption", self.name, num_without_text, num_pairs
            )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Record:
        """The pair at `index`; its id is the index. Raises `UnreadableImage` if it is none."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        sample = self._sample(index)
        if isinstance(sample, Unreadable):
            raise UnreadableImage(f"{self.name}, {sample.key}: {sample.reason}")
        return Record(
            image=sample.image,
            image_id=index,
            boxes_xyxy=np.zeros((0, 4), np.float32),
            names=(),
            is_crowd=np.zeros(0, bool),
            scores=np.zeros(0, np.float32),
            captions=sample.texts,
            source=f"{self.name}, {sample.key}",
        )

    def _sample(self, index: int) -> Sample | Unreadable:
        key = f"pair {index}"
        if index in self._reasons:
            return Unreadable(key=key, reason=self._reasons[index])
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        numbers = self._numbers[shard][index - self._starts[shard]]
        return self._shards.fetch(shard, Place(key=key, numbers=tuple(numbers.tolist())))


class _Located(NamedTuple):
    """The samples of one shard."""

    numbers: Int64[np.ndarray, "n k"]  # zeros of what is unreadable
    reasons: dict[int, str]  # of what is unreadable, by its index in the shard
    num_without_text: int


def _locate(shards: LocatedShards, shard: int) -> _Located:
    rows: list[tuple[int, ...] | None] = []
    reasons: dict[int, str] = {}
    num_without_text = 0
    for index, place in enumerate(_places(shards, shard)):
        if isinstance(place, Unreadable):
            reasons[index] = f"{place.key}: {place.reason}"
        else:
            num_without_text += not place.has_text
        rows.append(None if isinstance(place, Unreadable) else place.numbers)
    width = max((len(row) for row in rows if row), default=0)
    filled = [row or (0,) * width for row in rows]
    numbers = np.array(filled, np.int64).reshape(len(rows), width)
    return _Located(numbers, reasons, num_without_text)


def _places(shards: LocatedShards, shard: int) -> Iterator[Place | Unreadable]:
    try:
        yield from shards.locate(shard)
    except OSError as error:
        raise DataError(f"{shards.name}: shard {shard}: {error}; make its file readable") from error
