"""From records to network inputs: one image or a mosaic, augmented or as it is.

Every function here is pure in (records, rng). A tile is one image of a mosaic; a single image is a
mosaic of one. The order is: merge instances, crop, flip, resize into the cell, jitter.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from absl import logging
from jaxtyping import Float32, UInt8
from PIL import Image

from data_pipelines import image_ops, label_ops
from data_pipelines.features import Example, Names, Record
from data_pipelines.image_ops import UnreadableImage
from data_pipelines.label_ops import Instances
from owl_det.config import AugmentConfig, PreprocessConfig

_ASPECTS = (3 / 4, 4 / 3)  # width / height of random crops, as in the authors' code


@dataclass(frozen=True, kw_only=True)
class _Tile:
    """One placed image; boxes are xyxy in pixels of the canvas."""

    pixels: UInt8[np.ndarray, "h w 3"]
    size: tuple[int, int]  # height, width of what shows the image; the rest is padding
    corner: tuple[int, int]  # row and column of the top left pixel on the canvas
    image_id: int
    crop_size: tuple[int, int]  # height, width in pixels of the raw image
    instances: Instances
    negatives: Names
    unasked: Names  # in the picture but not (or not all) boxed: never negatives
    captions: tuple[str, ...]
    counts: dict[str, int]


def train_example(
    records: Sequence[Record | None],
    *,
    grid: int,
    augment: AugmentConfig,
    image_size: int,
    preprocess: PreprocessConfig,
    rng: np.random.Generator,
) -> Example:
    """An augmented mosaic of `grid` x `grid` images, row by row; `grid` 1 is a single image.

    Each image lies in the top left corner of its cell, its longer side U(tile_scale_min, 1) of the
    cell's. Where a record is None or its image cannot be decoded (logged, and counted as
    `unreadable_images`) the cell stays padding and its `tile_image_id` is -1. Boxes below one pixel
    of the canvas in width or height are dropped (`tiny_boxes`), as are those that lie outside the
    image as it really is (`degenerate_boxes`).

    Negatives are the union of the tiles' negatives, in order, without the names that are positive
    in any tile, and without those that a tile shows but does not fully box (`not_exhaustive`, cut
    off by the crop, tiny). A mosaic's `image_id` is -1; of a single image `original_size` is the
    crop's.

    Raises `ValueError` unless there are grid * grid records.
    """
    if len(records) != grid * grid:
        raise ValueError(f"a grid of {grid} x {grid} takes {grid**2} records, not {len(records)}")
    edges = [i * image_size // grid for i in range(grid + 1)]
    tiles: list[_Tile | None] = []
    num_unreadable = 0
    for index, record in enumerate(records):
        row, column = divmod(index, grid)
        cell = min(edges[row + 1] - edges[row], edges[column + 1] - edges[column])
        corner = (edges[row], edges[column])
        try:
            tile = record and _augmented_tile(record, corner, cell, augment, preprocess, rng)
        except UnreadableImage as error:
            logging.warning("Left out an image of %s: %s", _describe(record), error)
            num_unreadable += 1
            tile = None
        tiles.append(tile)
    return _assemble(tiles, image_size, preprocess, {"unreadable_images": num_unreadable})


def eval_example(record: Record, *, image_size: int, preprocess: PreprocessConfig) -> Example:
    """One image as it is, at full quality; no box is dropped for being small.

    Raises `UnreadableImage` if the image cannot be decoded.
    """
    image = image_ops.decode_image(record.image)
    instances, outside = _instances(record, image.height, image.width)
    size = (image.height, image.width)
    tile = _Tile(
        pixels=image_ops.place(image, image_size, preprocess),
        size=image_ops.fit_size(*size, image_size, preprocess.geometry),
        corner=(0, 0),
        image_id=record.image_id,
        crop_size=size,
        instances=_scaled(instances, size, image_size, preprocess),
        negatives=record.negatives,
        unasked=(*record.not_exhaustive, *_flat(outside)),
        captions=record.captions,
        counts={"degenerate_boxes": len(outside)},
    )
    return _assemble([tile], image_size, preprocess, {})


def random_crop(
    height: int, width: int, min_area: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A random crop, xyxy in whole pixels, of U(min_area, 1) of the image's area.

    Its aspect ratio is log-uniform in [3/4, 4/3], or the nearest to that which lets so large a crop
    fit into the image.
    """
    area = rng.uniform(min_area, 1) * height * width
    aspect = math.exp(rng.uniform(*np.log(_ASPECTS)))
    aspect = min(max(aspect, area / height**2), width**2 / area)
    crop_width = min(width, max(1, round(math.sqrt(area * aspect))))
    crop_height = min(height, max(1, round(math.sqrt(area / aspect))))
    x0 = int(rng.integers(width - crop_width + 1))
    y0 = int(rng.integers(height - crop_height + 1))
    return x0, y0, x0 + crop_width, y0 + crop_height


