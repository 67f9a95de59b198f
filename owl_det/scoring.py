"""From embeddings to class logits, in plain JAX: training, inference and exports share it."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float


def unit_length(x: Float[Array, "*b d"], epsilon: float = 1e-6) -> Float[Array, "*b d"]:
    """x / (|x| + ε) in float32."""
    x = x.astype(jnp.float32)
    # The square root has no gradient at zero, which filler rows would reach.
    norm = jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
    return x / (norm + epsilon)


def class_logits(
    embeddings: Float[Array, "b n e"],
    shift: Float[Array, "b n"],
    scale: Float[Array, "b n"],
    query_embeddings: Float[Array, "*b q e"],
    dtype: Any,
) -> Float[Array, "b n q"]:
    """(cos + shift) · scale in float32; the cosine's product is computed in `dtype`.

    `embeddings` have unit length. Queries are one set for all images, or one of each image's own.
    """
    cosine = jnp.einsum(
        "bne,bqe->bnq" if query_embeddings.ndim == 3 else "bne,qe->bnq",
        embeddings.astype(dtype),
        unit_length(query_embeddings).astype(dtype),
        preferred_element_type=jnp.float32,
    )
    return (cosine + shift[..., None]) * scale[..., None]
