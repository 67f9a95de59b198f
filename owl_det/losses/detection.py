"""Detection losses of one image each: focal classification, L1, GIoU, objectness.

They see targets from the predictions' side, as any assigner gives them. Values are per example and
unweighted; `losses.total` weights and adds them. Normalisation is per example, as in the authors'
code: classification by the image's positive labels, boxes by the weights of its positive
predictions.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from owl_det import boxes as box_lib
from owl_det.config import LossConfig
from owl_det.losses.focal import focal_terms
from owl_det.types import Predictions, PredictionTargets, Targets


def detection_losses(
    predictions: Predictions,
    targets: Targets,
    wanted: PredictionTargets,
    config: LossConfig,
    is_drawn: Bool[Array, "*b k"] | None = None,
) -> dict[str, Float[Array, "*b"]]:
    """The four parts, by name; `wanted` is what each prediction should be, `is_drawn` as in
    `class_loss`."""
    l1, giou = box_losses(predictions.boxes, wanted)
    return {
        "class": class_loss(predictions, targets, wanted, config, is_drawn),
        "l1": l1,
        "giou": giou,
        "objectness": objectness_loss(
            predictions.objectness_logits, predictions.class_logits, targets.is_query
        ),
    }


def class_loss(
    predictions: Predictions,
    targets: Targets,
    wanted: PredictionTargets,
    config: LossConfig,
    is_drawn: Bool[Array, "*b k"] | None = None,
) -> Float[Array, "*b"]:
    """Focal loss over all predictions and real queries / number of positive labels (at least 1).

    Predictions that lie in a crowd region are not held against that region's names. With `is_drawn`
    only those predictions count, and every label.
    """
    labels = wanted.labels
    positive, negative = focal_terms(
        predictions.class_logits, config.focal_alpha, config.focal_gamma
    )
    is_counted = targets.is_query[..., None, :] & ~_in_crowd(predictions.boxes, targets) | labels
    is_counted &= wanted.is_counted[..., None]
    if is_drawn is not None:
        is_counted &= is_drawn[..., None] | labels
    loss = jnp.where(labels, positive, negative)
    loss = jnp.where(is_counted, loss, 0.0).sum((-2, -1))
    return loss / jnp.maximum(labels.sum((-2, -1)), 1)


def _in_crowd(boxes_cxcywh: Float[Array, "*b k 4"], targets: Targets) -> Bool[Array, "*b k q"]:
    """True where at least half of a predicted box lies in a crowd region of that name."""
    inside = box_lib.pairwise_ioa(
        box_lib.cxcywh_to_xyxy(jax.lax.stop_gradient(boxes_cxcywh)),
        box_lib.cxcywh_to_xyxy(targets.boxes),
    )
    is_inside = (inside >= 0.5) & targets.is_crowd[..., None, :]
    return (
        jnp.einsum(
            "...km,...mq->...kq", is_inside.astype(jnp.float32), targets.labels.astype(jnp.float32)
        )
        > 0.5
    )


def box_losses(
    boxes_cxcywh: Float[Array, "*b k 4"], wanted: PredictionTargets
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """L1 (on corners, summed over the four) and 1 − GIoU of the positive predictions.

    Each is the weighted sum over the sum of the weights, which counts as at least 1.
    """
    weight = wanted.weight
    # Background compares a box with itself, so that no gradient of its can be infinite.
    is_positive = (weight > 0)[..., None]
    target = box_lib.cxcywh_to_xyxy(jnp.where(is_positive, wanted.boxes, 0.5))
    predicted = box_lib.cxcywh_to_xyxy(jnp.where(is_positive, boxes_cxcywh, 0.5))
    total = jnp.maximum(weight.sum(-1), 1.0)
    l1 = weight * jnp.abs(predicted - target).sum(-1)
    giou = weight * (1.0 - box_lib.giou_paired(predicted, target))
    return l1.sum(-1) / total, giou.sum(-1) / total


def objectness_loss(
    objectness_logits: Float[Array, "*b k"],
    class_logits: Float[Array, "*b k q"],
    is_query: Bool[Array, "*b q"],
) -> Float[Array, "*b"]:
    """mean_i BCE(o_i, stop_gradient(max_q σ(s_iq))) over the given tokens and real queries.

    The paper says that objectness is trained towards the token's classification score and leaves
    the form open (arXiv 2306.09683, section 3.2); this is our choice of it. 0 for an image without
    a query, of whose tokens nothing is known.
    """
    scores = jnp.where(is_query[..., None, :], jax.nn.sigmoid(class_logits), 0.0)
    target = jax.lax.stop_gradient(scores.max(-1))
    loss = -target * jax.nn.log_sigmoid(objectness_logits)
    loss -= (1 - target) * jax.nn.log_sigmoid(-objectness_logits)
    return loss.mean(-1) * is_query.any(-1)


def matched_share_in_top_k(
    objectness_logits: Float[Array, "*b k"], is_positive: Bool[Array, "*b k"], top_k: int
) -> Float[Array, "*b"]:
    """Share of positive predictions among the `top_k` of highest objectness (1 without any)."""
    rank = jnp.argsort(jnp.argsort(-objectness_logits, axis=-1), axis=-1)
    count = is_positive.sum(-1)
    kept = ((rank < top_k) & is_positive).sum(-1)
    return jnp.where(count > 0, kept / jnp.maximum(count, 1), 1.0)


def sample_negatives(
    key: Key[Array, ""], is_positive: Bool[Array, " n"], share: float
) -> Bool[Array, " n"]:
    """The tokens that the class loss counts: the positive ones and a random `share` of the others.

    Unlabelled novel objects stand among the negatives, and 10 % of these are enough (HierKD, arXiv
    2203.10593, section 3.4).
    """
    return is_positive | jax.random.bernoulli(key, share, is_positive.shape)
