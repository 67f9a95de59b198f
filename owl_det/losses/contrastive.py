"""Contrastive image-text losses: CLIP's softmax and SigLIP's sigmoid.

Sources: Radford et al. 2021 (arXiv 2103.00020, figure 3), Zhai et al. 2023 (arXiv 2303.15343,
equation 1 and algorithm 1). Pairs are one to one: row i of the images belongs to row i of the
texts. Fillers are neither positives nor negatives. All rows of the global batch are contrasted:
under `jax.jit` the compiler gathers the embeddings, and only them, across the data axes. `logits`
are those of `Detector.similarity`: images in rows, texts in columns.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def softmax_loss(
    logits: Float[Array, "b b"],
    is_same_text: Bool[Array, "b b"],
    is_example: Bool[Array, " b"],
) -> Float[Array, " b"]:
    """½ (cross entropy over the texts of each image + over the images of each text), per pair.

    Where the same text stands in several pairs (`is_same_text`, the diagonal included), the target
    is shared evenly among them: none of them is a negative. With distinct texts this is CLIP's
    loss. Fillers get 0.
    """
    is_pair = is_same_text & is_example[:, None] & is_example[None, :]
    target = is_pair / jnp.maximum(is_pair.sum(-1, keepdims=True), 1)
    by_image = _cross_entropy(logits, target, is_example)
    by_text = _cross_entropy(logits.T, target, is_example)
    return jnp.where(is_example, 0.5 * (by_image + by_text), 0.0)


def _cross_entropy(
    logits: Float[Array, "b b"], target: Float[Array, "b b"], is_example: Bool[Array, " b"]
) -> Float[Array, " b"]:
    masked = jnp.where(is_example[None, :], logits, -1e30)
    log_probability = jax.nn.log_softmax(masked, axis=-1)
    return -jnp.sum(jnp.where(target > 0, target * log_probability, 0.0), axis=-1)


def sigmoid_loss(
    logits: Float[Array, "b b"],
    is_same_text: Bool[Array, "b b"],
    is_example: Bool[Array, " b"],
) -> Float[Array, " b"]:
    """Σ_j −log σ(z_ij · logits_ij) for each image i; z is 1 for pairs of the same text, else −1.

    SigLIP's loss is the mean over images. `logits` include the learned bias. Fillers get 0.
    """
    sign = jnp.where(is_same_text, 1.0, -1.0)
    is_counted = is_example[:, None] & is_example[None, :]
    return jnp.where(is_counted, -jax.nn.log_sigmoid(sign * logits), 0.0).sum(-1)


def accuracy(
    logits: Float[Array, "b b"],
    is_same_text: Bool[Array, "b b"],
    is_example: Bool[Array, " b"],
) -> Float[Array, " b"]:
    """1 where an image's best text of the batch is its own (or the same words), else 0."""
    best = jnp.argmax(jnp.where(is_example[None, :], logits, -jnp.inf), axis=-1)
    return jnp.take_along_axis(is_same_text, best[:, None], axis=1)[:, 0].astype(jnp.float32)
