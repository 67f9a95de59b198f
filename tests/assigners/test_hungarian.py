"""The assignment against SciPy's, on everything a training step may hand it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from owl_det.assigners.hungarian import FORBIDDEN, optimal_pairs
from owl_det.config import LossConfig
from owl_det.losses.focal import focal_terms

SHAPES = [(7, 3), (3, 7), (5, 5), (12, 1), (1, 4), (40, 25), (30, 30)]
_assign = jax.jit(optimal_pairs)


def _check(cost: np.ndarray, is_instance: np.ndarray) -> None:
    result = jax.tree.map(np.asarray, _assign(jnp.asarray(cost), jnp.asarray(is_instance)))
    real = np.flatnonzero(is_instance)
    clean = np.where(np.isfinite(cost), cost, FORBIDDEN)[:, real].astype(np.float64)
    rows, columns = linear_sum_assignment(clean)
    assert result.is_matched.sum() == min(len(cost), len(real)) == len(rows)
    assert not result.is_matched[~is_instance].any()
    matched = np.flatnonzero(result.is_matched)
    predictions = result.prediction[matched]
    assert len(set(predictions.tolist())) == len(predictions), "a prediction is matched twice"
    ours = np.where(np.isfinite(cost), cost, FORBIDDEN)[predictions, matched].sum(dtype=np.float64)
    np.testing.assert_allclose(ours, clean[rows, columns].sum(), rtol=1e-5, atol=1e-4)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 2**32 - 1), st.sampled_from(["real", "tied", "bad"]))
def test_equals_scipy(shape: tuple[int, int], seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    cost = rng.normal(size=shape).astype(np.float32) * 3
    if kind == "tied":
        cost = rng.integers(0, 3, shape).astype(np.float32)
    if kind == "bad":
        cost[rng.random(shape) < 0.3] = rng.choice([np.nan, np.inf, -np.inf])
    _check(cost, rng.random(shape[1]) < 0.7)


@pytest.mark.parametrize("num_instances", [0, 2, 6])
def test_many_predictions(num_instances: int) -> None:
    rng = np.random.default_rng(0)
    _check(rng.normal(size=(300, 6)).astype(np.float32), np.arange(6) < num_instances)


def test_no_instance_slots() -> None:
    result = optimal_pairs(jnp.zeros((2, 5, 0)), jnp.zeros((2, 0), bool))
    assert result.prediction.shape == (2, 0)


def test_batches_are_independent() -> None:
    rng = np.random.default_rng(1)
    cost = rng.normal(size=(4, 9, 5)).astype(np.float32)
    is_instance = rng.random((4, 5)) < 0.6
    together = _assign(jnp.asarray(cost), jnp.asarray(is_instance))
    for i in range(4):
        alone = _assign(jnp.asarray(cost[i]), jnp.asarray(is_instance[i]))
        np.testing.assert_array_equal(together.is_matched[i], alone.is_matched)
        np.testing.assert_array_equal(together.prediction[i], alone.prediction)


def test_a_finished_example_waits_for_the_others() -> None:
    """One takes its cheapest columns, every one of them; in the other all rows want the same."""
    easy, crowded = 1 - np.eye(4), np.tile(np.arange(4.0)[:, None], (1, 4)) + np.eye(4) / 8
    cost = np.stack([easy, crowded]).astype(np.float32)
    result = _assign(jnp.asarray(cost), jnp.ones((2, 4), bool))
    np.testing.assert_array_equal(result.prediction[0], np.arange(4))
    assert sorted(np.asarray(result.prediction[1]).tolist()) == [0, 1, 2, 3]
    best = cost[1][linear_sum_assignment(cost[1])].sum()
    assert cost[1][result.prediction[1], np.arange(4)].sum() == best


def test_crowds_of_equal_candidates() -> None:
    """Instances in groups that want the same few predictions: long paths of changes."""
    rng = np.random.default_rng(3)
    group = rng.integers(4, size=60)
    cost = rng.normal(size=(80, 4))[:, group] + rng.normal(0, 1e-3, (80, 60))
    _check(cost.astype(np.float32), rng.random(60) < 0.9)


def test_focal_terms_follow_the_paper() -> None:
    config = LossConfig()
    logits = np.random.default_rng(2).normal(size=50) * 4
    p = 1 / (1 + np.exp(-logits))
    positive, negative = focal_terms(
        jnp.asarray(logits, jnp.float32), config.focal_alpha, config.focal_gamma
    )
    np.testing.assert_allclose(positive, -0.3 * (1 - p) ** 2 * np.log(p), rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(negative, -0.7 * p**2 * np.log(1 - p), rtol=2e-4, atol=1e-7)
