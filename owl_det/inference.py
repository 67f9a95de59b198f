"""Detection with a frozen model: what evaluation and the predictor share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32, UInt8

from owl_det import boxes as box_lib
from owl_det.modeling.detector import Detector
from owl_det.types import ImageFeatures, Params


class TopPairs(NamedTuple):
    """The best query-box pairs of each image, best first."""

    boxes_xyxy: Float[Array, "b k 4"]  # relative to the padded square
    scores: Float[Array, "b k"]
    query: Int[Array, "b k"]


def encode_queries(
    detector: Detector, params: Params, tokens: Int32[Array, "t q l"]
) -> Float[Array, "t q e"]:
    """Embeddings of every query in each of its t prompts."""
    t, q, length = tokens.shape
    embeddings = detector.apply(
        {"params": params}, tokens.reshape(t * q, length), method="encode_text"
    )
    assert isinstance(embeddings, jax.Array)
    return embeddings.reshape(t, q, -1)


def detect(
    detector: Detector,
    params: Params,
    image: UInt8[Array, "b H W 3"],
    query_embeddings: Float[Array, "t q e"],
    *,
    top_k: int,
) -> TopPairs:
    """The `top_k` best of all query-box pairs; probabilities are averaged over the t prompts."""
    b, height, width = image.shape[:3]
    p = detector.config.image.patch_size
    variables = {"params": params}
    features = detector.apply(variables, image, method="encode_image")
    assert isinstance(features, ImageFeatures)
    queries = jnp.broadcast_to(
        query_embeddings[:, None], (query_embeddings.shape[0], b, *query_embeddings.shape[1:])
    )
    is_query = jnp.ones((b, query_embeddings.shape[1]), bool)
    predictions = detector.apply(
        variables, features, queries[0], is_query, grid=(height // p, width // p), method="predict"
    )

    def add_prompt(total: Array, prompt_queries: Array) -> tuple[Array, None]:
        logits = detector.apply(
            variables, features, prompt_queries, is_query, method="class_logits"
        )
        return total + jax.nn.sigmoid(logits), None

    total, _ = jax.lax.scan(add_prompt, jax.nn.sigmoid(predictions.class_logits), queries[1:])
    scores = total / queries.shape[0]
    q = scores.shape[-1]
    best, pair = jax.lax.top_k(scores.reshape(b, -1), min(top_k, scores.shape[1] * q))
    boxes = jnp.take_along_axis(
        box_lib.cxcywh_to_xyxy(predictions.boxes), (pair // q)[..., None], axis=1
    )
    return TopPairs(boxes_xyxy=boxes, scores=best, query=pair % q)
