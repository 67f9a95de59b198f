"""Scaled dot-product attention, in one place for every tower."""

from typing import Literal

import jax
from jaxtyping import Array, Float


def attend(
    query: Float[Array, "b m h c"],
    key: Float[Array, "b n h c"],
    value: Float[Array, "b n h c"],
    *,
    is_causal: bool,
    implementation: Literal["xla", "cudnn"],
) -> Float[Array, "b m h c"]:
    """softmax(q kᵀ / √c) v per head; the softmax is computed in float32.

    `implementation` is passed on by name: left to itself JAX falls back to plain XLA in silence.
    Raises `ValueError` or `RuntimeError` from JAX where the named one cannot run.
    """
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=is_causal, implementation=implementation
    )
