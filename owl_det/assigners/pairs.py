"""One instance, one prediction: pairs seen from the instances, and the same from the predictions.

Both directions compare indices and reduce, which compiles to plain loops: a scatter would run one
update after the other on most devices.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from owl_det.types import BACKGROUND, Assignment


class Pairs(NamedTuple):
    """A prediction for each instance."""

    prediction: Int[Array, "*b m"]  # index; 0 where there is none
    is_matched: Bool[Array, "*b m"]


def assignment_of(pairs: Pairs, num_predictions: int) -> Assignment:
    """The same pairs from the side of the predictions; those in none are background."""
    if pairs.prediction.shape[-1] == 0:
        shape = (*pairs.prediction.shape[:-1], num_predictions)
        return Assignment(instance=jnp.full(shape, BACKGROUND, jnp.int32))
    # Row: a prediction; column: an instance.
    shape = (*pairs.prediction.shape[:-1], num_predictions, pairs.prediction.shape[-1])
    row, column = (lax.broadcasted_iota(jnp.int32, shape, len(shape) - i) for i in (2, 1))
    is_pair = (pairs.prediction[..., None, :] == row) & pairs.is_matched[..., None, :]
    return Assignment(instance=jnp.where(is_pair, column, BACKGROUND).max(-1))


def first_pairs(assignment: Assignment, num_instances: int) -> Pairs:
    """The first prediction that stands for each instance, where there is any."""
    num_predictions = assignment.instance.shape[-1]
    # Row: an instance; column: a prediction.
    shape = (*assignment.instance.shape[:-1], num_instances, num_predictions)
    row, column = (lax.broadcasted_iota(jnp.int32, shape, len(shape) - i) for i in (2, 1))
    is_its = assignment.instance[..., None, :] == row
    first = jnp.where(is_its, column, num_predictions).min(-1)
    is_matched = first < num_predictions
    return Pairs(prediction=jnp.where(is_matched, first, 0), is_matched=is_matched)
