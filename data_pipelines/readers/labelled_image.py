"""The labels of one image, and how its boxes are held against the image's frame."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32

from data_pipelines import label_ops
from data_pipelines.features import Names

# Why boxes are dropped, and what looks wrong of boxes that are kept: "3 of 42 boxes …".
NOT_FINITE, NO_AREA, NEGATIVE = "not finite", "without area", "of negative width or height"
OUTSIDE, OTHER_FRAME = "outside their images", "of an image of another size or not yet upright"
BEYOND, TINY = "reach beyond their images", "are below a pixel"
TWICE = "stand twice in their files"
_BEYOND_SHARE, _BEYOND_PIXELS = 0.01, 2  # of the side, and on top of that
_LARGEST = 2.0**30  # coordinates beyond are as good as this one, and arithmetic stays finite

Size = tuple[int, int]  # height, width in pixels


class Unclipped(NamedTuple):
    """All boxes of an image as its label file has them, and the image's size as it states it."""

    size: Size | None  # None = it states none
    boxes_xyxy: Float32[np.ndarray, "n 4"]
    names: tuple[str, ...]
    is_crowd: Bool[np.ndarray, " n"]
    areas: Float32[np.ndarray, " n"] | None
    not_exhaustive: Names  # whatever the boxes are


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
    given_id: int | float | str | None = None  # in the label file, where that is not `image_id`
    # The boxes above are clipped to the size that the label file states. With this they are
    # clipped anew where the image is of another; None = they do not depend on it.
    unclipped: Unclipped | None = None

    def fitted(
        self, size: Size | None, stored_size: Size | None = None
    ) -> tuple["LabelledImage", "Proper"]:
        """The same with all boxes clipped to an image of `size`; None = not known.

        `stored_size` is that of the image before its EXIF orientation is applied. Boxes that only
        fit the stored image, or the size that the label file states, are dropped, all of the image:
        they are of another frame. `unclipped` must be there.
        """
        assert self.unclipped is not None
        stated, boxes, names, is_crowd, areas, not_exhaustive = self.unclipped
        if size is not None and _other_frame(boxes, size, (stated, stored_size)):
            proper = _none_proper(names)
        else:
            proper = keep_proper(boxes, names, is_crowd, *(size or (np.inf, np.inf)))
        image = dataclasses.replace(
            self,
            boxes_xyxy=proper.boxes_xyxy,
            names=proper.names,
            is_crowd=proper.is_crowd,
            areas=None if areas is None else areas[proper.is_kept],
            not_exhaustive=(*not_exhaustive, *proper.not_exhaustive),
        )
        return image, proper


class Proper(NamedTuple):
    """What `keep_proper` makes of the boxes of one image."""

    boxes_xyxy: Float32[np.ndarray, "k 4"]  # of those kept, clipped to the image
    names: Names
    is_crowd: Bool[np.ndarray, " k"]
    is_kept: Bool[np.ndarray, " m"]  # of all boxes given
    not_exhaustive: Names  # of the boxes dropped: they are in the image but not boxed
    dropped: Counter[str]  # reason → boxes
    odd: Counter[str]  # what looks wrong but is kept → boxes


def labelled(
    *,
    files: tuple[str, ...],
    image_id: int,
    boxes_xyxy: Sequence[Sequence[float]] | Float[np.ndarray, "m 4"],
    names: Sequence[str],
    is_crowd: Sequence[bool] | Bool[np.ndarray, " m"],
    size: Size | None,
    areas: Float[np.ndarray, " m"] | None = None,
    negatives: Names | None = None,
    not_exhaustive: Names = (),
    captions: tuple[str, ...] = (),
    given_id: int | float | str | None = None,
) -> tuple[LabelledImage, Proper]:
    """The labels of an image whose label file states its size (None = it does not), in pixels.

    Boxes are clipped to that size for now, and to the image's own once it is read.
    """
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
    image = LabelledImage(
        files=files,
        image_id=image_id,
        boxes_xyxy=np.zeros((0, 4), np.float32),
        names=(),
        is_crowd=np.zeros(0, bool),
        negatives=negatives,
        captions=captions,
        given_id=given_id,
        unclipped=Unclipped(
            size=size,
            boxes_xyxy=_bounded(boxes).astype(np.float32),
            names=tuple(names),
            is_crowd=np.asarray(is_crowd, bool),
            areas=None if areas is None else np.asarray(areas, np.float32),
            not_exhaustive=not_exhaustive,
        ),
    )
    return image.fitted(size)


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
    boxes = _bounded(np.asarray(boxes_xyxy, np.float64).reshape(-1, 4))
    keep = label_ops.drop_degenerate(boxes, height, width)
    if keep.all():
        return Proper(
            boxes_xyxy=label_ops.clip_boxes(boxes, height, width),
            names=tuple(names),
            is_crowd=np.asarray(is_crowd, bool),
            is_kept=keep,
            not_exhaustive=(),
            dropped=Counter(),
            odd=_oddities(boxes, height, width),
        )
    return Proper(
        boxes_xyxy=label_ops.clip_boxes(boxes[keep], height, width),
        names=tuple(itertools.compress(names, keep)),
        is_crowd=np.asarray(is_crowd, bool)[keep],
        is_kept=keep,
        not_exhaustive=tuple(itertools.compress(names, ~keep)),
        dropped=Counter(reasons(boxes[~keep])),
        odd=_oddities(boxes[keep], height, width),
    )


