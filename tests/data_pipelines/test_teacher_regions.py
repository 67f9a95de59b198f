"""Regions of distillation: which grids there are, and where their cells lie."""

from collections.abc import Sequence

import numpy as np
import pytest

from data_pipelines import teacher_regions as regions
from data_pipelines.features import Example
from owl_det.config import RegionsConfig


def _example(tiles: list[tuple[float, ...]], boxes: Sequence[tuple[float, ...]] = ()) -> Example:
    count = len(boxes)
    return Example(
        image=np.zeros((8, 8, 3), np.uint8),
        image_id=0,
        original_size=(8, 8),
        boxes_cxcywh=np.array(boxes, np.float32).reshape(-1, 4),
        names=(("a",),) * count,
        is_crowd=np.arange(count) == 1,
        scores=np.ones(count, np.float32),
        negatives=(),
        excluded=(),
        tile_boxes_cxcywh=np.array(tiles, np.float32),
        tile_of_instance=np.zeros(count, np.int32),
        tile_image_id=np.arange(len(tiles), dtype=np.int32),
    )


@pytest.mark.parametrize(
    ("kind", "num_grids", "num_cells"), [("clipself", 24, 361), ("densevlm", 17, 309)]
)
def test_grids_are_those_of_the_published_code(kind: str, num_grids: int, num_cells: int) -> None:
    assert len(regions.grids(kind)) == num_grids  # pyright: ignore[reportArgumentType]
    assert len(regions.cells(kind)) == num_cells  # pyright: ignore[reportArgumentType]
    for m, n in regions.grids(kind):  # pyright: ignore[reportArgumentType]
        assert 1 <= m <= 6 and n <= min(2 * m, 6) and n >= m / 2


def test_the_whole_image_is_one_region() -> None:
    config = RegionsConfig(grids="whole", max_regions=3)
    tile = (0.5, 0.3, 1.0, 0.6)  # the rest of the square is padding
    drawn = regions.draw(_example([tile]), config, np.random.default_rng(0))
    assert drawn.is_region.tolist() == [True, False, False]
    np.testing.assert_allclose(drawn.boxes_cxcywh[0], tile, rtol=1e-6)


def test_drawn_cells_tile_the_image_without_its_padding() -> None:
    config = RegionsConfig(max_regions=36)
    example = _example([(0.5, 0.25, 1.0, 0.5)])  # the lower half of the square is padding
    sizes = set()
    for seed in range(200):  # of 24 grids
        drawn = regions.draw(example, config, np.random.default_rng(seed))
        boxes = drawn.boxes_cxcywh[drawn.is_region].astype(np.float64)
        np.testing.assert_allclose(boxes[:, 2:].prod(1).sum(), 0.5, rtol=1e-5)
        low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
        assert low.min() > -1e-6 and high[:, 1].max() < 0.5 + 1e-6
        overlap = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
        assert np.triu(overlap.clip(0).prod(-1), 1).max() < 1e-6
        sizes.add(len(boxes))
        cells = regions.in_tile(regions.cells("clipself")[drawn.cell], example.tile_boxes_cxcywh[0])
        np.testing.assert_allclose(boxes, cells[drawn.is_region], atol=1e-6)
    assert len(sizes) > 8 and {1, 36} <= sizes


def test_at_most_so_many_cells_are_drawn_each_once() -> None:
    config = RegionsConfig(max_regions=20)
    counts = []
    for seed in range(60):
        drawn = regions.draw(_example([(0.5, 0.5, 1, 1)]), config, np.random.default_rng(seed))
        assert drawn.boxes_cxcywh.shape == (20, 4)
        chosen = drawn.cell[drawn.is_region]
        assert len(set(chosen.tolist())) == len(chosen)
        counts.append(len(chosen))
    assert max(counts) == 20


def test_a_mosaics_regions_are_its_tiles_and_proposals_are_boxes_but_no_crowd() -> None:
    tiles = [
        (0.25, 0.25, 0.5, 0.5),
        (0.75, 0.25, 0.5, 0.4),
        (0.25, 0.75, 0.5, 0.5),
        (0.75, 0.75, 0.5, 0.5),
    ]
    rng = np.random.default_rng(0)
    drawn = regions.draw(_example(tiles), RegionsConfig(max_regions=6), rng)
    assert drawn.is_region.tolist() == [True] * 4 + [False] * 2
    np.testing.assert_allclose(drawn.boxes_cxcywh[:4], tiles, rtol=1e-6)
    assert (drawn.cell[:4] == regions.WHOLE).all() and drawn.tile[:4].tolist() == [0, 1, 2, 3]
    boxes = [(0.2, 0.2, 0.1, 0.1), (0.5, 0.5, 0.9, 0.9), (0.7, 0.7, 0.2, 0.3)]
    config = RegionsConfig(kind="proposals", max_regions=6)
    drawn = regions.draw(_example([(0.5, 0.5, 1, 1)], boxes), config, rng)
    np.testing.assert_allclose(drawn.boxes_cxcywh[drawn.is_region], [boxes[0], boxes[2]], rtol=1e-6)
