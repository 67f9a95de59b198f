"""Regions: from masks to tokens, and boxes of other sources."""

import numpy as np
import pytest

from data_pipelines.named_regions import BoxRegions, region_tokens
from data_pipelines.shapes_world import ShapesWorld


def _interpolated(mask: np.ndarray, y: float, x: float) -> float:
    """Linear interpolation between pixel centres, the border repeated."""
    h, w = mask.shape
    total = 0.0
    for i in range(int(np.floor(y)), int(np.floor(y)) + 2):
        for j in range(int(np.floor(x)), int(np.floor(x)) + 2):
            weight = (1 - abs(y - i)) * (1 - abs(x - j))
            total += weight * mask[min(max(i, 0), h - 1), min(max(j, 0), w - 1)]
    return total


@pytest.mark.parametrize("geometry", ["pad", "stretch"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 17), (9, 9)])
def test_tokens_are_where_the_interpolated_mask_is_above_zero(
    geometry: str, shape: tuple[int, int]
) -> None:
    rng = np.random.default_rng(0)
    coarse = rng.integers(-1, 4, (3, 3))
    rows, columns = (np.arange(n) * 3 // n for n in shape)
    segments = coarse[rows][:, columns].astype(np.int32)
    side, (h, w) = 6, shape
    down, across = (h, w) if geometry == "stretch" else (max(shape), max(shape))
    found = region_tokens(segments, 4, side, geometry)
    for region in range(4):
        mask = (segments == region).astype(float)
        for i in range(side):
            for j in range(side):
                y, x = (i + 0.5) * down / side - 0.5, (j + 0.5) * across / side - 0.5
                is_image = y + 0.5 < h and x + 0.5 < w
                wanted = is_image and _interpolated(mask, y, x) > 0
                if mask.any() and found[region].sum() > 1:
                    assert found[region, i * side + j] == wanted, (region, i, j)
    assert found.any(axis=1).tolist() == [bool((segments == r).any()) for r in range(4)]


def test_a_region_without_a_token_centre_gets_the_token_it_lies_in() -> None:
    segments = np.full((40, 40), -1, np.int32)
    segments[21:24, 30:32] = 0  # between the centres at 15, 25 and 35
    found = region_tokens(segments, 1, 4, "pad")
    assert np.flatnonzero(found[0]).tolist() == [2 * 4 + 3]


def test_boxes_of_any_source_are_regions_of_things() -> None:
    world = ShapesWorld(split="test", num_images=5)
    regions = BoxRegions(world)
    for i in range(5):
        found, record = regions.regions(i), regions[i]
        assert found.segments is None and found.is_thing.all() and found.size == (64, 64)
        np.testing.assert_array_equal(found.boxes_xyxy, record.boxes_xyxy)
        assert found.names == tuple(name for (name,) in record.names)
        assert set(found.present) == set(found.names)
