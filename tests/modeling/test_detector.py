"""The detector as a whole: dtypes, compilation switches, masked queries, selection."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from owl_det.config import SelectionConfig
from owl_det.modeling.heads import MASKED_LOGIT, box_bias
from owl_det.modeling.owl import OwlDetector
from owl_det.types import Predictions
from tests import tiny

RNG = np.random.default_rng(0)
IMAGE = jnp.asarray(RNG.integers(0, 256, (2, 32, 32, 3)), jnp.uint8)
TOKENS = jnp.asarray(
    [[[49406, 7 * i + j + 1, 49407, 0, 0, 0, 0, 0] for j in range(3)] for i in range(2)], jnp.int32
)
IS_QUERY = jnp.array([[True, True, True], [True, True, False]])


def _detector(**model: Any) -> OwlDetector:
    config = tiny.config()
    return OwlDetector(dataclasses.replace(config.model, **model), config.preprocess)


@functools.partial(jax.jit, static_argnums=0)
def _predict(detector: OwlDetector, params: Any) -> Predictions:
    return detector.apply({"params": params}, IMAGE, TOKENS, IS_QUERY)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _features(
    detector: OwlDetector, params: Any, image: jax.Array, selection: Any = None, keys: Any = None
) -> Any:
    return detector.apply({"params": params}, image, selection, keys, method="encode_image")


@pytest.fixture(scope="module")
def params() -> Any:
    return tiny.params(tiny.config())


def test_shapes_and_ranges(params: Any) -> None:
    out = _predict(_detector(), params)
    assert out.boxes.shape == (2, 16, 4) and out.class_logits.shape == (2, 16, 3)
    assert (out.boxes > 0).all() and (out.boxes < 1).all()
    np.testing.assert_allclose(jnp.linalg.norm(out.class_embeddings, axis=-1), 1, atol=1e-5)
    np.testing.assert_array_equal(out.token_index, np.tile(np.arange(16), (2, 1)))
    assert out.token_index.dtype == jnp.int32


def test_bfloat16_computes_in_bfloat16_and_ends_in_float32(params: Any) -> None:
    detector = _detector(dtype="bfloat16")
    fresh = jax.eval_shape(detector.init, jax.random.key(0), IMAGE, TOKENS, IS_QUERY)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {np.dtype(np.float32)}
    assert _features(detector, params, IMAGE).tokens.dtype == jnp.bfloat16
    ours, exact = _predict(detector, params), _predict(_detector(), params)
    for name in ("boxes", "class_logits", "class_embeddings", "objectness_logits"):
        assert getattr(ours, name).dtype == jnp.float32, name
        np.testing.assert_allclose(getattr(ours, name), getattr(exact, name), rtol=0.05, atol=0.1)
    assert not np.array_equal(ours.class_logits, exact.class_logits)


@functools.partial(jax.jit, static_argnums=0)
def _gradient(detector: OwlDetector, params: Any) -> Any:
    def loss(p: Any) -> jax.Array:
        out = detector.apply({"params": p}, IMAGE, TOKENS, IS_QUERY)
        return (out.boxes * out.class_logits[..., :1]).sum() + out.objectness_logits.sum()

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize(
    "switches",
    [
        pytest.param({"scan_unroll": 2}, marks=pytest.mark.nightly),
        {"remat": "full"},
        pytest.param({"remat": "dots", "scan_unroll": 5}, marks=pytest.mark.slow),
    ],
)
def test_compilation_switches_change_nothing(params: Any, switches: dict[str, Any]) -> None:
    value, gradient = _gradient(_detector(), params)
    again, gradient_again = _gradient(_detector(**switches), params)
    np.testing.assert_allclose(again, value, rtol=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(gradient_again), jax.tree.leaves(gradient), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_masked_queries_get_the_masked_logit_and_change_no_other(params: Any) -> None:
    detector = _detector()
    out = _predict(detector, params)
    assert (out.class_logits[1, :, 2] == MASKED_LOGIT).all()
    apply = jax.jit(lambda p, is_query: detector.apply({"params": p}, IMAGE, TOKENS, is_query))
    everything = apply(params, jnp.ones_like(IS_QUERY))
    real = np.broadcast_to(np.asarray(IS_QUERY)[:, None, :], out.class_logits.shape)
    assert (everything.class_logits > MASKED_LOGIT / 2).all()
    np.testing.assert_allclose(out.class_logits[real], everything.class_logits[real], atol=1e-5)


@pytest.mark.parametrize("kind", ["both", "location", "none"])
def test_an_untrained_box_stands_at_its_patch(params: Any, kind: str) -> None:
    """With a silent head the bias alone decides: bottom-right corner and size of the patch."""
    silent = {**params, "box_head": jax.tree.map(jnp.zeros_like, params["box_head"])}
    boxes = _predict(_detector(box_bias=kind), silent).boxes[0]
    row, column = np.divmod(np.arange(16), 4)
    corner = np.stack([(column + 1) / 4, (row + 1) / 4], -1)
    wanted = corner if kind != "none" else np.full((16, 2), 0.5)
    np.testing.assert_allclose(boxes[:, :2], wanted, atol=2e-4)
    size = 0.25 if kind == "both" else 0.5
    np.testing.assert_allclose(boxes[:, 2:], size, atol=2e-4)


def test_predict_keeps_the_tokens_of_highest_objectness(params: Any) -> None:
    detector = _detector()
    features = _features(detector, params, IMAGE)
    queries = jnp.asarray(RNG.normal(size=(2, 3, 16)), jnp.float32)

    def predict(top_k: int) -> Predictions:
        return detector.apply(
            {"params": params}, features, queries, IS_QUERY, instance_top_k=top_k, method="predict"
        )

    dense = predict(0)
    for everything in (16, 99):
        for ours, theirs in zip(
            jax.tree.leaves(predict(everything)), jax.tree.leaves(dense), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
    few = predict(5)
    for image in range(2):
        wanted = np.argsort(-np.asarray(dense.objectness_logits[image]))[:5]
        np.testing.assert_array_equal(few.token_index[image], wanted)
        for name in ("boxes", "class_logits", "objectness_logits"):
            np.testing.assert_allclose(
                getattr(few, name)[image], getattr(dense, name)[image][wanted], atol=1e-5
            )


def test_inference_is_deterministic_and_drops_nothing(params: Any) -> None:
    config = tiny.config(
        selection={"token_drop_rate": 0.5, "instance_top_k": 4},
        model__image__dropout_rate=0.5,
        model__text__dropout_rate=0.5,
        model__image__droplayer_rate=0.9,
    )
    detector = OwlDetector(config.model, config.preprocess)
    noisy = _predict(detector, params)
    plain = _predict(_detector(), params)
    assert noisy.boxes.shape == (2, 16, 4)
    np.testing.assert_array_equal(noisy.class_logits, plain.class_logits)
    keys = jax.random.split(jax.random.key(1), 2)
    trained = _features(detector, params, IMAGE, config.selection, keys)
    assert trained.tokens.shape[1] == 8
    with pytest.raises(ValueError, match="row_keys"):
        detector.apply({"params": params}, IMAGE, config.selection, method="encode_image")


def test_a_training_row_does_not_depend_on_its_neighbours(params: Any) -> None:
    """What makes the step the same on any number of devices: noise belongs to the row's key."""
    config = tiny.config(
        selection={"token_drop_rate": 0.5},
        model__image__dropout_rate=0.3,
        model__image__droplayer_rate=0.5,
    )
    detector = OwlDetector(config.model, config.preprocess)
    keys = jax.random.split(jax.random.key(1), 2)
    together = _features(detector, params, IMAGE, config.selection, keys)
    swapped = _features(detector, params, IMAGE[::-1], config.selection, keys[::-1])
    places = [features.only_level.token_index for features in (together, swapped)]
    np.testing.assert_array_equal(places[0], places[1][::-1])
    np.testing.assert_allclose(together.tokens, swapped.tokens[::-1], atol=1e-5)
    other = _features(detector, params, IMAGE, config.selection, keys[::-1])
    assert not np.allclose(together.tokens, other.tokens, atol=1e-3)


