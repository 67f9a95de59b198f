"""Tiles of mosaics as images of their own, in contrastive training."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from owl_det import train_step
from owl_det.config import Config
from owl_det.errors import ConfigError
from owl_det.types import Batch
from tests import tiny

CONTRASTIVE = {
    "task": "contrastive",
    "model__contrastive": "softmax",
    "data__with_captions": True,
    "optimizer__clip": {"scope": "global"},
    "data__augment": {"mosaic_sizes": (1, 2), "mosaic_probabilities": (0.5, 0.5)},
}


def _config() -> Config:
    return tiny.config(model__image__pooling="mean", **CONTRASTIVE)


def test_a_tile_is_the_mean_of_its_tokens() -> None:
    config = _config()
    detector = train_step.make_detector(config)
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    tiles = jnp.array([[[0.25, 0.25, 0.5, 0.5], [0.75, 0.25, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]])

    @jax.jit
    def embed(image: Any, tiles: Any) -> Any:
        variables = {"params": train_step.init_params(config, jax.random.key(0))}
        return (
            detector.apply(variables, image, tiles, method="embed_tiles"),
            detector.apply(variables, image, method="embed_patches"),
            detector.apply(variables, image, method="embed_image"),
        )

    found, tokens, whole = embed(image, tiles)
    grid = np.asarray(tokens).reshape(4, 4, -1)
    expected = [grid[:2, :2].mean((0, 1)), grid[:2, 2:].mean((0, 1)), grid.mean((0, 1))]
    np.testing.assert_allclose(np.asarray(found)[0], expected, atol=1e-5)
    np.testing.assert_allclose(np.asarray(found)[0, 2], np.asarray(whole)[0], atol=1e-5)


def test_a_step_counts_tiles_with_captions() -> None:
    config = _config()
    batch = tiny.batch(config)
    assert batch.is_caption is not None and batch.caption_tokens is not None
    assert batch.caption_tokens.shape[:2] == (8, 4)

    @jax.jit
    def take(batch: Batch) -> Any:
        params = train_step.init_params(config, jax.random.key(1))
        return train_step.loss_and_gradients(
            params, batch, jax.random.key(0), config=config, num_shards=1
        )

    gradients, metrics = take(batch)
    assert np.isfinite(float(metrics["loss"]))
    assert set(gradients) == {"image", "text", "logit_scale"}
    # Without captions a tile is neither positive nor negative: the rest decides.
    mosaics = np.flatnonzero(np.asarray(batch.is_caption).all(1))
    keep = np.asarray(batch.is_caption) & (np.arange(8) != mosaics[0])[:, None]
    _, fewer = take(dataclasses.replace(batch, is_caption=jnp.asarray(keep)))
    assert float(fewer["loss"]) < float(metrics["loss"])  # fewer candidates at the start


def test_other_towers_pool_whole_images() -> None:
    with pytest.raises(ConfigError, match="config.data.augment.mosaic_sizes"):
        tiny.config(**CONTRASTIVE)
