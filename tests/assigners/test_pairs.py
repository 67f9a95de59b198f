"""Pairs seen from the instances and from the predictions: plain loops say the same."""

import jax.numpy as jnp
import numpy as np
import pytest

from owl_det.assigners.pairs import Pairs, assignment_of, first_pairs
from owl_det.types import BACKGROUND, IGNORED, Assignment


@pytest.mark.parametrize(("num_predictions", "num_instances"), [(7, 3), (3, 5), (4, 4), (5, 0)])
def test_both_sides_hold_the_same_pairs(num_predictions: int, num_instances: int) -> None:
    rng = np.random.default_rng(num_predictions)
    count = min(num_predictions, num_instances)
    prediction = np.zeros((2, num_instances), np.int32)
    is_matched = np.zeros((2, num_instances), bool)
    wanted = np.full((2, num_predictions), BACKGROUND)
    for image in range(2):
        own = rng.permutation(num_predictions)[:count]
        instances = rng.permutation(num_instances)[: count - image * bool(count)]
        for k, i in zip(own, instances, strict=False):
            prediction[image, i], is_matched[image, i], wanted[image, k] = k, True, i
    pairs = Pairs(jnp.asarray(prediction), jnp.asarray(is_matched))
    assignment = assignment_of(pairs, num_predictions)
    np.testing.assert_array_equal(assignment.instance, wanted)
    back = first_pairs(assignment, num_instances)
    np.testing.assert_array_equal(back.is_matched, is_matched)
    np.testing.assert_array_equal(back.prediction, np.where(is_matched, prediction, 0))


def test_the_first_of_several_predictions_stands_for_an_instance() -> None:
    instance = jnp.array([IGNORED, 2, BACKGROUND, 0, 2, 0])
    pairs = first_pairs(Assignment(instance=instance), 4)
    np.testing.assert_array_equal(pairs.prediction, [3, 0, 1, 0])
    np.testing.assert_array_equal(pairs.is_matched, [True, False, True, False])