def test_small_images_use_the_corner_of_the_grid(params: Any) -> None:
    """A lower resolution truncates the position grid, and boxes are relative to the small image."""
    detector = _detector()
    small = IMAGE[:, :16, :24]
    features = _features(detector, params, small)
    assert features.tokens.shape == (2, 6, 32)
    # The same tokens come out of a tower whose positions are cut to that corner beforehand.
    positions = params["image"]["position_embedding"]
    grid = positions[1:].reshape(4, 4, 32)
    moved = jnp.concatenate([positions[:1], jnp.roll(grid, 1, (0, 1)).reshape(16, 32)])
    shifted = {**params, "image": {**params["image"], "position_embedding": moved}}
    assert not np.allclose(_features(detector, shifted, small).tokens, features.tokens, atol=1e-3)
    outside = grid.at[2:].set(9.0).at[:, 3:].set(9.0).reshape(16, 32)
    changed = {
        **params,
        "image": {
            **params["image"],
            "position_embedding": jnp.concatenate([positions[:1], outside]),
        },
    }
    np.testing.assert_array_equal(_features(detector, changed, small).tokens, features.tokens)
    silent = {**params, "box_head": jax.tree.map(jnp.zeros_like, params["box_head"])}
    predictions = detector.apply(
        {"params": silent},
        features,
        jnp.zeros((2, 3, 16)),
        IS_QUERY,
        method="predict",
    )
    wanted = jax.nn.sigmoid(box_bias(2, 3, "both"))
    np.testing.assert_allclose(predictions.boxes[0], wanted, atol=1e-6)
    with pytest.raises(ValueError, match="larger than the position grid 4x4"):
        _features(detector, params, jnp.zeros((1, 40, 32, 3), jnp.uint8))


def test_no_selection_is_the_same_as_none(params: Any) -> None:
    detector, keys = _detector(), jax.random.split(jax.random.key(1), 2)
    plain = _features(detector, params, IMAGE)
    trained = _features(detector, params, IMAGE, SelectionConfig(token_drop_rate=0.0), keys)
    np.testing.assert_allclose(trained.tokens, plain.tokens, atol=1e-6)
