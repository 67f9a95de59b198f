"""Pooling over boxes against a plain loop over samples, and what both poolings promise."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from owl_det.modeling import region_pool
from owl_det.types import FeatureLevel

# Compiled as a whole: operation by operation they take many times as long.
_region_embeddings = jax.jit(region_pool.region_embeddings, static_argnums=(2, 3))
_kept_region_embeddings = jax.jit(region_pool.kept_region_embeddings)
_mask_embeddings = jax.jit(region_pool.mask_embeddings)
_roi_weights = jax.jit(region_pool.roi_weights, static_argnums=1)


def _bilinear(grid: np.ndarray, y: float, x: float) -> np.ndarray:
    """torchvision's: the border goes on up to one token beyond the outermost centres."""
    h, w = grid.shape[:2]
    if y < -1 or y > h or x < -1 or x > w:
        return np.zeros(grid.shape[2])
    y, x = max(y, 0.0), max(x, 0.0)
    y0, x0 = min(int(y), h - 1), min(int(x), w - 1)
    y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
    fy, fx = (y - y0 if y1 > y0 else 0.0), (x - x0 if x1 > x0 else 0.0)
    top = grid[y0, x0] * (1 - fx) + grid[y0, x1] * fx
    bottom = grid[y1, x0] * (1 - fx) + grid[y1, x1] * fx
    return top * (1 - fy) + bottom * fy


def _roi_align(grid: np.ndarray, box_xyxy: np.ndarray) -> np.ndarray:
    """`roi_align(output_size=1, sampling_ratio=-1, aligned=True)`; the box is in tokens."""
    left, top = box_xyxy[:2] - 0.5
    width, height = box_xyxy[2:] - box_xyxy[:2]
    rows, columns = math.ceil(height), math.ceil(width)
    samples = [
        _bilinear(grid, top + (i + 0.5) * height / rows, left + (j + 0.5) * width / columns)
        for i in range(rows)
        for j in range(columns)
    ]
    return np.mean(samples, axis=0)


def _boxes(rng: np.random.Generator, num_boxes: int) -> np.ndarray:
    """Corners, of all sizes from a tenth of a token to the whole grid."""
    low, high = np.sort(rng.uniform(0, 1, (2, num_boxes, 2)), axis=0)
    small = low + rng.uniform(0.02, 0.3, low.shape) * (1 - low)
    corners = np.concatenate([low, np.where(rng.random(low.shape) < 0.5, small, high)], axis=1)
    corners[0] = 0, 0, 1, 1
    return corners


def _cxcywh(corners: np.ndarray) -> jax.Array:
    low, high = corners[..., :2], corners[..., 2:]
    return jnp.asarray(np.concatenate([(low + high) / 2, high - low], -1), jnp.float32)


