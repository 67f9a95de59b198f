"""Scaled dot-product attention, in one place for every tower."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Implementation = Literal["xla", "cudnn", "plain", "portable"]

# Queries whose scores exist at once on a CPU: 128 x 3601 in float32 are 1.8 MB, which a core's
# cache holds.
CHUNK = 128


def attend(
    query: Float[Array, "b m h c"],
    key: Float[Array, "b n h c"],
    value: Float[Array, "b n h c"],
    *,
    is_causal: bool,
    implementation: Implementation,
) -> Float[Array, "b m h c"]:
    """softmax(q kᵀ / √c) v per head; the softmax is computed in float32.

    "plain" holds the scores of all queries and heads at once, and leaves the rest to XLA. "xla" is
    plain too, but on a CPU, where that is bound by memory, takes one head and `CHUNK` queries at a
    time (unless causal: texts are short); the backward pass computes the scores again. "portable"
    leaves that choice to the platform that runs the program, for exports, whose platform is not
    known here. "cudnn" is the fused kernel: left to itself JAX would fall back in silence.

    Raises `ValueError` or `RuntimeError` from JAX where the named one cannot run.
    """
    is_long = query.shape[1] > CHUNK and not is_causal
    if implementation == "portable" and is_long:
        return jax.lax.platform_dependent(query, key, value, cpu=_in_chunks, default=_plain)
    if implementation == "xla" and is_long and jax.default_backend() == "cpu":
        return _in_chunks(query, key, value)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        is_causal=is_causal,
        implementation="cudnn" if implementation == "cudnn" else "xla",
    )


def _plain(
    query: Float[Array, "b m h c"], key: Float[Array, "b n h c"], value: Float[Array, "b n h c"]
) -> Float[Array, "b m h c"]:
    return jax.nn.dot_product_attention(query, key, value, implementation="xla")


def _in_chunks(
    query: Float[Array, "b m h c"], key: Float[Array, "b n h c"], value: Float[Array, "b n h c"]
) -> Float[Array, "b m h c"]:
    """Attention by head and by chunk of queries; no more than b · CHUNK · n scores exist."""
    b, m, h, c = query.shape
    num_chunks = -(-m // CHUNK)
    size = -(-m // num_chunks)
    padded = jnp.pad(query, ((0, 0), (0, num_chunks * size - m), (0, 0), (0, 0)))
    chunks = padded.reshape(b, num_chunks, size, h, c).transpose(3, 1, 0, 2, 4)

    def one_head(head: tuple[Array, Array, Array]) -> Array:
        chunks, key, value = head

        # Scores of a chunk are not kept for the backward pass: all of them are what is avoided.
        @jax.checkpoint
        def one_chunk(query: Array) -> Array:
            scores = jnp.einsum("bmc,bnc->bmn", query, key, preferred_element_type=jnp.float32)
            # The highest of a row changes nothing but the range, so it needs no gradient.
            highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
            weights = jnp.exp((scores - highest) * c**-0.5)
            mixed = jnp.einsum(
                "bmn,bnc->bmc",
                weights.astype(value.dtype),
                value,
                preferred_element_type=jnp.float32,
            )
            return (mixed / jnp.sum(weights, axis=-1, keepdims=True)).astype(value.dtype)

        return jax.lax.map(one_chunk, chunks)

    # Over heads and chunks, not over images: a batch may be cut over devices.
    mixed = jax.lax.map(one_head, (chunks, key.transpose(2, 0, 1, 3), value.transpose(2, 0, 1, 3)))
    return mixed.transpose(2, 1, 3, 0, 4).reshape(b, num_chunks * size, h, c)[:, :m]
