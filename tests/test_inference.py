"""Detection with a frozen model, against the same computed prompt by prompt in NumPy."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines import image_ops
from owl_det import inference, train_step
from owl_det.modeling.detector import Detector
from tests import tiny

RNG = np.random.default_rng(0)
IMAGE = jnp.asarray(RNG.integers(0, 256, (2, 32, 32, 3)), jnp.uint8)
PROMPTS = jnp.asarray(RNG.normal(size=(3, 4, 16)), jnp.float32)  # three prompts of four queries
IS_QUERY = jnp.array([True, True, False, True])


@pytest.fixture(scope="module")
def model() -> tuple[Detector, Any]:
    config = tiny.config()
    return train_step.make_detector(config), train_step.init_params(config, jax.random.key(2))


def _detect(model: tuple[Detector, Any], prompts: jax.Array, top_k: int) -> inference.TopPairs:
    detector, params = model
    run = jax.jit(lambda p: inference.detect(detector, p, IMAGE, prompts, IS_QUERY, top_k=top_k))
    return jax.tree.map(np.asarray, run(params))


def test_probabilities_are_averaged_over_prompts(model: tuple[Detector, Any]) -> None:
    detector, params = model
    features = jax.jit(lambda p: detector.apply({"params": p}, IMAGE, method="encode_image"))(
        params
    )
    is_query = jnp.tile(IS_QUERY[None], (2, 1))
    scores, boxes = np.zeros((2, 16, 4)), None
    for prompt in PROMPTS:
        out: Any = detector.apply(
            {"params": params}, features, jnp.tile(prompt[None], (2, 1, 1)), is_query,
            method="predict",
        )  # fmt: skip
        scores += np.asarray(jax.nn.sigmoid(out.class_logits)) / 3
        boxes = np.asarray(out.boxes)
    assert boxes is not None
    top = _detect(model, PROMPTS, 10)
    assert top.scores.shape == (2, 10) and top.boxes_xyxy.shape == (2, 10, 4)
    for image in range(2):
        order = np.argsort(-scores[image].ravel(), kind="stable")[:10]
        np.testing.assert_allclose(top.scores[image], scores[image].ravel()[order], rtol=1e-4)
        token, query = np.divmod(order, 4)
        # Neighbours of nearly equal score may stand in either order.
        assert sorted(top.query[image]) == sorted(query)
        centre, half = boxes[image][token, :2], boxes[image][token, 2:] / 2
        wanted = np.concatenate([centre - half, centre + half], 1)
        np.testing.assert_allclose(np.sort(top.boxes_xyxy[image], 0), np.sort(wanted, 0), atol=1e-4)


def test_fillers_score_nothing_and_top_k_is_bounded(model: tuple[Detector, Any]) -> None:
    top = _detect(model, PROMPTS[:1], 1000)
    assert top.scores.shape == (2, 16 * 4)
    assert (np.diff(top.scores, axis=1) <= 0).all(), "best first"
    assert (top.scores[top.query == 2] == 0).all() and (top.query == 2).sum() == 32
    assert (top.scores[top.query != 2] > 0).all()


def test_queries_are_encoded_prompt_by_prompt(model: tuple[Detector, Any]) -> None:
    detector, params = model
    tokens = np.zeros((2, 3, 8), np.int32)
    tokens[..., 0], tokens[..., 2] = 49406, 49407
    tokens[..., 1] = np.arange(1, 7).reshape(2, 3)
    together = jax.jit(lambda p: inference.encode_queries(detector, p, jnp.asarray(tokens)))(params)
    assert together.shape == (2, 3, 16)
    alone = jax.jit(
        lambda p: detector.apply({"params": p}, jnp.asarray(tokens[1, 2:]), method="encode_text")
    )(params)
    np.testing.assert_allclose(together[1, 2], alone[0], atol=1e-5)


@pytest.mark.parametrize("geometry", ["pad", "stretch"])
@pytest.mark.parametrize(("height", "width"), [(40, 20), (20, 40), (33, 33)])
def test_pixel_boxes_undo_the_geometry(
    height: int, width: int, geometry: Literal["pad", "stretch"]
) -> None:
    pixels = np.array([[1, 2, 15, 18], [0, 0, width, height]], np.float32)
    cxcywh = image_ops.boxes_to_padded(pixels, height, width, geometry)
    half = cxcywh[:, 2:] / 2
    xyxy = np.concatenate([cxcywh[:, :2] - half, cxcywh[:, :2] + half], 1)
    back = inference.pixel_boxes(xyxy, height, width, geometry)
    np.testing.assert_allclose(back, pixels, atol=1e-4)
    beyond = np.array([[-0.5, -0.5, 2.0, 2.0]], np.float32)
    np.testing.assert_array_equal(
        inference.pixel_boxes(beyond, height, width, geometry), [[0, 0, width, height]]
    )
