"""The detection loss of each example: parts, weights, sum."""

import functools
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from owl_det.config import LossConfig, SelectionConfig
from owl_det.losses import detection
from owl_det.types import Predictions, PredictionTargets, Targets

WEIGHTED = ("class", "l1", "giou", "objectness")


def total_loss(
    predictions: Predictions,
    targets: Targets,
    wanted: PredictionTargets,
    config: LossConfig,
    selection: SelectionConfig,
    *,
    keys: Key[Array, " b"] | None = None,
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """Weighted sum of the parts, and the unweighted parts and counts to log.

    `wanted` is what the assigner made of `targets`; `keys`, one of each image, are for
    `config.negative_share`.
    """
    is_positive, is_drawn = wanted.weight > 0, None
    if config.negative_share < 1:
        assert keys is not None
        is_drawn = jax.vmap(detection.sample_negatives, (0, 0, None))(
            keys, wanted.labels.any(-1), config.negative_share
        )
    parts = detection.detection_losses(predictions, targets, wanted, config, is_drawn)
    parts["instances"] = targets.is_instance.sum(-1).astype(jnp.float32)
    if not selection.instance_top_k:
        # What selection would keep; OWLv2 keeps about 10 % of the tokens.
        top_k = max(1, predictions.boxes.shape[-2] // 10)
        parts["matched_in_top_10_percent"] = detection.matched_share_in_top_k(
            predictions.objectness_logits, is_positive, top_k
        )
    weighted = [getattr(config, f"{name}_weight") * parts[name] for name in WEIGHTED]
    return functools.reduce(operator.add, weighted), parts
