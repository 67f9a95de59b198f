"""Label files state the sizes of images; this holds them against the images themselves."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from data_pipelines import image_ops
from data_pipelines.image_ops import UnreadableImage
from data_pipelines.label_counts import LabelCounts
from data_pipelines.readers.labelled_image import OTHER_FRAME, LabelledImage, Proper, Size
from data_pipelines.readers.tally import Tally
from owl_det import files

_SAMPLE = 32  # images looked at when a data set is opened
_MOST = 2000  # if one of those is not of its stated size, or none is stated
_SHOWN = 3  # images that are named in full


class TrueSizes:
    """Clips boxes to images as they are, and says which are not as the label file states.

    A few images are looked at when the data set is opened, every other when it is read.
    """

    def __init__(self, name: str, images: Sequence[LabelledImage], tally: Tally) -> None:
        """`tally` has counted `images` with the sizes that the label file states."""
        self._name, self._images, self._tally = name, images, tally
        self._lock = threading.Lock()
        self._fitted: set[int] = set()  # images counted anew
        self._said: dict[int, str] = {}  # images whose labels do not fit → what to say of them
        self._is_open = False
        self.image_changes: Counter[str] = Counter()  # name → change of the images with a box of it

    def look(self, find: Callable[[LabelledImage], Path | None]) -> None:
        """Measures some images now, so that what is wrong is said before anything else happens.

        Images that are missing or damaged are passed over: they are reported when they are read.
        """
        stating = [i for i, image in enumerate(self._images) if image.unclipped is not None]
        unstated = [i for i in stating if self._stated(i) is None]
        looked = self._measure([*_spread(stating, _SAMPLE), *unstated[:_MOST]], find)
        if self._said:
            looked |= self._measure(_spread(stating, _MOST), find)
        self._is_open = True
        if unstated:
            logging.warning(
                "%s: %d of %d images have no size in the label file; they are measured",
                self._name,
                len(unstated),
                len(stating),
            )
        if self._said:
            dropped = self._tally.dropped[OTHER_FRAME]
            logging.warning(
                "%s: %d of %d images%s are not of the size in the label file: %s; boxes are "
                "clipped to the images as they are%s",
                self._name,
                len(self._said),
                len(looked),
                "" if len(looked) == len(stating) else " looked at",
                "; ".join(list(self._said.values())[:_SHOWN]),
                f", and {dropped} that belong to another frame are dropped" if dropped else "",
            )

    def fitted(self, index: int, content: bytes, file: Path) -> LabelledImage:
        """The labels of the image whose file holds `content`. Raises `UnreadableImage`."""
        image = self._images[index]
        if image.unclipped is None:
            return image
        try:
            opened = image_ops.open_image(content)
        except UnreadableImage as error:
            raise UnreadableImage(f"{file}: {error}") from error
        size = image_ops.upright_size(opened)
        if size == image.unclipped.size:
            return image
        stored = (opened.height, opened.width)
        fitted, proper = image.fitted(size, stored)
        with self._lock:
            if index not in self._fitted:
                self._fitted.add(index)
                self._tally.replace(image.fitted(self._stated(index)), (fitted, proper))
                self.image_changes.update(set(fitted.names))
                self.image_changes.subtract(set(image.names))
                if self._stated(index) is not None or proper.dropped[OTHER_FRAME]:
                    self._say(index, _described(file, image, size, stored, proper))
        return fitted

    def counts(self) -> LabelCounts:
        with self._lock:
            return self._tally.counts()

    def _say(self, index: int, said: str) -> None:
        self._said[index] = said
        number = len(self._said)
        if not self._is_open:
            return  # `look` says it of all together
        if number <= _SHOWN:
            logging.warning("%s: %s; boxes are clipped to the image as it is", self._name, said)
        elif str(number).strip("0") == "1":  # 10, 100, …
            logging.warning(
                "%s: %d images so far are not of the size in the label file, at last %s",
                self._name,
                number,
                said,
            )

    def _measure(
        self, indices: Iterable[int], find: Callable[[LabelledImage], Path | None]
    ) -> set[int]:
        """Which of the images could be measured."""
        done: set[int] = set()
        for index in dict.fromkeys(indices):
            file = find(self._images[index])
            try:
                content = files.read_bytes(file) if file else b""
                if file:
                    self.fitted(index, content, file)
                    done.add(index)
            except (OSError, UnreadableImage):
                continue  # said where it is read, and counted there
        return done

    def _stated(self, index: int) -> Size | None:
        unclipped = self._images[index].unclipped
        return unclipped.size if unclipped else None


def _spread(indices: Sequence[int], count: int) -> list[int]:
    """Up to `count` of the indices, evenly spaced."""
    places = np.linspace(0, len(indices) - 1, min(count, len(indices))).round().astype(int)
    return [indices[place] for place in places]


def _described(file: Path, image: LabelledImage, size: Size, stored: Size, proper: Proper) -> str:
    assert image.unclipped is not None
    stated = image.unclipped.size
    said = f"{file}: {_text(size)} pixels"
    if stored != size:
        said += f" (its EXIF orientation turns it from {_text(stored)})"
    said += f", the labels say {_text(stated)}" if stated else ", the labels do not say"
    if proper.dropped[OTHER_FRAME]:
        frame = "the image before it is turned" if stored != size else "an image of another size"
        return f"{said}, and its boxes are those of {frame}: they are dropped"
    lost = sum(proper.dropped.values())
    return f"{said}, {lost} of its {len(proper.is_kept)} boxes are dropped" if lost else said


def _text(size: Size) -> str:
    return f"{size[1]} x {size[0]}"
