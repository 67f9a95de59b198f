"""Detection with a frozen model: what evaluation, the predictor and exports share.

An image becomes `TokenEmbeddings` once (`embed_image_tokens`); `rank` then scores queries against
them without the image tower, so that detection and search in saved embeddings are the same
arithmetic.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, UInt8

from data_pipelines import image_ops
from owl_det import boxes as box_lib
from owl_det.checkpoints import finite
from owl_det.errors import CheckpointError
from owl_det.scoring import class_logits
from owl_det.types import LoadedModel, Params, TokenEmbeddings

if TYPE_CHECKING:  # an exported model is run by this module where Flax is not installed
    from owl_det.modeling.family import ContrastiveModel, Detector

QUERY_CHUNK = 512  # queries scored at once: bounds the memory of the scores
MIN_SIDE = 0.01  # pixels: a box that shows less of its image, on either axis, shows nothing
OUTSIDE = -1.0  # below every probability: the score of boxes that show nothing of the image


class DetectorFunctions(NamedTuple):
    """The pure functions that a predictor runs: of a checkpoint's modules, or of an export."""

    embed_prompts: Callable[[Params, Int32[Array, "t q l"]], Float[Array, "t q e"]]
    embed_image_tokens: Callable[[Params, UInt8[Array, "b H W 3"]], TokenEmbeddings]
    is_one_size: bool = False  # True: images have the side of the model, and no smaller one

    @classmethod
    def of_model(cls, model: LoadedModel) -> "DetectorFunctions":
        """The functions of a checkpoint's modules."""
        from owl_det.modeling.build import detector_of

        return cls.of_detector(detector_of(model.config, model.preprocess))

    @classmethod
    def of_detector(cls, detector: "Detector") -> "DetectorFunctions":
        """The functions of modules that are there already."""
        return cls(partial(embed_prompts, detector), partial(embed_image_tokens, detector))


class TopPairs(NamedTuple):
    """The best query-box pairs of each image, best first."""

    boxes_xyxy: Float[Array, "b k 4"]  # relative to the padded square
    scores: Float[Array, "b k"]  # `OUTSIDE` where an image has fewer boxes that show it
    query: Int[Array, "b k"]


def embed_prompts(
    model: "ContrastiveModel", params: Params, tokens: Int32[Array, "t q l"]
) -> Float[Array, "t q e"]:
    """Embeddings of every query in each of its t prompts."""
    from owl_det.modeling.build import call

    t, q, length = tokens.shape
    embeddings = call(model.encode_text, params, tokens.reshape(t * q, length))
    return embeddings.reshape(t, q, -1)


def embed_image_tokens(
    detector: "Detector", params: Params, image: UInt8[Array, "b H W 3"]
) -> TokenEmbeddings:
    """One pass of the image tower. A side below the model's uses a part of the position grid."""
    from owl_det.modeling.build import call

    features = call(detector.encode_image, params, image)
    return call(detector.embed_tokens, params, features)


def shows_image(
    boxes_xyxy: Float[Array, "b n 4"], sizes: Int[Array, "b 2"], geometry: image_ops.Geometry
) -> Bool[Array, "b n"]:
    """Which boxes, relative to the padded square, show something of their images.

    The others lie in the padding. `sizes` are height and width in pixels. A box of NaN counts as
    shown, so that it reaches those who look for it (`require_finite`).
    """
    shape = jnp.asarray(sizes, jnp.float32)[:, None, ::-1]  # width, height
    square = jnp.max(shape, axis=-1, keepdims=True) if geometry == "pad" else shape
    low = jnp.clip(boxes_xyxy[..., :2] * square, 0, shape)
    high = jnp.clip(boxes_xyxy[..., 2:] * square, 0, shape)
    return ~jnp.any(high - low < MIN_SIDE, axis=-1)


def has_area(boxes_xyxy: Float32[np.ndarray, "n 4"]) -> Bool[np.ndarray, " n"]:
    """As `shows_image`, of boxes in pixels that are clipped to their image."""
    return np.all(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2] >= MIN_SIDE, axis=1)


def require_finite(what: str, *arrays: Array | np.ndarray) -> None:
    """Raises `CheckpointError` if the model computed a NaN or an infinite number."""
    if any(finite.count_not_finite(np.asarray(array)) for array in arrays):
        raise CheckpointError(
            f"{what}: the model computes NaN or infinite numbers; its parameters are damaged or "
            "too large for its dtype. Take another checkpoint, or float32 instead of bfloat16"
        )


def keep_tokens(
    tokens: TokenEmbeddings,
    num_tokens: int,
    sizes: Int[Array, "b 2"],
    geometry: image_ops.Geometry,
) -> TokenEmbeddings:
    """The `num_tokens` tokens of highest objectness of each image, best first; 0 keeps all.

    Tokens whose boxes lie in the padding come last.
    """
    if not 0 < num_tokens < tokens.objectness_logits.shape[1]:
        return tokens
    is_shown = shows_image(box_lib.cxcywh_to_xyxy(tokens.boxes), sizes, geometry)
    _, chosen = jax.lax.top_k(jnp.where(is_shown, tokens.objectness_logits, -jnp.inf), num_tokens)
    return jax.tree.map(lambda x: jax.vmap(lambda row, i: row[i])(x, chosen), tokens)


