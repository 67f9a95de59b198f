"""Scenic's checkpoints, against a forward pass of their layers written here in NumPy."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from flax import serialization

from owl_det.checkpoints.load import load_model
from owl_det.convert import formats, scenic
from owl_det.errors import CheckpointError
from owl_det.modeling.owl import OwlDetector

WIDTH, TEXT_WIDTH, HEADS, TEXT_HEADS, LAYERS, SIDE, PATCH = 32, 16, 4, 2, 2, 4, 8
TOKENS = np.array([[49406, 320, 2368, 49407, 0, 0], [49406, 1929, 49407, 0, 0, 0]], np.int32)


def _dense(rng: np.random.Generator, inputs: Any, outputs: Any) -> dict[str, np.ndarray]:
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    scale = rng.uniform(0.7, 1.4) / math.sqrt(math.prod(inputs))
    return {
        "kernel": rng.normal(0, scale, (*inputs, *outputs)).astype(np.float32),
        "bias": rng.normal(0.1, 0.3, outputs).astype(np.float32),
    }


def _norm(rng: np.random.Generator, width: int) -> dict[str, np.ndarray]:
    return {
        "scale": rng.normal(1, 0.3, width).astype(np.float32),
        "bias": rng.normal(0, 0.3, width).astype(np.float32),
    }


def _transformer(rng: np.random.Generator, width: int, heads: int) -> dict[str, Any]:
    split = (heads, width // heads)
    return {
        f"resblocks_{i}": {
            "ln_0": _norm(rng, width),
            "ln_1": _norm(rng, width),
            "attn": {
                **{name: _dense(rng, width, split) for name in ("query", "key", "value")},
                "out": _dense(rng, split, width),
            },
            "mlp": {"c_fc": _dense(rng, width, 4 * width), "c_proj": _dense(rng, 4 * width, width)},
        }
        for i in range(LAYERS)
    }


def parameters(objectness: bool) -> dict[str, Any]:
    """A tree as Scenic's module makes it; every tensor is random."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.5, shape).astype(np.float32)

    def mlp(outputs: int) -> dict[str, Any]:
        sizes = (WIDTH, WIDTH, outputs)
        return {f"Dense_{i}": _dense(rng, WIDTH, size) for i, size in enumerate(sizes)}

    visual = {
        "class_embedding": normal(WIDTH),
        "positional_embedding": normal(SIDE**2 + 1, WIDTH),
        "conv1": {"kernel": normal(PATCH, PATCH, 3, WIDTH) / 10},
        "ln_pre": _norm(rng, WIDTH),
        "ln_post": _norm(rng, WIDTH),
        "transformer": _transformer(rng, WIDTH, HEADS),
    }
    text = {
        "token_embedding": {"embedding": normal(49408, TEXT_WIDTH)},
        "positional_embedding": normal(TOKENS.shape[1], TEXT_WIDTH),
        "ln_final": _norm(rng, TEXT_WIDTH),
        "text_projection": {"kernel": normal(TEXT_WIDTH, 24)},
        "transformer": _transformer(rng, TEXT_WIDTH, TEXT_HEADS),
    }
    tree = {
        "backbone": {
            "clip": {"visual": visual, "text": text, "logit_scale": np.float32(4.6)},
            "merged_class_token": _norm(rng, WIDTH),
        },
        "class_head": {
            "Dense_0": _dense(rng, WIDTH, 24),
            "logit_shift": _dense(rng, WIDTH, 1),
            "logit_scale": _dense(rng, WIDTH, 1),
        },
        "obj_box_head": mlp(4),
    }
    return tree | ({"objectness_head": mlp(1)} if objectness else {})


def old_spelling(tree: Any) -> Any:
    """The names of the first release: dots, norms numbered from 1."""
    if not isinstance(tree, dict):
        return tree
    names = {"ln_0": "ln_1", "ln_1": "ln_2"}
    return {
        names.get(key, key.replace("resblocks_", "resblocks.")): old_spelling(value)
        for key, value in tree.items()
    }


