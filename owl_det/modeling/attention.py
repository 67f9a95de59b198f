"""Scaled dot-product attention, in one place for every tower."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

Implementation = Literal["xla", "cudnn", "plain", "portable"]

# Queries whose scores exist at once on a CPU: 128 x 3601 in float32 are 1.8 MB, which a core's
# cache holds.
CHUNK = 128

# Names what the backward pass of attention in chunks needs beside query, key and value.
ATTENTION = "attention"


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


@jax.custom_vjp
def _in_chunks(
    query: Float[Array, "b m h c"], key: Float[Array, "b n h c"], value: Float[Array, "b n h c"]
) -> Float[Array, "b m h c"]:
    """Attention by head and by chunk of queries; no more than b · CHUNK · n scores exist."""
    return _mix(query, key, value)[0]


def _mix(
    query: Float[Array, "b m h c"], key: Float[Array, "b n h c"], value: Float[Array, "b n h c"]
) -> tuple[Float[Array, "b m h c"], Float[Array, "b m h 1"]]:
    """Attention, and the logarithm of each query's sum of exponentials."""

    def one_head(head: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        chunks, key, value = head

        def one_chunk(query: Array) -> tuple[Array, Array]:
            scores = _product("bmc,bnc->bmn", query, key)
            highest = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp((scores - highest) * _scale(query))
            total = jnp.sum(weights, axis=-1, keepdims=True)
            mixed = _product("bmn,bnc->bmc", weights.astype(value.dtype), value) / total
            return mixed.astype(value.dtype), highest * _scale(query) + jnp.log(total)

        return jax.lax.map(one_chunk, chunks)

    found = jax.lax.map(one_head, (_cut(query), _by_head(key), _by_head(value)))
    mixed, log_sums = (_joined(x, query.shape[1]) for x in found)
    return mixed, log_sums


def _forward(query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, ...]]:
    mixed, log_sums = (checkpoint_name(x, ATTENTION) for x in _mix(query, key, value))
    return mixed, (query, key, value, mixed, log_sums)


def _backward(residuals: tuple[Array, ...], g_mixed: Array) -> tuple[Array, Array, Array]:
    """Gradients from scores that are computed again, a chunk at a time.

    With weights p = softmax(s), s = q kᵀ / √c: ds = p (dp - Σ dp p), and Σ dp p = Σ dy y over the
    channels of the output y (FlashAttention, arXiv 2205.14135, appendix B.4).
    """
    query, key, value, mixed, log_sums = residuals
    shared = jnp.sum(
        g_mixed.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1, keepdims=True
    )

    def one_head(head: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        *chunks, key, value = head

        def one_chunk(sums: tuple[Array, Array], chunk: tuple[Array, ...]) -> tuple[Any, Array]:
            query, g_mixed, log_sums, shared = chunk
            scores = _product("bmc,bnc->bmn", query, key)
            weights = jnp.exp(scores * _scale(query) - log_sums)
            g_weights = _product("bmc,bnc->bmn", g_mixed, value)
            g_scores = (weights * (g_weights - shared) * _scale(query)).astype(query.dtype)
            g_key = _product("bmc,bmn->bcn", query, g_scores)
            g_value = _product("bmc,bmn->bcn", g_mixed, weights.astype(value.dtype))
            g_query = _product("bmn,bnc->bmc", g_scores, key).astype(query.dtype)
            return (sums[0] + g_key, sums[1] + g_value), g_query

        # Sums lie as the products leave them: a transposed matrix of scores would cost more.
        b, n, c = key.shape
        zeros = jnp.zeros((b, c, n), jnp.float32)
        (g_key, g_value), g_query = jax.lax.scan(one_chunk, (zeros, zeros), tuple(chunks))
        return g_query, g_key.astype(key.dtype), g_value.astype(value.dtype)

    chunks = (_cut(x) for x in (query, g_mixed, log_sums, shared))
    g_query, g_key, g_value = jax.lax.map(one_head, (*chunks, _by_head(key), _by_head(value)))
    g_key, g_value = (x.transpose(1, 3, 0, 2) for x in (g_key, g_value))
    return _joined(g_query, query.shape[1]), g_key, g_value


_in_chunks.defvjp(_forward, _backward)


def _scale(query: Float[Array, "*s c"]) -> float:
    return query.shape[-1] ** -0.5


def _product(letters: str, one: Array, other: Array) -> Array:
    return jnp.einsum(letters, one, other, preferred_element_type=jnp.float32)


# Loops go over heads and chunks, not over images: a batch may be cut over devices.


def _by_head(x: Float[Array, "b n h c"]) -> Float[Array, "h b n c"]:
    return x.transpose(2, 0, 1, 3)


def _cut(x: Float[Array, "b m h c"]) -> Float[Array, "h k b s c"]:
    """k chunks of each head, of equal size s; the last is filled up with zeros."""
    b, m, h, c = x.shape
    num_chunks = -(-m // CHUNK)
    size = -(-m // num_chunks)
    padded = jnp.pad(x, ((0, 0), (0, num_chunks * size - m), (0, 0), (0, 0)))
    return padded.reshape(b, num_chunks, size, h, c).transpose(3, 1, 0, 2, 4)


def _joined(x: Float[Array, "h k b s c"], m: int) -> Float[Array, "b m h c"]:
    """The inverse of `_cut`."""
    h, k, b, s, c = x.shape
    return x.transpose(2, 1, 3, 0, 4).reshape(b, k * s, h, c)[:, :m]