def jitter(
    pixels: UInt8[np.ndarray, "h w 3"], strength: float, rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """Multiplies brightness, then contrast about the mean, by U(1 - strength, 1 + strength)."""
    brightness, contrast = rng.uniform(1 - strength, 1 + strength, size=2)
    bright = pixels.astype(np.float32) * np.float32(brightness)
    mean = bright.mean()
    return np.round(np.clip(mean + (bright - mean) * contrast, 0, 255)).astype(np.uint8)


def _augmented_tile(
    record: Record,
    corner: tuple[int, int],
    cell: int,
    augment: AugmentConfig,
    preprocess: PreprocessConfig,
    rng: np.random.Generator,
) -> _Tile:
    opened = image_ops.open_image(record.image)
    full_size = image_ops.upright_size(opened)
    instances, outside = _instances(record, *full_size)
    if augment.merge_iou > 0:
        instances = label_ops.merge_instances(*instances, iou=augment.merge_iou, rng=rng)
    crop, hidden = (0, 0, full_size[1], full_size[0]), ()
    if rng.random() < augment.crop_probability:
        crop = random_crop(*full_size, augment.crop_min_area, rng)
        instances, hidden = label_ops.crop_instances(instances, crop, augment.crop_keep)
    crop_width, crop_height = crop[2] - crop[0], crop[3] - crop[1]
    flip = augment.flip and rng.random() < 0.5
    if flip:
        flipped = label_ops.flip_boxes(instances.boxes_xyxy, crop_width)
        instances = instances._replace(boxes_xyxy=flipped)

    side = max(1, round(cell * rng.uniform(augment.tile_scale_min, 1)))
    pixels = _crop_pixels(opened, full_size, crop, side, flip, preprocess)
    if augment.photometric > 0:
        pixels = jitter(pixels, augment.photometric, rng)
    instances = _scaled(instances, (crop_height, crop_width), side, preprocess)
    is_tiny = _is_tiny(instances.boxes_xyxy)
    tiny = instances.names_where(is_tiny)
    return _Tile(
        pixels=pixels,
        size=image_ops.fit_size(crop_height, crop_width, side, preprocess.geometry),
        corner=corner,
        image_id=record.image_id,
        crop_size=(crop_height, crop_width),
        instances=instances.select(~is_tiny),
        negatives=record.negatives,
        unasked=(*record.not_exhaustive, *hidden, *_flat(outside), *_flat(tiny)),
        captions=record.captions,
        counts={"degenerate_boxes": len(outside), "tiny_boxes": len(tiny)},
    )


def _instances(record: Record, height: int, width: int) -> tuple[Instances, tuple[Names, ...]]:
    """The record's labels, clipped to the image as it really is; the names of those outside."""
    boxes = label_ops.clip_boxes(record.boxes_xyxy, height, width)
    keep = label_ops.drop_degenerate(record.boxes_xyxy, height, width)
    instances = Instances(boxes, record.names, record.scores, record.is_crowd)
    return instances.select(keep), instances.names_where(~keep)


def _crop_pixels(
    opened: Image.Image,
    full_size: tuple[int, int],
    crop: tuple[int, int, int, int],
    side: int,
    flip: bool,
    preprocess: PreprocessConfig,
) -> UInt8[np.ndarray, "h w 3"]:
    """The crop, resized. A JPEG is decoded no larger than that needs.

    The "gaussian" kernel sees every pixel: it takes whole ones, which a shrunken JPEG has not.
    """
    crop_height, crop_width = crop[3] - crop[1], crop[2] - crop[0]
    height, width = image_ops.fit_size(crop_height, crop_width, side, preprocess.geometry)
    scale = max(height / crop_height, width / crop_width)
    draft_size = (math.ceil(full_size[1] * scale), math.ceil(full_size[0] * scale))
    if preprocess.resize == "gaussian":
        draft_size = (full_size[1], full_size[0])
    image = image_ops.decode_draft(opened, draft_size)
    shrink = image_ops.draft_scale(full_size, image)
    x0, y0, x1, y1 = (corner / shrink for corner in crop)
    return image_ops.place(image, side, preprocess, crop=(x0, y0, x1, y1), flip=flip)


def _scaled(
    instances: Instances, size: tuple[int, int], side: int, preprocess: PreprocessConfig
) -> Instances:
    """Boxes of an image of this size (height, width) in pixels of its square of `side`."""
    scale = side / np.array(image_ops.extent(*size, preprocess.geometry) * 2, np.float64)
    return instances._replace(boxes_xyxy=(instances.boxes_xyxy * scale).astype(np.float32))


def _is_tiny(boxes_xyxy: Float32[np.ndarray, "m 4"]) -> np.ndarray:
    width, height = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).T
    return (width < 1) | (height < 1)


