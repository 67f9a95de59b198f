"""Which instance each prediction stands for, and so what it should be.

`config.loss.assigner` chooses the assigner; losses see its decision from the predictions' side, so
that one-to-one matching and the assigners of dense detectors, which give an instance several
predictions, share every loss.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from owl_det.assigners import hungarian
from owl_det.assigners.pairs import assignment_of
from owl_det.config import LossConfig
from owl_det.types import IGNORED, Assignment, Predictions, PredictionTargets, Targets


def _hungarian(predictions: Predictions, targets: Targets, config: LossConfig) -> Assignment:
    pairs = hungarian.match(predictions, targets, config)
    return assignment_of(pairs, predictions.boxes.shape[-2])


# By `config.loss.assigner.kind`.
ASSIGNERS: dict[str, Callable[[Predictions, Targets, LossConfig], Assignment]] = {
    "hungarian": _hungarian,
}


def assign(predictions: Predictions, targets: Targets, config: LossConfig) -> Assignment:
    """Assigns the instances of each image to its predictions. Carries no gradient."""
    predictions, targets = jax.lax.stop_gradient((predictions, targets))
    return ASSIGNERS[config.assigner.kind](predictions, targets, config)


def prediction_targets(assignment: Assignment, targets: Targets) -> PredictionTargets:
    """Labels, box and weight of each prediction."""
    instance = assignment.instance
    if targets.boxes.shape[-2] == 0:  # no slot for an instance: nothing to gather from
        return PredictionTargets(
            labels=jnp.zeros((*instance.shape, targets.is_query.shape[-1]), bool),
            boxes=jnp.zeros((*instance.shape, 4)),
            weight=jnp.zeros(instance.shape),
            is_counted=instance != IGNORED,
        )
    is_positive, row = instance >= 0, jnp.maximum(instance, 0)[..., None]
    # A name of the instance may have been left out of the image's queries.
    is_name = targets.labels & targets.is_query[..., None, :]
    labels = jnp.take_along_axis(is_name, row, axis=-2) & is_positive[..., None]
    return PredictionTargets(
        labels=labels,
        boxes=jnp.take_along_axis(targets.boxes, row, axis=-2),
        weight=is_positive.astype(jnp.float32),
        is_counted=instance != IGNORED,
    )
