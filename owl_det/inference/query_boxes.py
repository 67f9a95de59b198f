"""Boxes of query images as callers give them: corners in pixels, checked against their images."""

import os
from collections.abc import Mapping, Sequence, Set
from numbers import Real
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from data_pipelines import image_ops
from data_pipelines.image_ops import Geometry
from owl_det.errors import DataError
from owl_det.inference.image_encoder import ImageBatch
from owl_det.inference.image_inputs import ImageLike

_EXPECTED = "give four numbers x0, y0, x1, y1 in pixels"


def each(boxes: Any, num_images: int) -> list[Any]:
    """One box, or None, for each image; `relative` checks it. Four numbers are one image's box.

    Raises `DataError` for what is no list of boxes.
    """
    if boxes is None:
        return [None] * num_images
    if isinstance(boxes, (str, bytes, Mapping, Set)) or not hasattr(boxes, "__iter__"):
        raise DataError(f"image queries: boxes: got {type(boxes).__name__}; a list, {_EXPECTED}")
    listed = list(boxes)
    is_flat = len(listed) == 4 and all(isinstance(x, (Real, np.generic)) for x in listed)
    return [listed] if is_flat and num_images == 1 else listed


def of_batch(
    boxes: Sequence[Any], images: Sequence[ImageLike], batch: ImageBatch, geometry: Geometry
) -> tuple[Float32[np.ndarray, "b 4"], Bool[np.ndarray, " b"]]:
    """The box of each row of a batch (`relative`), and which rows have one.

    `boxes` and `images` are those of the whole call. Raises as `relative`, naming the image.
    """
    padded = np.zeros((len(batch.pixels), 4), np.float32)
    has_box = np.zeros(len(batch.pixels), bool)
    for row, (index, size) in enumerate(zip(batch.indices, batch.sizes, strict=True)):
        box, image = boxes[index], images[index]
        if box is not None:
            of_file = f" of {image}" if isinstance(image, (str, os.PathLike)) else ""
            where = f"image queries, box {index}{of_file}"
            padded[row] = relative(box, size, geometry, where)
            has_box[row] = True
    return padded, has_box


def relative(
    box: Any, size: tuple[int, int], geometry: Geometry, where: str
) -> Float32[np.ndarray, " 4"]:
    """Pixel corners → cxcywh relative to the padded square, clipped to the image.

    Raises `DataError`, which begins with `where`, for a box that is none in pixels of the image.
    """
    height, width = size
    try:
        corners = np.asarray(box, np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{where}: {box!r}: {_EXPECTED}") from None
    if corners.shape != (4,) or not np.isfinite(corners).all():
        raise DataError(f"{where}: {_EXPECTED}")
    shown = f"{where}: {np.asarray(box).tolist()}"
    if min(size) > 1 and 0 <= corners.min() and corners.max() <= 1 and corners.any():
        raise DataError(
            f"{shown} lies in the first pixel of an image of {width} x {height}; boxes are in "
            "pixels, and no fractions: multiply x by the width, y by the height"
        )
    if (corners[2:] < corners[:2]).any():
        raise DataError(
            f"{shown} ends before it begins; give corners x0, y0, x1, y1, not a corner and a size"
        )
    corners = np.clip(corners, 0, [width, height, width, height])
    if not (corners[2:] > corners[:2]).all():
        raise DataError(f"{shown} has no area inside the image of {width} x {height} pixels")
    if (corners[2:] - corners[:2] < 1).any():
        raise DataError(
            f"{shown} shows less than a pixel of the image of {width} x {height}; boxes are in "
            "pixels, and no fractions"
        )
    return image_ops.boxes_to_padded(corners, height, width, geometry)
