"""The best query of every box: shared queries of all images, and each image's own.

Queries are scored chunk by chunk against tokens that are computed once, so that memory is bounded
whatever their number. With hard negatives, also how high each shared query scores anywhere.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from owl_det import boxes as box_lib
from owl_det.inference import ranking
from owl_det.modeling.family import Detector
from owl_det.scoring import class_logits
from owl_det.types import Params, TokenEmbeddings


class Queries(NamedTuple):
    """c chunks of q queries of all images, and c2 chunks of each image's own."""

    shared: Float[Array | np.ndarray, "c t q e"]
    is_shared: Bool[Array | np.ndarray, "c q"]
    own: Float[Array | np.ndarray, "b c2 t q e"]
    is_own: Bool[Array | np.ndarray, "b c2 q"]


class BestQueries(NamedTuple):
    """The best query of each of an image's n boxes."""

    boxes_xyxy: Float[Array, "b n 4"]  # relative to the padded square
    scores: Float[Array, "b n"]
    query: Int[Array, "b n"]  # shared queries first, then the image's own


class SharedScores(NamedTuple):
    """What hard negatives are mined from: shared queries without their factor."""

    best: Float[Array, "b s"]  # each of the s = c · q shared queries: best score over the boxes
    scores: Float[Array, "b n"]  # each box's best score
    query: Int[Array, "b n"]  # as in `BestQueries`


def best_queries(
    detector: Detector,
    params: Params,
    image: UInt8[Array, "b H W 3"],
    queries: Queries,
    *,
    shared_factor: float,
) -> BestQueries:
    """Scores all shared queries and each image's own.

    A score is the mean probability over the t prompts, times `shared_factor` for shared queries.
    Of equal scores the first query wins; a box that no query is asked of scores 0.
    """
    tokens = ranking.embed_image_tokens(detector, params, image)
    scores, query = _best_of_boxes(tokens, queries, shared_factor, detector.dtype)
    return BestQueries(box_lib.cxcywh_to_xyxy(tokens.boxes), scores, query)


def best_and_shared(
    detector: Detector,
    params: Params,
    image: UInt8[Array, "b H W 3"],
    queries: Queries,
    *,
    shared_factor: float,
) -> tuple[BestQueries, SharedScores]:
    """As `best_queries`, with the scores that hard negatives are mined from."""
    tokens = ranking.embed_image_tokens(detector, params, image)
    scores, query = _best_of_boxes(tokens, queries, shared_factor, detector.dtype)
    best = BestQueries(box_lib.cxcywh_to_xyxy(tokens.boxes), scores, query)
    if shared_factor != 1:
        scores, query = _best_of_boxes(tokens, queries, 1.0, detector.dtype)
    of_shared = _best_of_shared(tokens, queries, detector.dtype)
    return best, SharedScores(of_shared, scores, query)


def _best_of_boxes(
    tokens: TokenEmbeddings, asked: Queries, shared_factor: float, dtype: Any
) -> tuple[Float[Array, "b n"], Int[Array, "b n"]]:
    """Score and place of each box's best query."""
    shared, is_shared, own, is_own = asked
    b, n = tokens.logit_shift.shape
    q = (shared if shared.shape[0] else own).shape[-2]

    def keep_better(best: tuple[Array, Array], scores: Array, start: Array) -> tuple[Array, Array]:
        index = jnp.argmax(scores, axis=-1)
        score = jnp.take_along_axis(scores, index[..., None], axis=-1)[..., 0]
        is_better = score > best[0]
        return jnp.where(is_better, score, best[0]), jnp.where(is_better, index + start, best[1])

    def add_shared(best: tuple[Array, Array], chunk: Any) -> tuple[tuple[Array, Array], None]:
        queries, is_query, start = chunk
        scores = _shared_chunk_scores(tokens, queries, is_query, dtype)
        return keep_better(best, shared_factor * scores, start), None

    def add_own(best: tuple[Array, Array], chunk: Any) -> tuple[tuple[Array, Array], None]:
        queries, is_query, start = chunk
        return keep_better(best, _chunk_scores(tokens, queries, is_query, dtype), start), None

    best = jnp.zeros((b, n)), jnp.zeros((b, n), jnp.int32)
    best, _ = jax.lax.scan(add_shared, best, (shared, is_shared, jnp.arange(shared.shape[0]) * q))
    starts = shared.shape[0] * q + jnp.arange(own.shape[1]) * q
    by_chunk = jnp.moveaxis(own, 1, 0), jnp.moveaxis(is_own, 1, 0), starts
    best, _ = jax.lax.scan(add_own, best, by_chunk)
    return best


def _best_of_shared(tokens: TokenEmbeddings, asked: Queries, dtype: Any) -> Float[Array, "b s"]:
    """Each shared query's best score over the boxes."""

    def best(_: None, chunk: Any) -> tuple[None, Array]:
        queries, is_query = chunk
        return None, _shared_chunk_scores(tokens, queries, is_query, dtype).max(axis=1)

    _, by_chunk = jax.lax.scan(best, None, (asked.shared, asked.is_shared))
    return jnp.moveaxis(by_chunk, 0, 1).reshape(tokens.logit_shift.shape[0], -1)


def _shared_chunk_scores(
    tokens: TokenEmbeddings, queries: Float[Array, "t q e"], is_query: Bool[Array, " q"], dtype: Any
) -> Float[Array, "b n q"]:
    b = tokens.logit_shift.shape[0]
    queries = jnp.broadcast_to(queries[None], (b, *queries.shape))
    return _chunk_scores(
        tokens, queries, jnp.broadcast_to(is_query[None], (b, len(is_query))), dtype
    )


def _chunk_scores(
    tokens: TokenEmbeddings,
    queries: Float[Array, "b t q e"],
    is_query: Bool[Array, "b q"],
    dtype: Any,
) -> Float[Array, "b n q"]:
    """Probabilities, averaged over the prompts; 0 for filler queries."""
    b, t, q, _ = queries.shape
    logits = class_logits(
        tokens.class_embeddings,
        tokens.logit_shift,
        tokens.logit_scale,
        queries.reshape(b, t * q, -1),
        dtype,
    )
    scores = jax.nn.sigmoid(logits).reshape(b, -1, t, q).mean(axis=2)
    return jnp.where(is_query[:, None, :], scores, 0.0)
