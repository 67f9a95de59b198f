"""Which token of a query image stands for what its box shows."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from data_pipelines import image_ops
from owl_det import boxes as box_lib
from owl_det.inference import ranking
from owl_det.types import TokenEmbeddings


def choose_query_token(
    tokens: TokenEmbeddings,
    query_boxes: Float[Array, "b 4"],
    has_box: Bool[Array, " b"],
    sizes: Int[Array, "b 2"],
    geometry: image_ops.Geometry,
) -> Int[Array, " b"]:
    """The token of each query image that stands for its query box (cxcywh).

    As in the authors' code (google-research/scenic, projects/owl_vit/notebooks/inference.py): of
    the tokens whose predicted box overlaps the query box at least 0.8 times as much as the best
    one does, the token whose class embedding has the smallest product with the mean embedding of
    the image. Training matches one token to an object and makes background of the others, and
    background is what the mean is like. Overlap is IoU, or GIoU where no predicted box touches.
    Without a box (`has_box` False) it is the token of highest objectness.

    `sizes` are height and width of the images in pixels. A token whose box lies in the padding is
    chosen only if those of all tokens do.
    """
    boxes_xyxy = box_lib.cxcywh_to_xyxy(tokens.boxes)
    is_shown = ranking.shows_image(boxes_xyxy, sizes, geometry)
    is_shown |= ~jnp.any(is_shown, axis=1, keepdims=True)
    query_xyxy = box_lib.cxcywh_to_xyxy(query_boxes)[:, None]
    iou = box_lib.pairwise_iou(query_xyxy, boxes_xyxy)[0][:, 0]
    giou = box_lib.pairwise_giou(query_xyxy, boxes_xyxy)[:, 0]
    overlap = jnp.where(jnp.any(iou > 0, axis=1, keepdims=True), iou, giou)
    overlap = jnp.where(is_shown, overlap, -jnp.inf)
    best = jnp.max(overlap, axis=1, keepdims=True)
    # The authors' 0.8 · best, which a negative GIoU would put above the best itself.
    is_candidate = overlap >= best - 0.2 * jnp.abs(best)
    embeddings = tokens.class_embeddings * tokens.embedding_norm[..., None]
    similarity = jnp.einsum("bne,be->bn", embeddings, jnp.mean(embeddings, axis=1))
    of_box = jnp.argmin(jnp.where(is_candidate, similarity, jnp.inf), axis=1)
    objectness = jnp.where(is_shown, tokens.objectness_logits, -jnp.inf)
    return jnp.where(has_box, of_box, jnp.argmax(objectness, axis=1))
