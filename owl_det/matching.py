"""One-to-one matching of predictions and instances: cost matrix and optimal assignment.

Costs follow the authors' code: focal class cost (positive minus negative), L1 on cxcywh and
negative GIoU, with the weights of the losses (arXiv 2205.06230, appendix A1.3).
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from owl_det import boxes as box_lib
from owl_det.config import LossConfig
from owl_det.types import Assignment, Predictions, Targets

# Stands for a cost that is no number; far above real costs, far below float32's precision limits.
FORBIDDEN = 1e5


def cost_matrix(
    predictions: Predictions, targets: Targets, config: LossConfig
) -> Float[Array, "*b k m"]:
    """Cost of matching each prediction with each instance; fillers hold arbitrary numbers."""
    classes = focal_cost(
        predictions.class_logits, targets.labels & targets.is_query[..., None, :], config
    )
    l1 = jnp.abs(predictions.boxes[..., :, None, :] - targets.boxes[..., None, :, :]).sum(-1)
    giou = box_lib.pairwise_giou(
        box_lib.cxcywh_to_xyxy(predictions.boxes), box_lib.cxcywh_to_xyxy(targets.boxes)
    )
    return config.class_weight * classes + config.l1_weight * l1 - config.giou_weight * giou


def focal_cost(
    logits: Float[Array, "*b k q"], labels: Bool[Array, "*b m q"], config: LossConfig
) -> Float[Array, "*b k m"]:
    """Σ over an instance's labels of focal loss as positive minus focal loss as negative."""
    positive, negative = focal_terms(logits, config.focal_alpha, config.focal_gamma)
    return jnp.einsum("...kq,...mq->...km", positive - negative, labels.astype(jnp.float32))


def focal_terms(
    logits: Float[Array, "*s"], alpha: float, gamma: float
) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """Focal loss of each logit as a positive and as a negative.

    positive = −α (1 − p)^γ log p;  negative = −(1 − α) p^γ log(1 − p);  p = σ(logit).
    Source: Lin et al. 2017 (arXiv 1708.02002), equation 5.
    """
    log_p, log_not_p = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    positive = -alpha * jnp.exp(gamma * log_not_p) * log_p
    negative = -(1 - alpha) * jnp.exp(gamma * log_p) * log_not_p
    return positive, negative


def assign(cost: Float[Array, "*b k m"], is_instance: Bool[Array, "*b m"]) -> Assignment:
    """Optimal assignment: min(k, number of instances) pairs of least total cost.

    Costs that are no finite numbers count as `FORBIDDEN`: such a pair is taken only where there
    is no other. Fillers are never matched.
    """
    if cost.shape[-1] == 0:
        empty = jnp.zeros(is_instance.shape, jnp.int32)
        return Assignment(prediction=empty, is_matched=is_instance)
    solve = _assign_one
    for _ in range(cost.ndim - 2):
        solve = jax.vmap(solve)
    return solve(jax.lax.stop_gradient(cost), is_instance)


def _assign_one(cost: Float[Array, "k m"], is_instance: Bool[Array, " m"]) -> Assignment:
    cost = jnp.where(jnp.isfinite(cost), cost.astype(jnp.float32), FORBIDDEN)
    # Fillers cost the same everywhere, and more than any instance: they take what is left over
    # and never an instance's place, also where instances outnumber predictions.
    real = jnp.where(is_instance[None, :], cost, -jnp.inf)
    filler_cost = jnp.maximum(jnp.max(real), 0.0) + 1.0
    cost = jnp.where(is_instance[None, :], cost, filler_cost)
    predictions, instances = optax.assignment.hungarian_algorithm(cost)
    prediction = jnp.zeros(is_instance.shape, jnp.int32).at[instances].set(predictions)
    is_matched = jnp.zeros(is_instance.shape, bool).at[instances].set(True) & is_instance
    return Assignment(prediction=jnp.where(is_matched, prediction, 0), is_matched=is_matched)


def match(predictions: Predictions, targets: Targets, config: LossConfig) -> Assignment:
    """Assigns predictions to the instances of each image. Carries no gradient."""
    predictions, targets = jax.lax.stop_gradient((predictions, targets))
    return assign(cost_matrix(predictions, targets, config), targets.is_instance)
