"""The training loss of each example: matching, parts, weights, sum."""

import functools
import operator

import jax
from jaxtyping import Array, Float, Key

from owl_det.config import LossConfig, SelectionConfig
from owl_det.losses import detection
from owl_det.matching import match
from owl_det.types import Assignment, Predictions, Targets

WEIGHTED = ("class", "l1", "giou", "objectness")


def total_loss(
    predictions: Predictions,
    targets: Targets,
    config: LossConfig,
    selection: SelectionConfig,
    *,
    assignment: Assignment | None = None,
    keys: Key[Array, " b"] | None = None,
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """Weighted sum of the parts, and the unweighted parts and counts to log.

    `assignment` is the matching where it has been made already; `keys`, one of each image, are for
    `config.negative_share`.
    """
    assignment = match(predictions, targets, config) if assignment is None else assignment
    is_drawn = None
    if config.negative_share < 1:
        assert keys is not None
        labels = detection.matched_labels(targets, assignment, predictions.boxes.shape[-2])
        is_drawn = jax.vmap(detection.sample_negatives, (0, 0, None))(
            keys, labels.any(-1), config.negative_share
        )
    parts = detection.detection_losses(predictions, targets, assignment, config, is_drawn)
    if not selection.instance_top_k:
        # What selection would keep; OWLv2 keeps about 10 % of the tokens.
        top_k = max(1, predictions.boxes.shape[-2] // 10)
        parts["matched_in_top_10_percent"] = detection.matched_share_in_top_k(
            predictions.objectness_logits, assignment, top_k
        )
    weighted = [getattr(config, f"{name}_weight") * parts[name] for name in WEIGHTED]
    return functools.reduce(operator.add, weighted), parts
