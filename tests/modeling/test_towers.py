"""The towers and what they are made of, against plain NumPy."""

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from owl_det.modeling.attention import CHUNK, attend
from owl_det.modeling.heads import ClassHead
from owl_det.modeling.text import TextTower
from owl_det.modeling.transformer import ACTIVATIONS, Transformer
from owl_det.modeling.vit import ImageTower, patchify
from owl_det.scoring import unit_length
from tests import tiny

START, END = 49406, 49407


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_equals_its_formula(is_causal: bool) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 5, 3, 4)) for _ in range(3))
    wanted = np.zeros_like(q)
    for b in range(2):
        for h in range(3):
            scores = q[b, :, h] @ k[b, :, h].T / math.sqrt(4)
            if is_causal:
                scores = np.where(np.tril(np.ones((5, 5), bool)), scores, -1e30)
            wanted[b, :, h] = _softmax(scores) @ v[b, :, h]
    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    ours = attend(*arrays, is_causal=is_causal, implementation="xla")
    np.testing.assert_allclose(ours, wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_in_chunks_is_plain_attention(dtype: str) -> None:
    """Values and gradients, of a number of queries that no chunk size divides."""
    m, n, tolerance = 2 * CHUNK + 3, 9, {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, m, 2, 4), (2, n, 2, 4), (2, n, 2, 4), (2, m, 2, 4)]
    *arrays, weight = (
        jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)
    )

    def run(implementation: Any) -> Any:
        def total(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
            mixed = attend(query, key, value, is_causal=False, implementation=implementation)
            return (mixed * weight).astype(jnp.float32).sum(), mixed

        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*arrays)

    wanted = run("plain")
    for implementation in ("xla", "portable"):
        found = jax.tree.leaves(run(implementation))
        for ours, theirs in zip(found, jax.tree.leaves(wanted), strict=True):
            assert ours.dtype == theirs.dtype
            scale = float(jnp.abs(theirs.astype(jnp.float32)).max())
            np.testing.assert_allclose(
                ours.astype(jnp.float32), theirs.astype(jnp.float32), atol=tolerance * scale
            )


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere scores are left to XLA")
def test_attention_on_a_cpu_holds_a_part_of_the_scores() -> None:
    m, h = 4 * CHUNK, 4
    shape = jax.ShapeDtypeStruct((1, m, h, 8), jnp.float32)

    def temporaries(implementation: Any) -> int:
        def total(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return attend(query, key, value, is_causal=False, implementation=implementation).sum()

        gradient: Any = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
        return gradient.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    scores = 4 * h * m * m  # bytes
    assert temporaries("plain") > scores
    assert temporaries("xla") < scores / 2


def test_portable_attention_is_exported_for_every_platform() -> None:
    def run(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attend(query, key, value, is_causal=False, implementation="portable")

    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, (2, CHUNK + 1, 2, 4)) for key in keys]
    shapes = jax.export.symbolic_args_specs(arrays, "b, ...")
    exported = jax.export.export(jax.jit(run), platforms=("cpu", "cuda", "tpu"))(*shapes)
    wanted = attend(*arrays, is_causal=False, implementation="plain")
    np.testing.assert_allclose(exported.call(*arrays), wanted, atol=1e-5)


def test_activations_at_known_points() -> None:
    x = 1.5
    known = {
        "quick_gelu": x / (1 + math.exp(-1.702 * x)),
        "gelu": x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
        "gelu_tanh": 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    }
    assert known.keys() == ACTIVATIONS.keys()
    for name, value in known.items():
        assert float(ACTIVATIONS[name](jnp.float32(x))) == pytest.approx(value, abs=1e-6), name


def test_patches_are_rows_of_pixels() -> None:
    image = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    patches = patchify(jnp.asarray(image), 2)
    assert patches.shape == (2, 6, 12)
    np.testing.assert_array_equal(patches[1, 4], image[1, 2:4, 2:4].ravel())


