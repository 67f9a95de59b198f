"""Contrastive losses against plain NumPy loops."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from owl_det.losses import contrastive

B, E = 6, 8


def _case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    images, texts = rng.normal(size=(2, B, E))
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts)]
    return unit[0].astype(np.float32), unit[1].astype(np.float32)


def _call(function: Callable[..., jax.Array], *arrays: np.ndarray) -> jax.Array:
    return function(*(jnp.asarray(x) for x in arrays))


def _logits(images: np.ndarray, texts: np.ndarray, scale: float) -> np.ndarray:
    """Of unit vectors, as `Detector.similarity` makes them."""
    return scale * images @ texts.T


def _softmax_by_hand(logits: np.ndarray, rows: list[int]) -> list[float]:
    values = []
    for i in rows:
        image = -(logits[i, i] - np.log(sum(np.exp(logits[i, j]) for j in rows)))
        text = -(logits[i, i] - np.log(sum(np.exp(logits[j, i]) for j in rows)))
        values.append((image + text) / 2)
    return values


def test_softmax_equals_clip_over_the_real_rows() -> None:
    images, texts = _case(0)
    logits = _logits(images, texts, 7.0)
    is_example = np.array([True, True, False, True, True, False])
    found = _call(contrastive.softmax_loss, logits, np.eye(B, dtype=bool), is_example)
    by_hand = _softmax_by_hand(np.asarray(logits, np.float64), [0, 1, 3, 4])
    np.testing.assert_allclose(np.asarray(found)[is_example], by_hand, rtol=1e-5)
    assert not np.asarray(found)[~is_example].any()


def test_softmax_shares_the_target_among_equal_texts() -> None:
    images, texts = _case(1)
    texts[3] = texts[1]
    is_same = np.eye(B, dtype=bool)
    is_same[1, 3] = is_same[3, 1] = True
    logits = _logits(images, texts, 2.7)
    found = _call(contrastive.softmax_loss, logits, is_same, np.ones(B, bool))
    z = np.asarray(logits, np.float64)
    log_p = z[1] - np.log(np.exp(z[1]).sum())
    log_q = z[:, 1] - np.log(np.exp(z[:, 1]).sum())
    expected = -(log_p[1] + log_p[3] + log_q[1] + log_q[3]) / 4
    np.testing.assert_allclose(found[1], expected, rtol=1e-5)


def test_sigmoid_equals_siglip() -> None:
    images, texts = _case(2)
    bias = -3.0
    logits = _logits(images, texts, 10.0) + bias
    is_example = np.array([True] * 5 + [False])
    found = _call(contrastive.sigmoid_loss, logits, np.eye(B, dtype=bool), is_example)
    z = 10.0 * images.astype(np.float64) @ texts.T + bias
    for i in range(5):
        expected = sum(np.log1p(np.exp(-z[i, j] if i == j else z[i, j])) for j in range(5))
        np.testing.assert_allclose(found[i], expected, rtol=1e-4)
    assert found[5] == 0


def test_fillers_send_no_gradient() -> None:
    images, texts = _case(3)
    is_example = jnp.array([True] * 4 + [False] * 2)

    def loss(images: jax.Array, texts: jax.Array) -> jax.Array:
        logits = 7.0 * images @ texts.T
        same = jnp.eye(B, dtype=bool)
        return (
            contrastive.softmax_loss(logits, same, is_example)
            + contrastive.sigmoid_loss(logits, same, is_example)
        ).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.asarray(images), jnp.asarray(texts))
    for gradient in gradients:
        assert np.isfinite(gradient).all() and np.abs(gradient[:4]).min() > 0
        assert not np.asarray(gradient[4:]).any()


def test_accuracy_counts_the_same_words_as_right() -> None:
    logits = np.array([[1.0, 3.0, 0.0], [0.0, 2.0, 5.0], [0.0, 9.0, 1.0]])
    same = np.eye(3, dtype=bool)
    same[0, 1] = same[1, 0] = True
    found = _call(contrastive.accuracy, logits, same, np.array([True, True, True]))
    np.testing.assert_array_equal(found, [1.0, 0.0, 0.0])
    # The third text is a filler: it cannot be chosen.
    found = _call(contrastive.accuracy, logits, same, np.array([True, True, False]))
    np.testing.assert_array_equal(found[:2], [1.0, 1.0])
