"""LiT's and SigLIP's towers in big_vision's files against a forward pass written in NumPy."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from owl_det.convert import lit
from owl_det.errors import CheckpointError
from owl_det.modeling.owl import OwlDetector
from tests.convert import arrays

Tensors = dict[str, np.ndarray]

WIDTH, HEADS, LAYERS, MLP, PATCH, SIDE = 24, 3, 2, 40, 8, 3
TEXT_WIDTH, TEXT_HEADS, VOCABULARY, LENGTH = 16, 2, 50, 5
TOKENS = np.array([[5, 7, 1, 1, 1], [3, 1, 1, 1, 1], [4, 6, 8, 9, 1]])


# --- files ---------------------------------------------------------------------------------------


def _random(shape: tuple[int, ...], rng: np.random.Generator, fan_in: int = 1) -> np.ndarray:
    return (rng.normal(size=shape) * fan_in**-0.5).astype(np.float32)


def _norm(name: str, width: int, rng: np.random.Generator) -> Tensors:
    return {
        f"{name}/scale": 1 + 0.3 * _random((width,), rng),
        f"{name}/bias": 0.3 * _random((width,), rng),
    }


def _dense(name: str, inputs: int, outputs: int, rng: np.random.Generator) -> Tensors:
    return {
        f"{name}/kernel": _random((inputs, outputs), rng, inputs),
        f"{name}/bias": 0.3 * _random((outputs,), rng),
    }


def _attention(name: str, width: int, heads: int, rng: np.random.Generator) -> Tensors:
    c, made = width // heads, {}
    for part in ("query", "key", "value"):
        made[f"{name}/{part}/kernel"] = _random((width, heads, c), rng, width)
        made[f"{name}/{part}/bias"] = 0.3 * _random((heads, c), rng)
    made[f"{name}/out/kernel"] = _random((heads, c, width), rng, width)
    made[f"{name}/out/bias"] = 0.3 * _random((width,), rng)
    return made


def _encoder(name: str, width: int, heads: int, rng: np.random.Generator) -> Tensors:
    made = _norm(f"{name}/encoder_norm", width, rng)
    for layer in range(LAYERS):
        block = f"{name}/encoderblock_{layer}"
        made |= _attention(f"{block}/MultiHeadDotProductAttention_0", width, heads, rng)
        made |= _norm(f"{block}/LayerNorm_0", width, rng) | _norm(
            f"{block}/LayerNorm_1", width, rng
        )
        made |= _dense(f"{block}/MlpBlock_0/Dense_0", width, MLP, rng)
        made |= _dense(f"{block}/MlpBlock_0/Dense_1", MLP, width, rng)
    return made


def _file(*, pooling: str, has_head: bool, has_bias: bool) -> Tensors:
    rng = np.random.default_rng(0)
    outputs = 12 if has_head else WIDTH
    made = {
        "img/embedding/kernel": _random((PATCH, PATCH, 3, WIDTH), rng, 3 * PATCH**2),
        "img/embedding/bias": _random((WIDTH,), rng),
        "img/pos_embedding": _random((1, SIDE * SIDE, WIDTH), rng),
        "txt/Embed_0/embedding": _random((VOCABULARY, TEXT_WIDTH), rng),
        "txt/pos_embedding": _random((1, LENGTH, TEXT_WIDTH), rng),
        "t": np.array([1.3], np.float32),
    }
    made |= _encoder("img/Transformer", WIDTH, HEADS, rng)
    made |= _encoder("txt/Encoder_0", TEXT_WIDTH, TEXT_HEADS, rng)
    made |= _dense("txt/head", TEXT_WIDTH, outputs, rng)
    if pooling == "tok":
        made["img/cls"] = _random((1, 1, WIDTH), rng)
    else:
        made["img/MAPHead_0/probe"] = _random((1, 1, WIDTH), rng)
        made |= _attention("img/MAPHead_0/MultiHeadDotProductAttention_0", WIDTH, HEADS, rng)
        made |= _norm("img/MAPHead_0/LayerNorm_0", WIDTH, rng)
        made |= _dense("img/MAPHead_0/MlpBlock_0/Dense_0", WIDTH, MLP, rng)
        made |= _dense("img/MAPHead_0/MlpBlock_0/Dense_1", MLP, WIDTH, rng)
    if has_head:
        made |= _dense("img/head", WIDTH, outputs, rng)
    if has_bias:
        made["b"] = np.array([-2.0], np.float32)
    return {f"params/{name}": value for name, value in made.items()}


# --- forward pass --------------------------------------------------------------------------------


def _apply_dense(x: np.ndarray, p: Tensors, name: str) -> np.ndarray:
    return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]


def _apply_norm(x: np.ndarray, p: Tensors, name: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return unit * p[f"{name}/scale"] + p[f"{name}/bias"]


def _apply_mlp(x: np.ndarray, p: Tensors, name: str) -> np.ndarray:
    x = _apply_dense(x, p, f"{name}/Dense_0")
    x = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return _apply_dense(x, p, f"{name}/Dense_1")


def _apply_attention(x: np.ndarray, y: np.ndarray, p: Tensors, name: str) -> np.ndarray:
    """x [m, d] looks at y [n, d], one head after the other."""
    total = p[f"{name}/out/bias"].astype(np.float64)
    for head in range(p[f"{name}/query/kernel"].shape[1]):
        q, k, v = (
            z @ p[f"{name}/{part}/kernel"][:, head] + p[f"{name}/{part}/bias"][head]
            for z, part in ((x, "query"), (y, "key"), (y, "value"))
        )
        weights = np.exp(q @ k.T / math.sqrt(q.shape[-1]))
        weights /= weights.sum(-1, keepdims=True)
        total = total + weights @ v @ p[f"{name}/out/kernel"][head]
    return total


def _apply_encoder(x: np.ndarray, p: Tensors, name: str) -> np.ndarray:
    for layer in range(LAYERS):
        block = f"{name}/encoderblock_{layer}"
        y = _apply_norm(x, p, f"{block}/LayerNorm_0")
        x = x + _apply_attention(y, y, p, f"{block}/MultiHeadDotProductAttention_0")
        x = x + _apply_mlp(_apply_norm(x, p, f"{block}/LayerNorm_1"), p, f"{block}/MlpBlock_0")
    return _apply_norm(x, p, f"{name}/encoder_norm")


def _embed_image(pixels: np.ndarray, p: Tensors) -> np.ndarray:
    """One image [h, w, 3] of uint8."""
    values = pixels / 127.5 - 1
    x = np.stack(
        [
            np.tensordot(
                values[PATCH * i : PATCH * (i + 1), PATCH * j : PATCH * (j + 1)],
                p["img/embedding/kernel"],
                3,
            )
            for i in range(SIDE)
            for j in range(SIDE)
        ]
    )
    x = x + p["img/embedding/bias"] + p["img/pos_embedding"][0]
    if "img/cls" in p:
        x = np.concatenate([p["img/cls"][0], x])
    x = _apply_encoder(x, p, "img/Transformer")
    if "img/cls" in p:
        pooled = x[0]
    else:
        head = "img/MAPHead_0"
        y = _apply_attention(p[f"{head}/probe"][0], x, p, f"{head}/MultiHeadDotProductAttention_0")
        pooled = (
            y + _apply_mlp(_apply_norm(y, p, f"{head}/LayerNorm_0"), p, f"{head}/MlpBlock_0")
        )[0]
    return _apply_dense(pooled, p, "img/head") if "img/head/kernel" in p else pooled


def _embed_text(tokens: np.ndarray, p: Tensors) -> np.ndarray:
    x = p["txt/Embed_0/embedding"][tokens] + p["txt/pos_embedding"][0]
    return _apply_dense(_apply_encoder(x, p, "txt/Encoder_0")[-1], p, "txt/head")


# --- tests ---------------------------------------------------------------------------------------


def _stacked(tensors: Tensors) -> Tensors:
    """The same file with layers stacked, as big_vision writes scanned encoders."""
    made = {name: value for name, value in tensors.items() if "encoderblock_" not in name}
    for name in tensors:
        if "encoderblock_0" in name:
            layers = [
                tensors[name.replace("encoderblock_0", f"encoderblock_{i}")] for i in range(LAYERS)
            ]
            made[name.replace("encoderblock_0", "encoderblock")] = np.stack(layers)
    return made


@pytest.mark.parametrize(
    ("pooling", "has_head", "has_bias", "is_stacked"),
    [("tok", True, False, False), ("map", False, True, True)],
    ids=["LiT", "SigLIP"],
)
def test_embeddings_and_logits_equal_their_formula(
    pooling: str, has_head: bool, has_bias: bool, is_stacked: bool
) -> None:
    tensors = _file(pooling=pooling, has_head=has_head, has_bias=has_bias)
    plain = {name.removeprefix("params/"): value for name, value in tensors.items()}
    pixels = arrays.image(PATCH * SIDE)
    file = _stacked(tensors) if is_stacked else tensors
    loaded = lit.load(arrays.weights(file), "spiece.model")
    assert loaded.config.image.num_layers == loaded.config.text.num_layers == LAYERS
    detector = OwlDetector(loaded.config, loaded.preprocess)

    @jax.jit
    def ours(params: Any) -> Any:
        variables = {"params": params}
        image = detector.apply(variables, jnp.asarray(pixels), method="embed_image")
        text = detector.apply(variables, jnp.asarray(TOKENS), method="encode_text")
        return image, text, detector.apply(variables, image, text, method="similarity")

    image = np.stack([_embed_image(x, plain) for x in pixels])
    text = np.stack([_embed_text(x, plain) for x in TOKENS])
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    logits = np.exp(1.3) * unit(image) @ unit(text).T + (-2.0 if has_bias else 0.0)
    for mine, wanted in zip(ours(loaded.params), (image, text, logits), strict=True):
        assert wanted.std() > 0.05
        assert arrays.difference(mine, wanted) < arrays.TOLERANCE


def test_a_position_of_the_class_token_in_an_old_file_is_kept() -> None:
    """Older files add a position to the class token too, under another name."""
    tensors = _file(pooling="tok", has_head=True, has_bias=False)
    positions = tensors.pop("params/img/pos_embedding")
    first = np.full((1, 1, WIDTH), 0.5, np.float32)
    tensors["params/img/Transformer/posembed_input/pos_embedding"] = np.concatenate(
        [first, positions], axis=1
    )
    loaded = lit.load(arrays.weights(tensors), "spiece.model")
    np.testing.assert_array_equal(loaded.params["image"]["position_embedding"][0], first[0, 0])
    np.testing.assert_array_equal(loaded.params["image"]["position_embedding"][1:], positions[0])


def test_another_text_tower_and_unknown_tensors_are_refused() -> None:
    tensors = _file(pooling="tok", has_head=False, has_bias=False)
    with pytest.raises(CheckpointError, match="BERT"):
        lit.load(arrays.weights(tensors | {"params/txt/BertEncoder_0/x": np.zeros(3)}), "")
    with pytest.raises(CheckpointError, match="unknown tensor img/surplus"):
        lit.load(arrays.weights(tensors | {"params/img/surplus": np.zeros(3)}), "spiece.model")
