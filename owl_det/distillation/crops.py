"""Crops of a batch's images as a teacher takes them, inside a compiled step.

Cutting them from the batch and not from the files keeps whatever augmentation and mosaics did to
the pixels, moves no more bytes to the device, and has static shapes. Resampling is Pillow's
antialiased "bilinear" of `image_ops.resize_crop`, as two small matrix products.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

from owl_det.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from owl_det.config import PreprocessConfig


def crop_and_resize(
    image: UInt8[Array, "b H W 3"],
    boxes_cxcywh: Float[Array, "b 4"],
    side: int,
    preprocess: PreprocessConfig,
) -> UInt8[Array, "b side side 3"]:
    """One box of each image in a square of `side` pixels, laid out as `preprocess` says.

    Boxes are relative to the image; what of them lies outside is cut off.
    """
    height, width = image.shape[1:3]
    low, extent, size = _layout(boxes_cxcywh, (height, width), side, preprocess)
    columns, is_column = _axis_weights(low[:, 0], extent[:, 0], size[:, 0], side, width)
    rows, is_row = _axis_weights(low[:, 1], extent[:, 1], size[:, 1], side, height)
    # Matrix units would round pixels to eight bits or fewer on the way.
    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    pixels = product("byh,bhwc->bywc", rows, image.astype(jnp.float32))
    pixels = product("bxw,bywc->byxc", columns, pixels)
    is_inside = is_row[:, :, None, None] & is_column[:, None, :, None]
    padding = round(preprocess.pad_value * 255)
    return jnp.where(is_inside, jnp.clip(jnp.round(pixels), 0, 255), padding).astype(jnp.uint8)


def content_boxes(
    boxes_cxcywh: Float[Array, "b 4"],
    image_size: tuple[int, int],
    side: int,
    preprocess: PreprocessConfig,
) -> Float[Array, "b 4"]:
    """The part of each square of `crop_and_resize` that is no padding: cxcywh, relative to it.

    `image_size` is (height, width) of the images that the boxes are relative to, in pixels.
    """
    _, _, size = _layout(boxes_cxcywh, image_size, side, preprocess)
    return jnp.concatenate([size / 2, size], axis=-1) / side


def _layout(
    boxes_cxcywh: Float[Array, "b 4"],
    image_size: tuple[int, int],
    side: int,
    preprocess: PreprocessConfig,
) -> tuple[Float[Array, "b 2"], Float[Array, "b 2"], Float[Array, "b 2"]]:
    """Top left corner and extent of each box in the image's pixels, and its extent in the square's;
    x first."""
    height, width = image_size
    sides = jnp.array([[width, height, width, height]], jnp.float32)
    corners = jnp.clip(cxcywh_to_xyxy(boxes_cxcywh), 0.0, 1.0) * sides
    # A filler without extent shows one pixel; nothing reads it.
    extent = jnp.maximum(corners[:, 2:] - corners[:, :2], 1.0)
    size = jnp.full_like(extent, side)
    if preprocess.geometry == "pad":
        longer = extent.max(-1, keepdims=True)
        size = jnp.maximum(jnp.round(extent * side / longer), 1.0)
    return corners[:, :2], extent, size


def _axis_weights(
    low: Float[Array, " b"],
    extent: Float[Array, " b"],
    size: Float[Array, " b"],
    side: int,
    num_pixels: int,
) -> tuple[Float[Array, "b side p"], Bool[Array, "b side"]]:
    """Weights of the image's pixels in each of `side` output pixels, the first `size` of which are
    real: a triangle as wide as an output pixel, or as an input pixel where that is wider."""
    low, scale = low[:, None, None], (extent / size)[:, None, None]
    out = jnp.arange(side, dtype=jnp.float32)[None, :, None]
    pixel = jnp.arange(num_pixels, dtype=jnp.float32)[None, None, :]
    distance = jnp.abs(pixel + 0.5 - (low + (out + 0.5) * scale))
    weights = jnp.maximum(0.0, 1.0 - distance / jnp.maximum(scale, 1.0))
    weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-6)
    return weights, jnp.arange(side)[None, :] < size[:, None]


def grow_in_tile(
    boxes_cxcywh: Float[Array, "b r 4"],
    tile_boxes: Float[Array, "b t 4"],
    is_tile: Bool[Array, "b t"],
    factor: float,
) -> Float[Array, "b r 4"]:
    """Boxes `factor` times as wide and high about their centres, cut to the tile they lie in.

    So a crop shows neither padding nor another image of the mosaic. A box whose centre is in no
    tile is only grown.
    """
    half = tile_boxes[:, None, :, 2:] / 2
    away = jnp.abs(boxes_cxcywh[:, :, None, :2] - tile_boxes[:, None, :, :2])
    is_inside = (away <= half).all(-1) & is_tile[:, None, :]
    whole = jnp.array([[[0.5, 0.5, 1.0, 1.0]]])
    tile = jnp.take_along_axis(tile_boxes, jnp.argmax(is_inside, axis=-1)[..., None], axis=1)
    tile = jnp.where(is_inside.any(-1, keepdims=True), tile, whole)
    grown = boxes_cxcywh * jnp.array([[[1.0, 1.0, factor, factor]]])
    (low, high), (first, last) = (
        jnp.split(cxcywh_to_xyxy(boxes), 2, axis=-1) for boxes in (grown, tile)
    )
    corners = [jnp.clip(corner, first, last) for corner in (low, high)]
    return xyxy_to_cxcywh(jnp.concatenate(corners, axis=-1))