def _assemble(
    tiles: Sequence[_Tile | None],
    image_size: int,
    preprocess: PreprocessConfig,
    counts: dict[str, int],
) -> Example:
    """Pastes the tiles and joins their labels."""
    canvas = image_ops.padding(image_size, preprocess.pad_value)
    tile_boxes = np.zeros((len(tiles), 4), np.float32)
    for index, tile in enumerate(tiles):
        if tile is None:
            continue
        (y, x), (height, width) = tile.corner, tile.pixels.shape[:2]
        canvas[y : y + height, x : x + width] = tile.pixels
        height, width = tile.size
        tile_boxes[index] = x, y, x + width, y + height
    placed = [(index, tile) for index, tile in enumerate(tiles) if tile is not None]
    instances = [_on_canvas(tile) for _, tile in placed]
    is_single = len(tiles) == 1 and len(placed) == 1
    return Example(
        image=canvas,
        image_id=placed[0][1].image_id if is_single else -1,
        original_size=placed[0][1].crop_size if is_single else (image_size, image_size),
        boxes_cxcywh=image_ops.boxes_to_padded(
            _concatenate((i.boxes_xyxy for i in instances), np.zeros((0, 4), np.float32)),
            image_size,
            image_size,
            preprocess.geometry,
        ),
        names=tuple(names for i in instances for names in i.names),
        is_crowd=_concatenate((i.is_crowd for i in instances), np.zeros(0, bool)),
        scores=_concatenate((i.scores for i in instances), np.zeros(0, np.float32)),
        negatives=_negatives([tile for _, tile in placed]),
        excluded=tuple(dict.fromkeys(name for _, tile in placed for name in tile.unasked)),
        tile_boxes_cxcywh=image_ops.boxes_to_padded(
            tile_boxes, image_size, image_size, preprocess.geometry
        ),
        tile_of_instance=np.array(
            [index for index, tile in placed for _ in tile.instances.names], np.int32
        ),
        tile_image_id=np.array([tile.image_id if tile else -1 for tile in tiles], np.int32),
        tile_captions=tuple(tile.captions if tile else () for tile in tiles),
        counts=_sum_counts([counts, *(tile.counts for _, tile in placed)]),
    )


def _on_canvas(tile: _Tile) -> Instances:
    """The tile's labels where they lie on the canvas.

    Clipped, because rounding the shorter side to whole pixels may cut half of one.
    """
    height, width = tile.size
    y, x = tile.corner
    boxes = label_ops.clip_boxes(tile.instances.boxes_xyxy, height, width)
    return tile.instances._replace(boxes_xyxy=boxes + np.array([x, y, x, y], np.float32))


def _negatives(tiles: Sequence[_Tile]) -> Names:
    never = {name for tile in tiles for name in (*_flat(tile.instances.names), *tile.unasked)}
    union = dict.fromkeys(itertools.chain.from_iterable(tile.negatives for tile in tiles))
    return tuple(name for name in union if name not in never)


def _flat(names: Iterable[Names]) -> Names:
    return tuple(itertools.chain.from_iterable(names))


def _concatenate(parts: Iterable[np.ndarray], empty: np.ndarray) -> np.ndarray:
    return np.concatenate([empty, *parts])


def _sum_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for entry in counts:
        for key, value in entry.items():
            total[key] = total.get(key, 0) + value
    return total


def _describe(record: Record | None) -> str:
    return (record and record.source) or "an unnamed source"