def test_patch_embedding_is_a_convolution_of_the_normalised_image() -> None:
    config = tiny.config()
    tower = ImageTower(config.model, config.preprocess)
    image = np.random.default_rng(1).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
    params = jax.jit(tower.init)(jax.random.key(0), jnp.asarray(image))["params"]
    patches = patchify(jnp.asarray(image, jnp.float32) / 255, 8)
    ours = tower.apply({"params": params}, patches, method="_embed")
    mean, std = np.array(config.preprocess.mean), np.array(config.preprocess.std)
    normal = jnp.asarray((image / 255 - mean) / std, jnp.float32)
    wanted = jax.lax.conv_general_dilated(
        normal,
        params["patch_kernel"],
        (8, 8),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    np.testing.assert_allclose(ours, wanted.reshape(1, 16, 32), atol=1e-4)


@pytest.fixture(scope="module")
def text() -> tuple[Any, Any]:
    tower = TextTower(tiny.config().model)
    params = jax.jit(tower.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    return tower, params


def test_text_is_pooled_at_the_end_token(text: tuple[Any, Any]) -> None:
    tower, params = text
    encode = jax.jit(lambda tokens: tower.apply(params, tokens))
    one = encode(jnp.array([[START, 5, END, 0, 0, 0, 0, 0]]))
    filled = encode(jnp.array([[START, 5, END, 9, 8, 7, 3, 1]]))
    np.testing.assert_allclose(one, filled, atol=1e-6)
    assert not np.allclose(one, encode(jnp.array([[START, 6, END, 0, 0, 0, 0, 0]])), atol=1e-3)
    # Shorter rows use the first positions: cutting padding off changes nothing.
    np.testing.assert_allclose(
        one, jax.jit(tower.apply)(params, jnp.array([[START, 5, END]])), atol=1e-6
    )


def test_text_rows_are_independent(text: tuple[Any, Any]) -> None:
    tower, params = text
    rows = jnp.array([[START, i, END, 0, 0, 0, 0, 0] for i in (3, 4, 5)])
    encode = jax.jit(tower.apply)
    np.testing.assert_allclose(encode(params, rows)[1:2], encode(params, rows[1:2]), atol=1e-6)


def _transformer(**changes: Any) -> Transformer:
    settings: dict[str, Any] = dict(
        width=16,
        num_layers=3,
        num_heads=2,
        mlp_width=32,
        is_causal=False,
        activation="gelu",
        epsilon=1e-5,
        droplayer_rate=0.0,
        dropout_rate=0.0,
        attention="xla",
        remat="none",
        unroll=1,
        dtype=jnp.float32,
    )
    return Transformer(**(settings | changes))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere scores are left to XLA")
@pytest.mark.slow
def test_remat_of_long_attention() -> None:
    """Every kind gives the same gradients; "dots" alone does not mix the values twice."""
    x = jax.random.normal(jax.random.key(1), (1, CHUNK + 2, 16))
    params = jax.jit(lambda: _transformer(num_layers=1).init(jax.random.key(0), x, None))()
    gradients, num_loops = {}, {}
    for remat in ("none", "dots", "full"):
        model = _transformer(num_layers=1, remat=remat)
        gradient: Any = jax.jit(
            jax.grad(lambda p, model=model: jnp.square(cast(Any, model.apply(p, x, None))).sum())
        )
        lowered = gradient.lower(params)
        num_loops[remat] = lowered.as_text().count("stablehlo.while")
        gradients[remat] = lowered.compile()(params)
    # Forward and backward, each over layers, heads and chunks; "full" mixes once more.
    assert num_loops == {"none": 6, "dots": 6, "full": 8}
    for remat in ("dots", "full"):
        leaves = (jax.tree.leaves(gradients[name]) for name in (remat, "none"))
        for ours, wanted in zip(*leaves, strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4)


def test_layers_are_stored_stacked() -> None:
    params = jax.eval_shape(_transformer().init, jax.random.key(0), jnp.zeros((1, 4, 16)), None)[
        "params"
    ]
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(params["blocks"]))
    assert params["blocks"]["qkv"]["kernel"].shape == (3, 16, 3, 2, 8)


def test_droplayer_ramps_and_does_not_rescale() -> None:
    """With rate 1 in the last of two layers only the first is left, at its usual size."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 16)), jnp.float32)
    keys = jax.random.split(jax.random.key(2), 3)
    two, one = _transformer(num_layers=2, droplayer_rate=1.0), _transformer(num_layers=1)
    params = jax.jit(lambda: two.init(jax.random.key(0), x, None))()
    first = {"params": jax.tree.map(lambda p: p[:1], params["params"])}
    alone = jax.jit(one.apply)(first, x, None)
    assert not np.allclose(alone, x, atol=1e-3)
    np.testing.assert_allclose(jax.jit(two.apply)(params, x, keys), alone, atol=1e-5)


def test_droplayer_drops_whole_rows_at_its_rate() -> None:
    x = jnp.ones((400, 2, 16)) * jnp.linspace(-1, 1, 16)[None, None]
    model = _transformer(num_layers=2, droplayer_rate=0.5)
    params = jax.eval_shape(model.init, jax.random.key(0), x[:1], None)
    # The attention of the last layer alone speaks: silence everything else.
    blocks = jax.tree.map(lambda p: jnp.zeros(p.shape), params["params"]["blocks"])
    blocks["out"]["bias"] = blocks["out"]["bias"].at[1].set(1.0)
    keys = jax.random.split(jax.random.key(3), 400)
    added = np.asarray(jax.jit(model.apply)({"params": {"blocks": blocks}}, x, keys) - x)
    per_row = added.reshape(400, -1)
    assert np.ptp(per_row, axis=1).max() < 1e-6, "a row is kept or dropped as a whole"
    assert set(np.unique(per_row.round(5))) == {0.0, 1.0}
    assert abs(per_row[:, 0].mean() - 0.5) < 0.1


def test_dropout_keeps_the_mean() -> None:
    x = jnp.zeros((64, 8, 16))
    model = _transformer(num_layers=1, dropout_rate=0.25)
    params = jax.eval_shape(model.init, jax.random.key(0), x[:1], None)
    blocks = jax.tree.map(lambda p: jnp.zeros(p.shape), params["params"]["blocks"])
    blocks["out"]["bias"] = jnp.ones_like(blocks["out"]["bias"])
    keys = jax.random.split(jax.random.key(3), 64)
    out = np.asarray(jax.jit(model.apply)({"params": {"blocks": blocks}}, x, keys))
    np.testing.assert_allclose(np.unique(out.round(5)), [0.0, 1.33333])
    assert abs(out.mean() - 1) < 0.05


def test_unit_length_has_a_gradient_at_zero() -> None:
    gradient = jax.grad(lambda x: unit_length(x).sum())(jnp.zeros(4))
    assert jnp.isfinite(gradient).all()
    np.testing.assert_allclose(unit_length(jnp.array([3.0, 4.0])), [0.6, 0.8], atol=1e-5)


def test_class_scores_follow_the_formula() -> None:
    """(cos + shift) · (elu(scale) + 1), shift and scale of each token."""
    rng = np.random.default_rng(4)
    head = ClassHead(embedding_dim=6, prior=0.01, initial_scale=1.0, dtype=jnp.float32)
    tokens, queries = rng.normal(size=(1, 3, 5)), rng.normal(size=(1, 2, 6))
    params = head.init(
        jax.random.key(0), jnp.zeros((1, 3, 5)), jnp.zeros((1, 2, 6)), jnp.ones((1, 2), bool)
    )["params"]
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    ours, embeddings = head.apply(
        {"params": params},
        jnp.asarray(tokens, jnp.float32),
        jnp.asarray(queries, jnp.float32),
        jnp.ones((1, 2), bool),
    )

    def dense(name: str) -> np.ndarray:
        layer = params[name]
        return tokens[0] @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])

    raw = dense("embedding")
    image = raw / np.linalg.norm(raw, axis=-1, keepdims=True)
    text = queries[0] / np.linalg.norm(queries[0], axis=-1, keepdims=True)
    shift, scale = dense("logit_shift"), dense("logit_scale")
    factor = np.where(scale > 0, scale, np.expm1(scale)) + 1
    np.testing.assert_allclose(ours[0], (image @ text.T + shift) * factor, atol=1e-4)
    np.testing.assert_allclose(embeddings[0], image, atol=1e-5)


@pytest.mark.parametrize("initial_scale", [1.0, 4.0])
def test_the_initial_score_is_the_prior(initial_scale: float) -> None:
    head = ClassHead(embedding_dim=6, prior=0.01, initial_scale=initial_scale, dtype=jnp.float32)
    tokens, queries, is_query = jnp.zeros((1, 3, 5)), jnp.zeros((1, 2, 6)), jnp.ones((1, 2), bool)
    params = head.init(jax.random.key(0), tokens, queries, is_query)
    logits, _ = head.apply(params, tokens, queries, is_query)
    np.testing.assert_allclose(jax.nn.sigmoid(logits), 0.01, rtol=1e-4)
