"""Tiles of mosaics as images of their own, in contrastive training."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from owl_det.config import Config
from owl_det.errors import ConfigError
from owl_det.modeling import build
from owl_det.training import objectives
from owl_det.types import Batch
from tests import tiny

CONTRASTIVE = {
    "task": "contrastive",
    "model__contrastive": "softmax",
    "data__with_captions": True,
    "optimizer__clip": {"scope": "global"},
    "data__augment": {"mosaic_sizes": (1, 2), "mosaic_probabilities": (0.5, 0.5)},
}


@pytest.fixture(scope="module")
def config() -> Config:
    return tiny.config(model__image__pooling="mean", **CONTRASTIVE)


@pytest.fixture(scope="module")
def params(config: Config) -> Any:
    return jax.jit(lambda: build.init_params(config, jax.random.key(0)))()


def test_a_tile_is_the_mean_of_its_tokens(config: Config, params: Any) -> None:
    detector = build.make_detector(config)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    image = jnp.asarray(pixels)
    tiles = jnp.array([[[0.25, 0.25, 0.5, 0.5], [0.75, 0.25, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]])

    @jax.jit
    def embed(params: Any) -> Any:
        return (
            detector.apply({"params": params}, image, tiles, method="embed_tiles"),
            detector.apply({"params": params}, image, method="embed_patches"),
            detector.apply({"params": params}, image, method="embed_image"),
        )

    found, tokens, whole = embed(params)
    grid = np.asarray(tokens).reshape(4, 4, -1)
    expected = [grid[:2, :2].mean((0, 1)), grid[:2, 2:].mean((0, 1)), grid.mean((0, 1))]
    np.testing.assert_allclose(np.asarray(found)[0], expected, atol=1e-5)
    np.testing.assert_allclose(np.asarray(found)[0, 2], np.asarray(whole)[0], atol=1e-5)


def test_the_loss_counts_tiles_with_captions(config: Config, params: Any) -> None:
    batch = tiny.batch(config)
    assert batch.is_caption is not None and batch.caption_tokens is not None
    assert batch.caption_tokens.shape[:2] == (8, 4)

    @jax.jit
    def losses_of(params: Any, batch: Batch) -> Any:
        examples, text_key = objectives.split_batch(batch, jax.random.key(0))
        context = objectives.context_of(config, batch, text_key)
        return objectives.contrastive_losses(params, batch, examples, context)[0]

    is_caption = np.asarray(batch.is_caption)
    losses = np.asarray(losses_of(params, batch)).reshape(8, 4)
    assert (losses[is_caption] > 0).all() and not losses[~is_caption].any()
    # Without captions a tile is neither positive nor negative: the rest has fewer to choose from.
    mosaics = np.flatnonzero(is_caption.all(1))
    keep = is_caption & (np.arange(8) != mosaics[0])[:, None]
    changed = dataclasses.replace(batch, is_caption=jnp.asarray(keep))
    fewer = np.asarray(losses_of(params, changed)).reshape(8, 4)
    assert not fewer[~keep].any() and fewer[keep].mean() < losses[keep].mean()


def test_other_towers_pool_whole_images() -> None:
    with pytest.raises(ConfigError, match="config.data.augment.mosaic_sizes"):
        tiny.config(**CONTRASTIVE)
