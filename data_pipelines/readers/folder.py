"""What readers of image folders share: labels in memory, image files read when asked for."""

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Bool, Float, Float32

from data_pipelines import label_ops, text_file
from data_pipelines.features import Category, Names, Record
from data_pipelines.image_files import IMAGE_SUFFIXES
from data_pipelines.image_ops import UnreadableImage
from data_pipelines.label_counts import LabelCounts, dropped_text
from owl_det.errors import DataError, SourceError

# Why boxes are dropped, and what looks wrong of boxes that are kept: "3 of 42 boxes …".
NOT_FINITE, NO_AREA, OUTSIDE = "not finite", "without area", "outside their images"
BEYOND, TINY = "reach beyond their images", "are below a pixel"
_BEYOND_SHARE, _BEYOND_PIXELS = 0.01, 2  # of the side, and on top of that
_ODD_SHARE = 0.01  # of all boxes; less is usual in large data sets

# The flag of a command that stands for a key of a source, where its name is another.
_FLAGS = {"labels": "--annotations", "path": "--annotations"}

# Of images that are looked for by their stem, versions hold these guesses alone, so that data sets
# keep their version when more suffixes are known.
_GUESSES_IN_VERSIONS = IMAGE_SUFFIXES[:8]


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """The labels of one image, and where its file may be."""

    files: tuple[str, ...]  # relative to the image folder; the first that exists is read
    image_id: int
    boxes_xyxy: Float32[np.ndarray, "m 4"]
    names: tuple[str, ...]
    is_crowd: Bool[np.ndarray, " m"]
    negatives: Names | None = None  # None = every other name: the annotation is exhaustive
    not_exhaustive: Names = ()
    areas: Float32[np.ndarray, " m"] | None = None  # of the masks, pixels; None = of the boxes
    captions: tuple[str, ...] = ()


class FolderReader:
    """Random access to the records of one image folder. Implements `source.Source`."""

    def __init__(
        self,
        kind: str,
        name: str,
        folder: Path,
        images: Sequence[LabelledImage],
        categories: Sequence[Category],
        dropped: Mapping[str, int],
        odd: Mapping[str, int] = MappingProxyType({}),
        *,
        examples: Mapping[str, str] = MappingProxyType({}),
    ):
        """`version` is `kind` and a hash of the images and categories, without the folders.

        `dropped` counts the boxes of the files that are not used by reason ("without area"), `odd`
        those that are used but look wrong ("reach beyond their images"); `examples` says for a
        reason where one of them is. Both are logged, and are part of `counts`. Raises `DataError`
        if the folder is missing, there are no images, or the first hundred of them are all missing.
        """
        require_folder(folder, "images")
        if not images:
            raise DataError(f"{folder}: the data set {name} has no images")
        if not any(_find(folder, image) for image in images[:100]):
            raise misplaced(
                f"{folder}: holds none of the first {min(100, len(images))} images of {name}, "
                f"such as {images[0].files[0]}",
                "images",
            )
        self.name = name
        self.categories = tuple(categories)
        self.version = f"{kind}-{_digest(images, categories)}"
        self._folder = folder
        self._images = images
        self._all_names = tuple(category.name for category in categories)
        self.counts = _count(images, self._all_names, dropped)
        _warn(name, self.counts, odd, examples)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        """Raises `UnreadableImage` if the image file is missing or cannot be read."""
        labels = self._images[index]
        file = _find(self._folder, labels)
        if file is None:
            raise UnreadableImage(f"{self._folder / labels.files[0]}: no such file")
        try:
            image = file.read_bytes()
        except OSError as error:
            raise UnreadableImage(f"{file}: {error.strerror}") from error
        return Record(
            image=image,
            image_id=labels.image_id,
            boxes_xyxy=self._boxes_xyxy(labels, image),
            names=tuple((name,) for name in labels.names),
            is_crowd=labels.is_crowd,
            scores=np.ones(len(labels.names), np.float32),
            negatives=self._negatives(labels),
            not_exhaustive=labels.not_exhaustive,
            areas=labels.areas,
            source=str(file),
            captions=labels.captions,
        )

    def missing(self, count: int) -> list[str]:
        """Files of the first `count` images that are not there."""
        absent = (i for i in self._images[:count] if _find(self._folder, i) is None)
        return [str(self._folder / image.files[0]) for image in absent]

    def _boxes_xyxy(self, labels: LabelledImage, image: bytes) -> Float32[np.ndarray, "m 4"]:
        """For formats whose boxes depend on the size of the image."""
        del image
        return labels.boxes_xyxy

    def _negatives(self, labels: LabelledImage) -> Names:
        if labels.negatives is not None:
            return labels.negatives
        present = {*labels.names, *labels.not_exhaustive}
        return tuple([name for name in self._all_names if name not in present])