def rank(
    tokens: TokenEmbeddings,
    query_embeddings: Float[Array, "t q e"],
    is_query: Bool[Array, " q"],
    sizes: Int[Array, "b 2"],
    *,
    top_k: int,
    dtype: Any,
    geometry: image_ops.Geometry,
    query_chunk: int = QUERY_CHUNK,
) -> TopPairs:
    """The `top_k` best of all query-box pairs; probabilities are averaged over the t prompts.

    `sizes` are height and width of the images in pixels: boxes that lie in the padding rank below
    every pair (`OUTSIDE`). Filler queries (`is_query` False) score 0; `dtype` is that of the
    model's matrix work. Scores of `query_chunk` queries exist at a time; the best pairs so far are
    carried along.
    """
    num_pairs = tokens.logit_shift.shape[1] * query_embeddings.shape[1]
    boxes_xyxy = box_lib.cxcywh_to_xyxy(tokens.boxes)
    best_of = partial(
        _best_of_chunk,
        tokens,
        shows_image(boxes_xyxy, sizes, geometry)[..., None],
        min(top_k, num_pairs),
        dtype,
    )
    chunks = _query_chunks(query_embeddings, is_query, query_chunk)
    if len(chunks.start) == 1:
        best = best_of(jax.tree.map(lambda x: x[0], chunks))
    else:
        best = _best_of_all(best_of, chunks, (len(boxes_xyxy), min(top_k, num_pairs)))
    boxes = jnp.take_along_axis(boxes_xyxy, best.token[..., None], axis=1)
    return TopPairs(boxes_xyxy=boxes, scores=best.scores, query=best.query)


class _QueryChunk(NamedTuple):
    """Queries that are scored at once; of several chunks, all have one more axis in front."""

    start: Int[Array, "*c"]  # place of the first query among all
    queries: Float[Array, "*c t q e"]
    kind: Int[Array, "*c q"]  # 1: a query; 0: a filler that scores 0; -1: padding, below every pair


class _BestPairs(NamedTuple):
    """The best pairs so far, best first."""

    scores: Float[Array, "b k"]
    token: Int[Array, "b k"]
    query: Int[Array, "b k"]


def _query_chunks(
    query_embeddings: Float[Array, "t q e"], is_query: Bool[Array, " q"], query_chunk: int
) -> _QueryChunk:
    """All queries in chunks of one size, at most `query_chunk`."""
    t, q, e = query_embeddings.shape
    num_chunks = -(-q // query_chunk)
    size = -(-q // num_chunks)
    padding = num_chunks * size - q
    queries = jnp.pad(query_embeddings, ((0, 0), (0, padding), (0, 0)))
    kind = jnp.pad(is_query.astype(jnp.int32), (0, padding), constant_values=-1)
    return _QueryChunk(
        start=jnp.arange(num_chunks, dtype=jnp.int32) * size,
        queries=queries.reshape(t, num_chunks, size, e).swapaxes(0, 1),
        kind=kind.reshape(num_chunks, size),
    )


def _best_of_chunk(
    tokens: TokenEmbeddings,
    is_shown: Bool[Array, "b n 1"],
    k: int,
    dtype: Any,
    chunk: _QueryChunk,
) -> _BestPairs:
    """The k best pairs of a chunk, or all where there are fewer."""
    b, n = tokens.logit_shift.shape
    size = chunk.queries.shape[1]
    kind = chunk.kind[None, None, :]
    scores = score(tokens, chunk.queries, dtype)
    scores = jnp.where(kind > 0, scores, kind.astype(jnp.float32))
    scores = jnp.where(is_shown, scores, OUTSIDE).reshape(b, n * size)
    scores, pair = jax.lax.top_k(scores, min(k, n * size))
    return _BestPairs(scores, pair // size, chunk.start + pair % size)


def _best_of_all(
    best_of: Callable[[_QueryChunk], _BestPairs], chunks: _QueryChunk, shape: tuple[int, int]
) -> _BestPairs:
    """The best pairs of all chunks; `shape` is the number of images, and of pairs of each."""

    def merge(best: _BestPairs, chunk: _QueryChunk) -> tuple[_BestPairs, None]:
        both = [jnp.concatenate(x, axis=1) for x in zip(best, best_of(chunk), strict=True)]
        scores, place = jax.lax.top_k(both[0], shape[1])
        token, query = (jnp.take_along_axis(x, place, axis=1) for x in both[1:])
        return _BestPairs(scores, token, query), None

    empty = jnp.zeros(shape, jnp.int32)
    best, _ = jax.lax.scan(merge, _BestPairs(jnp.full(shape, OUTSIDE), empty, empty), chunks)
    return best


def score(
    tokens: TokenEmbeddings, prompts: Float[Array, "t q e"], dtype: Any
) -> Float[Array, "b n q"]:
    """Probability of every token for every query, averaged over the t prompts."""

    def add_prompt(total: Array, queries: Array) -> tuple[Array, None]:
        logits = class_logits(
            tokens.class_embeddings, tokens.logit_shift, tokens.logit_scale, queries, dtype
        )
        return total + jax.nn.sigmoid(logits), None

    shape = (*tokens.logit_shift.shape, prompts.shape[1])
    total, _ = jax.lax.scan(add_prompt, jnp.zeros(shape), prompts)
    return total / prompts.shape[0]


def pixel_boxes(
    boxes_xyxy: Float32[np.ndarray, "n 4"],
    height: int,
    width: int,
    geometry: image_ops.Geometry,
) -> Float32[np.ndarray, "n 4"]:
    """Corners relative to the padded square → pixels of an image of this size, inside it.

    `geometry` is how the image came into the square (`config.PreprocessConfig`).
    """
    across, down = image_ops.extent(height, width, geometry)
    pixels = boxes_xyxy.astype(np.float64) * (across, down, across, down)
    return np.clip(pixels, 0, (width, height, width, height)).astype(np.float32)
