"""What readers of image folders share: labels in memory, image files read when asked for."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Bool, Float, Float32

from data_pipelines import label_ops
from data_pipelines.features import Category, Names, Record
from data_pipelines.image_ops import UnreadableImage
from owl_det.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")


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
        degenerate_boxes: int,
    ):
        """`version` is `kind` and a hash of everything else but the folders and the name.

        Logs how many degenerate boxes were dropped, if any. Raises `DataError` if the folder is
        missing, there are no images, or the first hundred of them are all missing.
        """
        require_folder(folder, "images")
        if not images:
            raise DataError(f"{folder}: the data set {name} has no images")
        if not any(_find(folder, image) for image in images[:100]):
            raise DataError(
                f"{folder}: holds none of the first {min(100, len(images))} images of {name}, "
                f"such as {images[0].files[0]}; correct the key `images` of the source"
            )
        self.name = name
        self.categories = tuple(categories)
        self.version = f"{kind}-{_digest(images, categories)}"
        self.degenerate_boxes = degenerate_boxes
        self._folder = folder
        self._images = images
        self._all_names = tuple(category.name for category in categories)
        if degenerate_boxes:
            logging.warning("%s: dropped %d degenerate boxes", name, degenerate_boxes)

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


def keep_proper(
    boxes_xyxy: Sequence[Sequence[float]] | Float[np.ndarray, "m 4"],
    names: Sequence[str],
    is_crowd: Sequence[bool] | Bool[np.ndarray, " m"],
    height: float,
    width: float,
) -> tuple[Float32[np.ndarray, "m 4"], Names, Bool[np.ndarray, " m"], Names]:
    """Clips boxes to the image and drops degenerate ones; the last entry is the names of those.

    A dropped name is in the image but not boxed, so it belongs to `not_exhaustive`.
    """
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
    keep = label_ops.drop_degenerate(boxes, height, width)
    clipped = label_ops.clip_boxes(boxes[keep], height, width)
    kept_names = tuple(name for name, kept in zip(names, keep, strict=True) if kept)
    dropped = tuple(name for name, kept in zip(names, keep, strict=True) if not kept)
    return clipped, kept_names, np.asarray(is_crowd, bool)[keep], dropped


def image_counts(images: Iterable[LabelledImage], names: Iterable[str]) -> dict[str, int]:
    """In how many images each name occurs."""
    counts = dict.fromkeys(names, 0)
    for image in images:
        for name in set(image.names):
            counts[name] += 1
    return counts


def require_folder(folder: Path, key: str) -> None:
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; correct the key `{key}` or `path` of the source "
            "(or data.path, where the source has no path of its own)"
        )


def read_file(file: Path, key: str) -> bytes:
    """The bytes of a label file; raises `DataError` naming the config key that led there."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(
            f"{file}: {error.strerror}; correct the key `{key}` or `path` of the source "
            "(or data.path, where the source has no path of its own)"
        ) from error


def read_text(file: Path, key: str) -> str:
    try:
        return read_file(file, key).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 text ({error}); convert it to UTF-8") from error


def require_distinct(names: Iterable[str], where: str) -> None:
    """Names are the keys under which everything is asked and evaluated."""
    seen: set[str] = set()
    for name in names:
        if not name:
            raise DataError(f"{where}: a category has an empty name; give it one")
        if name in seen:
            raise DataError(f"{where}: two categories are called {name!r}; rename or merge them")
        seen.add(name)


def _find(folder: Path, image: LabelledImage) -> Path | None:
    paths = (folder / file for file in image.files)
    return next((path for path in paths if os.path.isfile(path)), None)


def _digest(images: Iterable[LabelledImage], categories: Iterable[Category]) -> str:
    digest = hashlib.sha256(repr([(c.id, c.name, c.groups) for c in categories]).encode())
    for image in sorted(images, key=lambda image: image.files):
        labels = (image.files, image.image_id, image.names, image.negatives, image.not_exhaustive)
        digest.update(repr(labels).encode())
        digest.update(image.boxes_xyxy.tobytes())
        digest.update(image.is_crowd.tobytes())
        if image.captions:
            digest.update(repr(image.captions).encode())
    return digest.hexdigest()[:12]
