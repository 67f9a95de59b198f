"""Crops inside the step against Pillow, which makes those of everything else."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from data_pipelines import image_ops
from owl_det.config import PreprocessConfig
from owl_det.distillation import crops


def _pixels() -> np.ndarray:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((40, 40), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("geometry", ["pad", "stretch"])
def test_crops_equal_pillows(geometry: str) -> None:
    preprocess = PreprocessConfig(geometry=geometry)  # pyright: ignore[reportArgumentType]
    pixels = _pixels()
    corners = np.array([[0, 0, 40, 40], [5, 7, 17, 35], [10.5, 3.25, 38, 9.75], [8, 8, 12, 11]])
    boxes = image_ops.boxes_to_padded(corners, 40, 40, "pad")
    images = jnp.asarray(np.stack([pixels] * len(boxes)))
    found = np.asarray(crops.crop_and_resize(images, jnp.asarray(boxes), 16, preprocess))
    content = np.asarray(crops.content_boxes(jnp.asarray(boxes), (40, 40), 16, preprocess))
    for crop, box, (x, y, width, height) in zip(found, corners, content, strict=True):
        wanted = image_ops.padding(16, preprocess.pad_value)
        placed = image_ops.place(Image.fromarray(pixels), 16, preprocess, crop=tuple(box))
        wanted[: placed.shape[0], : placed.shape[1]] = placed
        assert (round(height * 16), round(width * 16)) == placed.shape[:2]
        np.testing.assert_allclose((x, y), (width / 2, height / 2), rtol=1e-6)  # top left
        # Pillow rounds its weights, and between its two passes, to eight bits.
        assert np.abs(crop.astype(int) - wanted).max() <= 2


def test_grown_boxes_stay_in_their_tile() -> None:
    tiles = jnp.array([[[0.25, 0.25, 0.5, 0.5], [0.75, 0.25, 0.5, 0.4]]])
    boxes = jnp.array([[[0.2, 0.2, 0.2, 0.1], [0.6, 0.3, 0.2, 0.2], [0.5, 0.9, 0.1, 0.1]]])
    found = crops.grow_in_tile(boxes, tiles, jnp.ones((1, 2), bool), 2.0)
    # The first has room, the second is cut at the left and the bottom, the third is in no tile.
    wanted = [[0.2, 0.2, 0.4, 0.2], [0.65, 0.275, 0.3, 0.35], [0.5, 0.9, 0.2, 0.2]]
    np.testing.assert_allclose(found[0], wanted, atol=1e-6)
