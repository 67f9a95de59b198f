"""`model.image.last_block = "values"`: the formula in plain NumPy, and what must stay as it was."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from owl_det.config import Config
from owl_det.modeling import build
from owl_det.modeling.owl import OwlDetector
from owl_det.modeling.transformer import Transformer
from tests import tiny

WIDTH, LAYERS, HEADS = 16, 3, 2


def _transformer(num_last_queries: int | None, **changes: Any) -> Transformer:
    settings: dict[str, Any] = dict(
        width=WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        mlp_width=32,
        is_causal=False,
        activation="quick_gelu",
        epsilon=1e-5,
        droplayer_rate=0.0,
        dropout_rate=0.0,
        attention="xla",
        remat="none",
        unroll=1,
        dtype=jnp.float32,
        num_last_queries=num_last_queries,
    )
    return Transformer(**(settings | changes))


@pytest.fixture(scope="module")
def params() -> Any:
    """Random numbers for every parameter, biases and norms too."""
    shapes = jax.eval_shape(_transformer(1).init, jax.random.key(0), jnp.zeros((1, 5, WIDTH)), None)
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda x: 0.4 * rng.standard_normal(x.shape, np.float32), shapes)


X = np.random.default_rng(6).standard_normal((2, 5, WIDTH), np.float32)


def _norm(x: np.ndarray, p: Any) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * p["norm"]["scale"] + p["norm"]["bias"]


def _numpy_forward(params: Any, x: np.ndarray, num_last_queries: int | None) -> np.ndarray:
    """One sequence; the last block by its formula, token by token, where tokens do not attend."""
    for layer in range(LAYERS):
        p = jax.tree.map(lambda leaf, i=layer: np.asarray(leaf[i], np.float64), params)["params"]
        p = p["blocks"]
        y = _norm(x, p["norm_1"])
        q, k, v = (
            np.stack([y @ p["qkv"]["kernel"][:, i, h] for h in range(HEADS)], 1)
            + p["qkv"]["bias"][i]
            for i in range(3)
        )
        update = np.zeros_like(x)
        for token in range(len(x)):
            is_alone = layer == LAYERS - 1 and num_last_queries is not None
            is_alone = is_alone and token >= (num_last_queries or 0)
            for h in range(HEADS):
                scores = np.exp(q[token, h] @ k[:, h].T / np.sqrt(WIDTH / HEADS))
                mixed = v[token, h] if is_alone else scores @ v[:, h] / scores.sum()
                update[token] += mixed @ p["out"]["kernel"][h]
        x = x + update + p["out"]["bias"]
        hidden = _norm(x, p["norm_2"]) @ p["mlp_in"]["kernel"] + p["mlp_in"]["bias"]
        hidden = hidden / (1 + np.exp(-1.702 * hidden))
        x = x + hidden @ p["mlp_out"]["kernel"] + p["mlp_out"]["bias"]
    return x


@pytest.mark.parametrize("num_last_queries", [None, 0, 1])
def test_equals_numpy(params: Any, num_last_queries: int | None) -> None:
    ours = jax.jit(_transformer(num_last_queries).apply)(params, jnp.asarray(X), None)
    wanted = np.stack([_numpy_forward(params, x, num_last_queries) for x in X])
    np.testing.assert_allclose(ours, wanted, atol=2e-4)


def test_only_the_asked_tokens_attend_in_the_last_block(params: Any) -> None:
    """With one layer, a change of one token reaches the class token and no other."""
    one = _transformer(1, num_layers=1)
    first = jax.tree.map(lambda leaf: leaf[:1], params)
    run = jax.jit(one.apply)
    changed = X.copy()
    changed[:, 3] = changed[:, 2]
    moved = np.abs(run(first, jnp.asarray(changed), None) - run(first, jnp.asarray(X), None))
    moved = moved.max((0, 2))
    assert moved[0] > 1e-3 and moved[3] > 1e-3
    np.testing.assert_array_equal(moved[[1, 2, 4]], 0)


@pytest.mark.parametrize("changes", [{"remat": "full"}, {"unroll": 3}])
def test_the_gradient_survives_remat_unrolling_and_vmap(
    params: Any, changes: dict[str, Any]
) -> None:
    def gradient(model: Transformer) -> Any:
        def loss(params: Any, x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(model.apply(params, x[None], None)))

        return jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(params, jnp.asarray(X))

    plain, other = gradient(_transformer(1)), gradient(_transformer(1, **changes))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    key_gradient = plain["params"]["blocks"]["qkv"]["kernel"][:, :, :, 1]
    assert np.abs(key_gradient).max() > 0


def _towers(last_block: str) -> tuple[Config, OwlDetector]:
    config = tiny.config(model__contrastive="softmax")
    image = dataclasses.replace(config.model.image, last_block=last_block)
    model = dataclasses.replace(config.model, image=image)
    config = dataclasses.replace(config, model=model)
    return config, OwlDetector(model, config.preprocess)


def test_parameters_and_image_embedding_are_those_of_the_full_tower() -> None:
    (config, full), (other, values) = _towers("full"), _towers("values")
    params = jax.jit(lambda: build.init_params(config, jax.random.key(0)))()
    shapes = jax.eval_shape(lambda: build.init_params(other, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    pixels = jnp.asarray(np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3)), jnp.uint8)

    def run(model: OwlDetector, method: str) -> Any:
        return jax.jit(lambda p: model.apply({"params": p}, pixels, method=method))(params)

    np.testing.assert_allclose(run(full, "embed_image"), run(values, "embed_image"), atol=1e-5)
    difference = np.abs(run(full, "embed_patches") - run(values, "embed_patches"))
    assert difference.max() > 1e-3
