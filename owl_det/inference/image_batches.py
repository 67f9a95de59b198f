"""Images in batches of one shape, as the image tower takes them."""

import itertools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from data_pipelines import image_ops
from data_pipelines.image_ops import UnreadableImage
from owl_det.config import PreprocessConfig
from owl_det.inference import image_inputs
from owl_det.inference.image_inputs import ImageLike


class ImageBatch(NamedTuple):
    """Images that pass through the model together; rows beyond `indices` are fillers."""

    indices: list[int]  # places of the images among all
    sizes: list[tuple[int, int]]  # height, width in pixels
    pixels: UInt8[np.ndarray, "b H W 3"]  # padded squares

    def all_sizes(self) -> Int32[np.ndarray, "b 2"]:
        """`sizes` of all rows; fillers have one pixel."""
        sizes = np.ones((len(self.pixels), 2), np.int32)
        sizes[: len(self.sizes)] = np.array(self.sizes, np.int32).reshape(-1, 2)
        return sizes


def image_batches(
    images: Iterator[ImageLike],
    batch_size: int,
    side: int,
    preprocess: PreprocessConfig,
    on_unreadable: Callable[[UnreadableImage], None] | None = None,
) -> Iterator[ImageBatch]:
    """Reads images into padded squares of `side` pixels.

    Batches are filled up to the shape of the first, so that it is compiled already. Raises
    `UnreadableImage`, naming the image, unless `on_unreadable` takes it: then it is left out.
    """
    numbered, width = enumerate(images), 0
    while chunk := list(itertools.islice(numbered, batch_size)):
        width = width or len(chunk)
        batch = ImageBatch([], [], np.zeros((width, side, side, 3), np.uint8))
        for index, image in chunk:
            try:
                pixels, size = _prepared(image, side, preprocess, f"image {index}")
            except UnreadableImage as error:
                if on_unreadable is None:
                    raise
                on_unreadable(error)
                continue
            batch.pixels[len(batch.indices)] = pixels
            batch.indices.append(index)
            batch.sizes.append(size)
        yield batch


def _prepared(
    image: ImageLike, side: int, preprocess: PreprocessConfig, where: str
) -> tuple[UInt8[np.ndarray, "H W 3"], tuple[int, int]]:
    """The padded square, and height and width in pixels; an error names the file."""
    read = image_inputs.read(image, where)
    try:
        return image_ops.to_square(read, side, preprocess), (read.height, read.width)
    except UnreadableImage as error:
        name = image if isinstance(image, (str, os.PathLike)) else where
        raise UnreadableImage(f"{name}: {error}") from None
