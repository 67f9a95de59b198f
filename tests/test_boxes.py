"""Box arithmetic against plain loops over Python floats, and its behaviour at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owl_det import boxes as box_lib


def random_boxes(seed, *shape):
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 0.7, (*shape, 2))
    return np.concatenate([low, low + rng.uniform(0.01, 0.5, (*shape, 2))], -1).astype(np.float32)


def overlap(a, b):
    """(intersection, union, hull) of two boxes, from the lengths of their sides."""

    def side(index):
        a0, a1, b0, b1 = (float(v) for v in (a[index], a[index + 2], b[index], b[index + 2]))
        return max(0.0, min(a1, b1) - max(a0, b0)), max(a1, b1) - min(a0, b0)

    (x, hull_x), (y, hull_y) = side(0), side(1)
    sizes = [float((box[2] - box[0]) * (box[3] - box[1])) for box in (a, b)]
    return x * y, sum(sizes) - x * y, hull_x * hull_y


def test_pairs_equal_loops():
    a, b = random_boxes(0, 2, 5), random_boxes(1, 2, 4)
    iou, union = box_lib.pairwise_iou(jnp.array(a), jnp.array(b))
    giou = box_lib.pairwise_giou(jnp.array(a), jnp.array(b))
    ioa = box_lib.pairwise_ioa(jnp.array(a), jnp.array(b))
    assert iou.shape == union.shape == giou.shape == ioa.shape == (2, 5, 4)
    assert np.count_nonzero(iou) > 5 and np.count_nonzero(iou == 0) > 5
    for batch, i, j in np.ndindex(2, 5, 4):
        inter, both, hull = overlap(a[batch, i], b[batch, j])
        at = batch, i, j
        own = float(np.prod(a[batch, i, 2:] - a[batch, i, :2]))
        assert float(iou[at]) == pytest.approx(inter / both, abs=1e-5)
        assert float(union[at]) == pytest.approx(both, abs=1e-5)
        assert float(giou[at]) == pytest.approx(inter / both - (hull - both) / hull, abs=1e-5)
        assert float(ioa[at]) == pytest.approx(inter / own, abs=1e-5)


def test_paired_is_the_diagonal_of_pairwise():
    a, b = jnp.array(random_boxes(2, 3, 6)), jnp.array(random_boxes(3, 3, 6))
    iou, union = jax.jit(box_lib.iou_paired)(a, b)
    all_iou, all_union = jax.jit(box_lib.pairwise_iou)(a, b)
    diagonal = jnp.arange(6)
    np.testing.assert_allclose(iou, all_iou[:, diagonal, diagonal], atol=1e-6)
    np.testing.assert_allclose(union, all_union[:, diagonal, diagonal], atol=1e-6)
    pairwise = jax.jit(box_lib.pairwise_giou)(a, b)[:, diagonal, diagonal]
    np.testing.assert_allclose(jax.jit(box_lib.giou_paired)(a, b), pairwise, atol=1e-6)


def test_formats_round_trip_and_known_value():
    corners = jnp.array([[0.1, 0.2, 0.5, 0.8]])
    np.testing.assert_allclose(box_lib.xyxy_to_cxcywh(corners), [[0.3, 0.5, 0.4, 0.6]], atol=1e-6)
    boxes = jnp.array(random_boxes(4, 2, 3, 7))
    round_trip = box_lib.cxcywh_to_xyxy(box_lib.xyxy_to_cxcywh(boxes))
    np.testing.assert_allclose(round_trip, boxes, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_giou_properties(seed):
    a, b = jnp.array(random_boxes(seed, 8)), jnp.array(random_boxes(seed + 1, 8))
    giou = box_lib.pairwise_giou(a, b)
    assert (giou >= -1 - 1e-6).all() and (giou <= 1 + 1e-6).all()
    assert (giou <= box_lib.pairwise_iou(a, b)[0] + 1e-6).all()
    np.testing.assert_allclose(giou, box_lib.pairwise_giou(b, a).T, atol=1e-6)
    np.testing.assert_allclose(box_lib.giou_paired(a, a), 1, atol=1e-5)


def test_giou_falls_with_distance():
    a = jnp.array([[0.0, 0.0, 0.1, 0.1]])
    shifts = jnp.linspace(0.2, 0.9, 8)[:, None] * jnp.ones((1, 4))
    giou = np.asarray(box_lib.pairwise_giou(a, a + shifts))[0]
    assert (np.diff(giou) < 0).all() and giou[0] < 0


def test_swapped_corners_have_no_area():
    assert box_lib.area(jnp.array([0.5, 0.5, 0.2, 0.2])) == 0
    assert box_lib.area(jnp.array([0.5, 0.1, 0.2, 0.9])) == 0


DEGENERATE = [
    [0.5, 0.5, 0.5, 0.5],  # a point
    [0.2, 0.5, 0.8, 0.5],  # a line
    [0.0, 0.0, 0.0, 0.0],  # padding
    [0.6, 0.6, 0.4, 0.4],  # swapped corners
    [0.5, 0.5, 0.5 + 1e-7, 0.5 + 1e-7],
    [0.0, 0.0, 1e-15, 1e-15],  # area² underflows
    [0.0, 0.0, 1e-30, 1e-30],  # area underflows
]


def test_degenerate_boxes_overlap_nothing():
    degenerate, real = jnp.array(DEGENERATE), jnp.array([[0.1, 0.1, 0.9, 0.9]])
    everything = jnp.concatenate([degenerate, real])
    iou, _ = box_lib.pairwise_iou(degenerate, everything)
    np.testing.assert_allclose(iou, 0, atol=1e-6)
    assert jnp.isfinite(box_lib.pairwise_giou(degenerate, everything)).all()
    ioa = box_lib.pairwise_ioa(degenerate, everything)
    np.testing.assert_array_equal(ioa, 0)


@pytest.mark.parametrize("name", ["pairwise_iou", "pairwise_giou", "pairwise_ioa"])
def test_gradients_are_finite_also_for_degenerate_boxes(name):
    boxes = jnp.concatenate([jnp.array(DEGENERATE), jnp.array(random_boxes(6, 4))])

    def total(a, b):
        result = getattr(box_lib, name)(a, b)
        return jax.tree.leaves(result)[0].sum()

    for gradient in jax.jit(jax.grad(total, argnums=(0, 1)))(boxes, boxes):
        assert jnp.isfinite(gradient).all()
        assert jnp.abs(gradient).max() > 0


def test_giou_gradient_pulls_separate_boxes_together():
    a, b = jnp.array([0.1, 0.1, 0.2, 0.2]), jnp.array([0.6, 0.1, 0.7, 0.2])
    gradient = jax.grad(lambda box: box_lib.giou_paired(box, b))(a)
    assert gradient[2] > 0  # the right side of the left box should move right


def test_arithmetic_is_float32():
    boxes = jnp.array(random_boxes(7, 3)).astype(jnp.bfloat16)
    for name in ("pairwise_iou", "pairwise_giou", "pairwise_ioa", "iou_paired", "giou_paired"):
        result = jax.jit(getattr(box_lib, name))(boxes, boxes)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(result))
    for convert in (box_lib.cxcywh_to_xyxy, box_lib.xyxy_to_cxcywh, box_lib.area):
        assert convert(boxes).dtype == jnp.float32


def test_no_boxes_give_empty_arrays():
    assert box_lib.pairwise_giou(jnp.zeros((2, 0, 4)), jnp.zeros((2, 3, 4))).shape == (2, 0, 3)