def save(path: Path, layout: str, tree: dict[str, Any]) -> Path:
    trees: dict[str, Any] = {
        "new": {"params": tree, "global_step": 7, "opt_state": {"0": {"mu": tree["class_head"]}}},
        "old": {"optimizer": {"target": old_spelling(tree), "state": {"step": 7}}},
        "mixed": {"params": old_spelling(tree)},
    }
    mixed = {"padding": np.zeros(3, np.float32), "padding_bias": np.zeros(1, np.float32)}
    if layout == "old":
        trees["old"]["optimizer"]["target"]["class_head"] |= mixed
        mask = {"conv": {"kernel": np.zeros((3, 3, 2, 2), np.float32)}}
        trees["old"]["optimizer"]["target"]["obj_mask_head"] = mask
    path.write_bytes(serialization.msgpack_serialize(trees[layout]))
    return path


# --- their forward pass, from their module's definition -------------------------------------------


def dense(p: dict[str, np.ndarray], x: np.ndarray, axes: int = 1) -> np.ndarray:
    return np.tensordot(x, p["kernel"], axes=axes) + p["bias"]


def norm(p: dict[str, np.ndarray], x: np.ndarray, epsilon: float) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + epsilon) * p["scale"] + p["bias"]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def blocks(p: dict[str, Any], x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    for i in range(LAYERS):
        layer = p[f"resblocks_{i}"]
        y = norm(layer["ln_0"], x, 1e-5)
        q, k, v = (dense(layer["attn"][name], y) for name in ("query", "key", "value"))
        scores = np.einsum("nhc,mhc->hnm", q, k) / math.sqrt(q.shape[-1])
        scores = np.where(mask, scores, -1e30)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        x = x + dense(layer["attn"]["out"], np.einsum("hnm,mhc->nhc", shares, v), axes=2)
        y = dense(layer["mlp"]["c_fc"], norm(layer["ln_1"], x, 1e-5))
        x = x + dense(layer["mlp"]["c_proj"], y * sigmoid(1.702 * y))
    return x


def embed_text(p: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    x = p["token_embedding"]["embedding"][tokens].astype(np.float64) + p["positional_embedding"]
    real = tokens > 0
    mask = np.tril(real[:, None] & real[None, :])
    x = norm(p["ln_final"], blocks(p["transformer"], x, mask), 1e-5)
    return x[tokens.argmax()] @ p["text_projection"]["kernel"]


def embed_image(p: dict[str, Any], pixels: np.ndarray) -> np.ndarray:
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    image, visual = (pixels / 255.0 - mean) / std, p["clip"]["visual"]
    tokens = [visual["class_embedding"]]
    for row in range(SIDE):
        for column in range(SIDE):
            patch = image[row * PATCH :, column * PATCH :][:PATCH, :PATCH]
            tokens.append(np.einsum("hwc,hwcd->d", patch, visual["conv1"]["kernel"]))
    x = norm(visual["ln_pre"], np.stack(tokens) + visual["positional_embedding"], 1e-5)
    x = blocks(visual["transformer"], x, np.ones((len(x), len(x)), bool))
    x = norm(visual["ln_post"], x, 1e-5)
    return norm(p["merged_class_token"], x[1:] * x[:1], 1e-6)


def mlp(p: dict[str, Any], x: np.ndarray) -> np.ndarray:
    x = gelu_tanh(dense(p["Dense_0"], x))
    return dense(p["Dense_2"], gelu_tanh(dense(p["Dense_1"], x)))


def logit(p: float) -> float:
    return math.log(p + 1e-4) - math.log1p(-p + 1e-4)


def forward(p: dict[str, Any], pixels: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    features = embed_image(p["backbone"], pixels)
    text = np.stack([embed_text(p["backbone"]["clip"]["text"], row) for row in tokens])
    head = p["class_head"]
    classes = dense(head["Dense_0"], features)
    classes /= np.linalg.norm(classes, axis=-1, keepdims=True) + 1e-6
    queries = text / (np.linalg.norm(text, axis=-1, keepdims=True) + 1e-6)
    scale = dense(head["logit_scale"], features)
    scale = np.where(scale > 0, scale, np.expm1(np.minimum(scale, 0))) + 1
    bias = [
        (logit((column + 1) / SIDE), logit((row + 1) / SIDE), logit(1 / SIDE), logit(1 / SIDE))
        for row in range(SIDE)
        for column in range(SIDE)
    ]
    found = {
        "class_logits": (classes @ queries.T + dense(head["logit_shift"], features)) * scale,
        "boxes": sigmoid(mlp(p["obj_box_head"], features) + np.array(bias)),
        "features": features,
        "text": text,
    }
    if "objectness_head" in p:
        found["objectness_logits"] = mlp(p["objectness_head"], features)[:, 0]
    return found


@pytest.mark.parametrize(
    ("layout", "objectness"), [("new", True), ("new", False), ("old", False), ("mixed", True)]
)
def test_numbers_are_those_of_their_module(layout: str, objectness: bool, tmp_path: Path) -> None:
    tree = parameters(objectness)
    formats.convert(
        str(save(tmp_path / "checkpoint", layout, tree)), tmp_path / "o", "scenic", "owl_det"
    )
    ours = load_model(tmp_path / "o")
    assert ours.config.image_size == SIDE * PATCH and ours.config.embedding_dim == 24
    assert (ours.config.image.num_heads, ours.config.text.num_heads) == (HEADS, TEXT_HEADS)
    assert ours.config.has_objectness_head == objectness
    pixels = np.random.default_rng(1).integers(0, 256, (SIDE * PATCH, SIDE * PATCH, 3), np.uint8)
    expected = forward(tree, pixels, TOKENS)
    detector = OwlDetector(ours.config, ours.preprocess)

    @jax.jit
    def run(params: Any) -> dict[str, Any]:
        variables = {"params": params}
        text: Any = detector.apply(variables, jnp.asarray(TOKENS), method="encode_text")
        features: Any = detector.apply(variables, jnp.asarray(pixels)[None], method="encode_image")
        is_query = jnp.ones((1, len(TOKENS)), bool)
        out: Any = detector.apply(variables, features, text[None], is_query, method="predict")
        return {
            "class_logits": out.class_logits[0],
            "boxes": out.boxes[0],
            "objectness_logits": out.objectness_logits[0],
            "features": features.tokens[0],
            "text": text,
        }

    found = run(ours.params)
    for name, value in expected.items():
        limit = 1e-5 if name == "boxes" else 2e-4
        assert np.ptp(value) > 100 * limit, f"{name} says nothing"
        np.testing.assert_allclose(found[name], value, atol=limit, err_msg=name)


def test_leaving_out_the_mask_head_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path / "checkpoint", "old", parameters(False))
    with caplog.at_level("INFO"):
        scenic.read(str(path))
    assert "the mask head; masks are not predicted here" in caplog.text
    assert "2 tensors left out: unused by the authors' code too" in caplog.text


def _without(tree: dict[str, Any], path: str, value: Any = None) -> dict[str, Any]:
    head, _, rest = path.partition("/")
    changed = dict(tree)
    if rest:
        changed[head] = _without(tree.get(head, {}), rest, value)
    elif value is None:
        del changed[head]
    else:
        changed[head] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("obj_box_head/Dense_1/bias", None, "tensor obj_box_head/Dense_1/bias is missing"),
        ("backbone/clip/visual/conv1/kernel", None, "conv1/kernel is missing"),
        ("backbone/clip/visual/proj/bias", np.zeros(3, np.float32), "unknown tensor"),
        ("backbone/lit/x", np.zeros(3, np.float32), "unknown tensor backbone/lit/x"),
        (
            "backbone/clip/visual/positional_embedding",
            np.zeros((15, WIDTH), np.float32),
            "15 positions are no square grid",
        ),
        (
            "backbone/clip/visual/conv1/kernel",
            np.zeros((PATCH, PATCH, 0, WIDTH), np.float32),
            r"conv1/kernel has shape",
        ),
        ("class_head/Dense_0/bias", np.zeros(24, np.int32), "has dtype int32"),
        ("class_head/Dense_0/bias", np.zeros(25, np.float32), "does not fit class_head"),
        (
            "backbone/clip/text/transformer/resblocks_1",
            {"mlp": {"c_fc": {"bias": np.zeros(3, np.float32)}}},
            "resblocks_1/ln_0/scale is missing",
        ),
    ],
)
def test_what_does_not_fit_is_one_clear_line(
    path: str, value: Any, message: str, tmp_path: Path
) -> None:
    tree = _without(parameters(True), path, value)
    file = tmp_path / "checkpoint"
    file.write_bytes(serialization.msgpack_serialize({"params": tree}))
    with pytest.raises(CheckpointError, match=message) as error:
        scenic.read(str(file))
    assert "\n" not in str(error.value)


def test_other_checkpoints_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint"
    file.write_bytes(msgpack.packb({"params": {"resnet": 1}}))
    with pytest.raises(CheckpointError, match="not a CLIP detector of Scenic"):
        scenic.read(str(file))
