"""The regions of an image that a teacher teaches: cells of a random grid, tiles, or given boxes.

They are drawn here and not in the step because a cache of teacher outputs must know which of its
vectors to send along; the pixels are cut in the step, so that the teacher sees the student's.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int

from data_pipelines.features import Example
from owl_det.config import RegionsConfig

MAX_SIDE = 6  # of a grid, in cells (arXiv 2310.01403, table 1a)

WHOLE = -1  # as a region's cell: its whole tile


@dataclass(frozen=True, kw_only=True)
class TeacherRegions:
    """Regions of one example, padded to `max_regions`."""

    boxes_cxcywh: Float32[np.ndarray, "r 4"]  # relative to the padded square
    is_region: Bool[np.ndarray, " r"]
    tile: Int[np.ndarray, " r"]
    cell: Int[np.ndarray, " r"]  # among the cells of all grids, in the order of `cells`; or WHOLE

    def arrays(self) -> dict[str, np.ndarray]:
        """What goes into the batch."""
        return {"region_boxes": self.boxes_cxcywh, "is_region": self.is_region}


GridKind = Literal["clipself", "densevlm", "whole"]


@cache
def grids(kind: GridKind) -> tuple[tuple[int, int], ...]:
    """All grids (rows, columns) of a kind, each equally likely.

    As the authors' code draws them, with n columns for m rows: CLIPSelf ⌈m/2⌉ ≤ n ≤ min(2m, 6),
    1 ≤ m; DenseVLM ⌊(m + 1)/2⌋ + 1 ≤ n ≤ min(2m, 6), 2 ≤ m. "whole" is 1 x 1 alone.
    """
    if kind == "whole":
        return ((1, 1),)
    first, extra = (1, 0) if kind == "clipself" else (2, 1)
    return tuple(
        (m, n)
        for m in range(first, MAX_SIDE + 1)
        for n in range((m + 1) // 2 + extra, min(2 * m, MAX_SIDE) + 1)
    )


@cache
def cells(kind: GridKind) -> Float64[np.ndarray, "c 4"]:
    """The cells of all grids, grid by grid and row by row: cxcywh relative to the image."""
    boxes = [
        ((column + 0.5) / n, (row + 0.5) / m, 1 / n, 1 / m)
        for m, n in grids(kind)
        for row in range(m)
        for column in range(n)
    ]
    return np.array(boxes)


def draw(example: Example, config: RegionsConfig, rng: np.random.Generator) -> TeacherRegions:
    """The regions of one example; a random `max_regions` of them where there are more.

    "patches": the cells of one random grid over a single image (its padding is not part of it), or
    the tiles of a mosaic. "proposals": its boxes, crowd regions excepted.
    """
    tiles = np.flatnonzero(example.tile_image_id >= 0)
    if config.kind == "proposals":
        chosen = np.flatnonzero(~example.is_crowd)
        boxes, tile = example.boxes_cxcywh[chosen], example.tile_of_instance[chosen]
        cell = np.full(len(chosen), WHOLE)
    elif len(example.tile_image_id) > 1:
        boxes, tile, cell = example.tile_boxes_cxcywh[tiles], tiles, np.full(len(tiles), WHOLE)
    else:
        cell = _draw_grid(config.grids, rng)
        boxes = in_tile(cells(config.grids)[cell], example.tile_boxes_cxcywh[0])
        tile = np.zeros(len(cell), int)
    kept = np.sort(rng.permutation(len(boxes))[: config.max_regions])
    r = config.max_regions
    return TeacherRegions(
        boxes_cxcywh=_padded(boxes[kept].astype(np.float32), r),
        is_region=_padded(np.ones(len(kept), bool), r),
        tile=_padded(tile[kept], r),
        cell=_padded(cell[kept], r),
    )


def in_tile(
    boxes_cxcywh: Float64[np.ndarray, "c 4"], tile_cxcywh: Float32[np.ndarray, "4"]
) -> Float64[np.ndarray, "c 4"]:
    """Boxes relative to a tile → relative to the square that the tile lies in."""
    tile = tile_cxcywh.astype(np.float64)
    centres = tile[:2] - tile[2:] / 2 + boxes_cxcywh[:, :2] * tile[2:]
    return np.concatenate([centres, boxes_cxcywh[:, 2:] * tile[2:]], axis=1)


def _draw_grid(kind: GridKind, rng: np.random.Generator) -> np.ndarray:
    """Indices of one grid's cells."""
    sizes = [m * n for m, n in grids(kind)]
    chosen = int(rng.integers(len(sizes)))
    first = sum(sizes[:chosen])
    return np.arange(first, first + sizes[chosen])


def _padded(array: np.ndarray, length: int) -> np.ndarray:
    out = np.zeros((length, *array.shape[1:]), array.dtype)
    out[: len(array)] = array
    return out
