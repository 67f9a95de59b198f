"""The training loss of each example: matching, parts, weights, sum."""

import functools
import operator

from jaxtyping import Array, Float

from owl_det.config import LossConfig, SelectionConfig
from owl_det.losses import detection
from owl_det.matching import match
from owl_det.types import Predictions, Targets

WEIGHTED = ("class", "l1", "giou", "objectness")


def total_loss(
    predictions: Predictions, targets: Targets, config: LossConfig, selection: SelectionConfig
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """Weighted sum of the parts, and the unweighted parts and counts to log."""
    assignment = match(predictions, targets, config)
    parts = detection.detection_losses(predictions, targets, assignment, config)
    if not selection.instance_top_k:
        # What selection would keep; OWLv2 keeps about 10 % of the tokens.
        top_k = max(1, predictions.boxes.shape[-2] // 10)
        parts["matched_in_top_10_percent"] = detection.matched_share_in_top_k(
            predictions.objectness_logits, assignment, top_k
        )
    weighted = [getattr(config, f"{name}_weight") * parts[name] for name in WEIGHTED]
    return functools.reduce(operator.add, weighted), parts
