"""The image tower for images of any size: batches of one shape go in, token embeddings come out."""

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int32, UInt8

from data_pipelines import image_ops
from data_pipelines.image_ops import Geometry, UnreadableImage
from owl_det.config import PreprocessConfig
from owl_det.errors import DataError
from owl_det.inference import image_inputs, ranges, ranking
from owl_det.inference.image_inputs import ImageLike
from owl_det.types import LoadedModel, Params, TokenEmbeddings


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


class ImageEncoder:
    """Runs the image tower of one model."""

    def __init__(self, model: LoadedModel, functions: ranking.DetectorFunctions) -> None:
        self._model, self._functions = model, functions
        self.geometry: Geometry = model.preprocess.geometry
        self._run = jax.jit(self._embed_and_keep, static_argnames="num_tokens")

    def side(self, image_size: int | None) -> int:
        """Side of the padded square, by default the model's own.

        Raises `DataError` for one that the model cannot take.
        """
        full, patch = self._model.config.image_size, self._model.config.vit.patch_size
        side = full if image_size is None else ranges.count("image_size", image_size)
        if self._functions.is_one_size and side != full:
            raise DataError(f"image_size: this export takes images of {full} pixels only")
        if not 0 < side <= full or side % patch:
            raise DataError(
                f"image_size: {side} is not a multiple of the patch size {patch} between {patch} "
                f"and {full}"
            )
        return side

    def batches(
        self,
        images: Iterator[ImageLike],
        batch_size: int,
        side: int,
        on_unreadable: Callable[[UnreadableImage], None] | None = None,
    ) -> Iterator[ImageBatch]:
        """`image_batches`, preprocessed as the model was trained."""
        return image_batches(images, batch_size, side, self._model.preprocess, on_unreadable)

    def embed(self, batch: ImageBatch, num_tokens: int = 0) -> TokenEmbeddings:
        """The tokens of all rows on the device; `num_tokens` as in `ranking.keep_tokens`."""
        sizes = batch.all_sizes()
        return self._run(self._model.params, batch.pixels, sizes, num_tokens=num_tokens)

    def embed_all(
        self, batches: Iterator[ImageBatch], num_tokens: int = 0
    ) -> Iterator[tuple[ImageBatch, TokenEmbeddings]]:
        """Tokens of the readable images of each batch, on the host.

        Raises `CheckpointError` if the model computes NaN.
        """
        for batch in batches:
            count = len(batch.indices)
            tokens = self.embed(batch, num_tokens)
            kept = jax.tree.map(lambda x, count=count: np.asarray(x)[:count], tokens)
            ranking.require_finite("embed", *jax.tree.leaves(kept))
            yield batch, kept

    def _embed_and_keep(
        self, params: Params, image: Array, sizes: Array, num_tokens: int = 0
    ) -> Any:
        tokens = self._functions.embed_image_tokens(params, image)
        return ranking.keep_tokens(tokens, num_tokens, sizes, self.geometry)


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
    image: Any, side: int, preprocess: PreprocessConfig, where: str
) -> tuple[UInt8[np.ndarray, "H W 3"], tuple[int, int]]:
    """The padded square, and height and width in pixels; an error names the file."""
    read = image_inputs.read(image, where)
    try:
        return image_ops.to_square(read, side, preprocess), (read.height, read.width)
    except UnreadableImage as error:
        name = image if isinstance(image, (str, os.PathLike)) else where
        raise UnreadableImage(f"{name}: {error}") from None