def num_twice(boxes: Sequence[Hashable]) -> int:
    """How many boxes of an image, each with its name, repeat another."""
    return len(boxes) - len(set(boxes))


def reasons(boxes_xyxy: Float[np.ndarray, "m 4"]) -> list[str]:
    """Why each of some boxes, none of which is proper, is dropped."""
    found = []
    # Boxes are stored with the precision of 32 bits: two corners may become one.
    for x0, y0, x1, y1 in _bounded(boxes_xyxy).astype(np.float32).tolist():
        if not np.isfinite([x0, y0, x1, y1]).all():
            found.append(NOT_FINITE)
        elif x1 < x0 or y1 < y0:
            found.append(NEGATIVE)
        else:
            found.append(NO_AREA if x1 == x0 or y1 == y0 else OUTSIDE)
    return found


def _bounded(boxes_xyxy: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "m 4"]:
    """The same within ±`_LARGEST`; what is not finite stays."""
    if (np.abs(boxes_xyxy) <= _LARGEST).all():
        return boxes_xyxy
    bounded = np.clip(boxes_xyxy, -_LARGEST, _LARGEST)
    return np.where(np.isfinite(boxes_xyxy), bounded, boxes_xyxy)


def _oddities(boxes_xyxy: Float[np.ndarray, "m 4"], height: float, width: float) -> Counter[str]:
    """What looks wrong of boxes that are kept. Relative boxes are no matter of pixels."""
    is_relative = (height, width) == (1, 1)
    is_tiny = ((boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]) < 1).all(axis=1) & (not is_relative)
    is_beyond = _is_beyond(boxes_xyxy, height, width)
    return +Counter({BEYOND: int(is_beyond.sum()), TINY: int(is_tiny.sum())})


def _is_beyond(
    boxes_xyxy: Float[np.ndarray, "m 4"], height: float, width: float
) -> Bool[np.ndarray, " m"]:
    """Which boxes reach beyond the image by more than rounding: COCO's do, by up to a pixel."""
    sides = np.array([width, height], np.float64)
    slack = sides * _BEYOND_SHARE + (0 if (height, width) == (1, 1) else _BEYOND_PIXELS)
    low, high = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
    return np.any((low < -slack) | (high > sides + slack), axis=1)


def _other_frame(
    boxes_xyxy: Float[np.ndarray, "m 4"], size: Size, others: Sequence[Size | None]
) -> bool:
    """True if some boxes reach beyond the image, and all fit one of the other frames."""
    frames = [other for other in others if other is not None and other != size]
    boxes = boxes_xyxy[np.isfinite(boxes_xyxy).all(axis=1)]
    if not frames or not _is_beyond(boxes, *size).any():
        return False
    return any(not _is_beyond(boxes, *frame).any() for frame in frames)


def _none_proper(names: Sequence[str]) -> Proper:
    none = np.zeros(0, bool)
    return Proper(
        boxes_xyxy=np.zeros((0, 4), np.float32),
        names=(),
        is_crowd=none,
        is_kept=np.zeros(len(names), bool),
        not_exhaustive=tuple(names),
        dropped=+Counter({OTHER_FRAME: len(names)}),
        odd=Counter(),
    )