class Proper(NamedTuple):
    """What `keep_proper` makes of the boxes of one image."""

    boxes_xyxy: Float32[np.ndarray, "k 4"]  # of those kept, clipped to the image
    names: Names
    is_crowd: Bool[np.ndarray, " k"]
    is_kept: Bool[np.ndarray, " m"]  # of all boxes given
    not_exhaustive: Names  # of the boxes dropped: they are in the image but not boxed
    dropped: Counter[str]  # reason → boxes
    odd: Counter[str]  # what looks wrong but is kept → boxes


def keep_proper(
    boxes_xyxy: Sequence[Sequence[float]] | Float[np.ndarray, "m 4"],
    names: Sequence[str],
    is_crowd: Sequence[bool] | Bool[np.ndarray, " m"],
    height: float,
    width: float,
) -> Proper:
    """Clips boxes to the image and drops those that are not finite or have no area in it.

    `height` and `width` are in the unit of the boxes: pixels, or 1 for boxes relative to the image.
    """
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
    keep = label_ops.drop_degenerate(boxes, height, width)
    return Proper(
        boxes_xyxy=label_ops.clip_boxes(boxes[keep], height, width),
        names=tuple(itertools.compress(names, keep)),
        is_crowd=np.asarray(is_crowd, bool)[keep],
        is_kept=keep,
        not_exhaustive=tuple(itertools.compress(names, ~keep)),
        dropped=_reasons(boxes[~keep]),
        odd=_oddities(boxes[keep], height, width),
    )