def test_weights_make_roi_align() -> None:
    rng = np.random.default_rng(0)
    h, w = 5, 8
    grid, corners = rng.normal(size=(h, w, 3)), _boxes(rng, 60)
    rows, columns = jax.jit(region_pool.roi_weights, static_argnums=1)(_cxcywh(corners), (h, w))
    ours = np.einsum("rh,rw,hwe->re", rows, columns, grid)
    wanted = np.array([_roi_align(grid, box * [w, h, w, h]) for box in corners])
    np.testing.assert_allclose(ours, wanted, atol=1e-4)
    np.testing.assert_allclose(rows.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(columns.sum(-1), 1, atol=1e-5)


def test_a_box_of_whole_tokens_is_their_mean() -> None:
    """Thirds and sevenths of a grid are no exact float32 numbers."""
    for size in (21, 42, 63):
        cells = np.array([[0, 0, 1 / 3, 1], [1 / 3, 0, 2 / 3, 1], [3 / 7, 0, 4 / 7, 1]])
        _, columns = _roi_weights(_cxcywh(cells), (size, size))
        for weights, cell in zip(np.asarray(columns), cells, strict=True):
            first, last = round(cell[0] * size), round(cell[2] * size)
            wanted = np.zeros(size)
            wanted[first:last] = 1 / (last - first)
            np.testing.assert_allclose(weights, wanted, atol=1e-4)


def test_boxes_are_cut_at_the_grid_and_may_be_empty() -> None:
    corners = np.array([[-0.5, -0.5, 0.5, 0.5], [0.3, 0.3, 0.3, 0.3], [0.0, 0.0, 0.0, 0.0]])
    rows, _ = _roi_weights(_cxcywh(corners), (4, 4))
    wanted = [[0.5, 0.5, 0, 0], [0.3, 0.7, 0, 0], [1, 0, 0, 0]]
    np.testing.assert_allclose(rows, wanted, atol=1e-5)


def test_region_embeddings_are_of_unit_length_before_and_after() -> None:
    """A long token counts no more than a short one."""
    tokens = np.zeros((1, 4, 2), np.float32)
    tokens[0, :, 0] = [100, 0, 1, 0]
    tokens[0, :, 1] = [0, 1, 0, 1]
    left, whole = [0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]
    boxes = jnp.asarray([[left, whole]])
    found = _region_embeddings(jnp.asarray(tokens), boxes, 2, 2)
    np.testing.assert_allclose(found[0], [[1, 0], [0.5**0.5, 0.5**0.5]], atol=1e-5)


def test_mask_embeddings_average_the_tokens_inside() -> None:
    rng = np.random.default_rng(2)
    tokens = rng.normal(size=(2, 6, 4)).astype(np.float32)
    is_inside = rng.random((2, 3, 6)) < 0.5
    is_inside[:, 0], is_inside[:, 1, 0], is_inside[:, 2] = False, True, True
    found = _mask_embeddings(jnp.asarray(tokens), jnp.asarray(is_inside))
    unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    for b in range(2):
        np.testing.assert_array_equal(found[b, 0], 0)
        for r in (1, 2):
            mean = unit[b, is_inside[b, r]].mean(0)
            np.testing.assert_allclose(found[b, r], mean / np.linalg.norm(mean), atol=1e-5)


def test_the_gradient_is_finite_for_fillers() -> None:
    boxes = jnp.zeros((1, 2, 4))

    def loss(tokens: jax.Array) -> jax.Array:
        by_box = _region_embeddings(tokens, boxes, 2, 2)
        by_mask = _mask_embeddings(tokens, jnp.zeros((1, 2, 4), bool))
        return by_box.sum() + by_mask.sum()

    assert jnp.isfinite(jax.grad(loss)(jnp.ones((1, 4, 3)))).all()


def test_kept_tokens_are_pooled_at_their_place_in_the_grid() -> None:
    """A grid that is not square, in an order of its own, with tokens missing: a plain loop."""
    rng = np.random.default_rng(3)
    h, w, e = 3, 5, 4
    tokens, corners = rng.normal(size=(2, h * w, e)).astype(np.float32), _boxes(rng, 12)
    boxes = jnp.tile(_cxcywh(corners)[None], (2, 1, 1))
    order = np.stack([rng.permutation(h * w) for _ in range(2)])
    whole = _region_embeddings(jnp.asarray(tokens), boxes, h, w)
    shuffled = jnp.asarray(np.stack([tokens[i, order[i]] for i in range(2)]))

    def level(count: int) -> FeatureLevel:
        kept = jnp.asarray(order[:, :count])
        return FeatureLevel(tokens=shuffled[:, :count], token_index=kept, grid=(h, w), stride=8)

    found, is_there = _kept_region_embeddings(level(h * w), boxes)
    assert bool(is_there.all())
    np.testing.assert_allclose(found, whole, atol=1e-5)

    index = order[:, :6]
    found, is_there = _kept_region_embeddings(level(6), boxes)
    rows, columns = (np.asarray(x) for x in _roi_weights(boxes, (h, w)))
    for i in range(2):
        for r in range(len(corners)):
            total = np.zeros(e)
            for token in index[i]:
                weight = rows[i, r, token // w] * columns[i, r, token % w]
                vector = tokens[i, token]
                total += weight * vector / np.linalg.norm(vector)
            assert bool(is_there[i, r]) == (np.abs(total).max() > 0)
            wanted = total / max(np.linalg.norm(total), 1e-12)
            # The length has a small number added, which counts where only a corner is there.
            np.testing.assert_allclose(found[i, r], wanted, atol=1e-3)