def _reasons(boxes_xyxy: Float[np.ndarray, "m 4"]) -> Counter[str]:
    """Why boxes are dropped."""
    is_finite = np.isfinite(boxes_xyxy).all(axis=1)
    has_area = (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(axis=1)
    counts = Counter(
        {
            NOT_FINITE: int((~is_finite).sum()),
            NO_AREA: int((is_finite & ~has_area).sum()),
            OUTSIDE: int((is_finite & has_area).sum()),
        }
    )
    return +counts


def _oddities(boxes_xyxy: Float[np.ndarray, "m 4"], height: float, width: float) -> Counter[str]:
    """What looks wrong of boxes that are kept. Relative boxes are no matter of pixels."""
    is_relative = (height, width) == (1, 1)
    sides = np.array([width, height], np.float64)
    # Files round: COCO's boxes reach up to a pixel beyond their images.
    slack = sides * _BEYOND_SHARE + (0 if is_relative else _BEYOND_PIXELS)
    low, high = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
    is_beyond = ((low < -slack) | (high > sides + slack)).any(axis=1)
    is_tiny = ((high - low) < 1).all(axis=1) & (not is_relative)
    return +Counter({BEYOND: int(is_beyond.sum()), TINY: int(is_tiny.sum())})


def image_counts(images: Iterable[LabelledImage], names: Iterable[str]) -> dict[str, int]:
    """In how many images each name occurs."""
    counts = dict.fromkeys(names, 0)
    for image in images:
        for name in set(image.names):
            counts[name] += 1
    return counts


def misplaced(problem: str, key: str) -> SourceError:
    """The error of a file or folder to which a key of the source, or a flag, points wrongly."""
    return SourceError(
        problem,
        keys=f"correct the key `{key}` or `path` of the source "
        "(or data.path, where the source has no path of its own)",
        flags=f"correct {_FLAGS.get(key, f'--{key}')}",
    )


def require_folder(folder: Path, key: str) -> None:
    """Raises `SourceError` if there is no such folder."""
    if not folder.is_dir():
        raise misplaced(f"{folder}: no such folder", key)


def read_file(file: Path, key: str) -> bytes:
    """The bytes of a label file; raises `SourceError` naming the key that led there."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise misplaced(f"{file}: {error.strerror}", key) from error


def read_text(file: Path, key: str) -> str:
    """The text of a label file; raises as `read_file` and `text_file.decode`."""
    return text_file.decode(read_file(file, key), file)


def require_distinct(names: Iterable[str], where: str) -> None:
    """Names are the keys under which everything is asked and evaluated."""
    seen: set[str] = set()
    for name in names:
        if not name:
            raise DataError(f"{where}: a category has an empty name; give it one")
        if name in seen:
            raise DataError(f"{where}: two categories are called {name!r}; rename or merge them")
        seen.add(name)


def _count(
    images: Sequence[LabelledImage], names: Sequence[str], dropped: Mapping[str, int]
) -> LabelCounts:
    boxes = dict.fromkeys(names, 0)
    num_empty = num_crowd = num_negatives = 0
    for image in images:
        usable = list(itertools.compress(image.names, ~image.is_crowd))
        for name in usable:
            boxes[name] += 1
        num_empty += not usable
        num_crowd += len(image.names) - len(usable)
        if image.negatives is not None:
            num_negatives += len(image.negatives)
        else:
            num_negatives += len(names) - len({*image.names, *image.not_exhaustive})
    return LabelCounts(
        num_images=len(images),
        num_empty=num_empty,
        boxes=boxes,
        num_crowd=num_crowd,
        dropped=dict(dropped),
        num_negatives=num_negatives,
        is_federated=any(image.negatives is not None for image in images),
    )


def _warn(
    name: str, counts: LabelCounts, odd: Mapping[str, int], examples: Mapping[str, str]
) -> None:
    """One line for all boxes that are not used, or used though they look wrong."""
    total = counts.num_read
    parts = [dropped_text(counts.dropped, total)] if counts.num_dropped else []
    notable = {what: count for what, count in odd.items() if count > _ODD_SHARE * total}
    parts += [f"{count} of {total} boxes {what}" for what, count in notable.items()]
    if not parts:
        return
    shown = [examples[key] for key in (*counts.dropped, *notable) if key in examples]
    such = f" (such as {'; '.join(shown)})" if shown else ""
    logging.warning("%s: %s%s", name, "; ".join(parts), such)


def _find(folder: Path, image: LabelledImage) -> Path | None:
    paths = (folder / file for file in image.files)
    return next((path for path in paths if os.path.isfile(path)), None)


def _digest(images: Iterable[LabelledImage], categories: Iterable[Category]) -> str:
    digest = hashlib.sha256(repr([(c.id, c.name, c.groups) for c in categories]).encode())
    for image in sorted(images, key=lambda image: image.files):
        files = tuple(
            file
            for i, file in enumerate(image.files)
            if i == 0 or os.path.splitext(file)[1] in _GUESSES_IN_VERSIONS
        )
        labels = (files, image.image_id, image.names, image.negatives, image.not_exhaustive)
        digest.update(repr(labels).encode())
        digest.update(image.boxes_xyxy.tobytes())
        digest.update(image.is_crowd.tobytes())
        if image.captions:
            digest.update(repr(image.captions).encode())
    return digest.hexdigest()[:12]
