"""Detection with a frozen model: what evaluation and the predictor share."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, UInt8

from data_pipelines import image_ops
from owl_det import boxes as box_lib
from owl_det.types import ImageFeatures, LoadedModel, Params, Predictions

if TYPE_CHECKING:  # an exported model is run by this module where Flax is not installed
    from owl_det.modeling.detector import Detector


class TokenScores(NamedTuple):
    """What every token of each image predicts."""

    boxes_xyxy: Float[Array, "b n 4"]  # relative to the padded square
    scores: Float[Array, "b n q"]  # probabilities, averaged over prompts; 0 for filler queries
    class_embeddings: Float[Array, "b n e"]  # unit length
    objectness_logits: Float[Array, "b n"]


class TopPairs(NamedTuple):
    """The best query-box pairs of each image, best first."""

    boxes_xyxy: Float[Array, "b k 4"]  # relative to the padded square
    scores: Float[Array, "b k"]
    query: Int[Array, "b k"]


class Functions(NamedTuple):
    """The pure functions that a predictor runs: of a checkpoint's modules, or of an export."""

    encode_queries: Callable[[Params, Int32[Array, "t q l"]], Float[Array, "t q e"]]
    score_tokens: Callable[
        [Params, UInt8[Array, "b H W 3"], Float[Array, "t q e"], Bool[Array, " q"]], TokenScores
    ]

    def detect(
        self,
        params: Params,
        image: UInt8[Array, "b H W 3"],
        query_embeddings: Float[Array, "t q e"],
        is_query: Bool[Array, " q"],
        *,
        top_k: int,
    ) -> TopPairs:
        """As the function `detect`."""
        return top_pairs(self.score_tokens(params, image, query_embeddings, is_query), top_k)


def functions_of(model: LoadedModel) -> Functions:
    """Those of a checkpoint."""
    from owl_det.modeling.detector import Detector

    detector = Detector(model.model, model.preprocess)
    return Functions(partial(encode_queries, detector), partial(score_tokens, detector))


def encode_queries(
    detector: "Detector", params: Params, tokens: Int32[Array, "t q l"]
) -> Float[Array, "t q e"]:
    """Embeddings of every query in each of its t prompts."""
    t, q, length = tokens.shape
    embeddings = detector.apply(
        {"params": params}, tokens.reshape(t * q, length), method="encode_text"
    )
    return cast(Array, embeddings).reshape(t, q, -1)


def detect(
    detector: "Detector",
    params: Params,
    image: UInt8[Array, "b H W 3"],
    query_embeddings: Float[Array, "t q e"],
    is_query: Bool[Array, " q"],
    *,
    top_k: int,
) -> TopPairs:
    """The `top_k` best of all query-box pairs; probabilities are averaged over the t prompts.

    Filler queries (`is_query` False) score 0.
    """
    return top_pairs(score_tokens(detector, params, image, query_embeddings, is_query), top_k)


def score_tokens(
    detector: "Detector",
    params: Params,
    image: UInt8[Array, "b H W 3"],
    query_embeddings: Float[Array, "t q e"],
    is_query: Bool[Array, " q"],
) -> TokenScores:
    """Boxes of every token and its scores for every query, averaged over the t prompts."""
    b, height, width = image.shape[:3]
    p = detector.config.image.patch_size
    variables = {"params": params}
    features = cast(ImageFeatures, detector.apply(variables, image, method="encode_image"))
    t, q, e = query_embeddings.shape
    queries = jnp.broadcast_to(query_embeddings[:, None], (t, b, q, e))
    is_query = jnp.broadcast_to(is_query[None], (b, q))
    predictions = cast(
        Predictions,
        detector.apply(
            variables,
            features,
            queries[0],
            is_query,
            grid=(height // p, width // p),
            method="predict",
        ),
    )

    def add_prompt(total: Array, prompt_queries: Array) -> tuple[Array, None]:
        logits = detector.apply(
            variables, features, prompt_queries, is_query, method="class_logits"
        )
        return total + jax.nn.sigmoid(cast(Array, logits)), None

    # From the first prompt on, although `predict` scored that: XLA drops what is unused, and an
    # export needs at least one round whatever t is.
    total, _ = jax.lax.scan(add_prompt, jnp.zeros_like(predictions.class_logits), queries)
    return TokenScores(
        boxes_xyxy=box_lib.cxcywh_to_xyxy(predictions.boxes),
        scores=total / t,
        class_embeddings=predictions.class_embeddings,
        objectness_logits=predictions.objectness_logits,
    )


def top_pairs(tokens: TokenScores, top_k: int) -> TopPairs:
    """The `top_k` best query-box pairs of each image, or all where there are fewer."""
    b, _, q = tokens.scores.shape
    scores = tokens.scores.reshape(b, -1)
    best, pair = jax.lax.top_k(scores, min(top_k, scores.shape[1]))
    boxes = jnp.take_along_axis(tokens.boxes_xyxy, (pair // q)[..., None], axis=1)
    return TopPairs(boxes_xyxy=boxes, scores=best, query=pair % q)


def pixel_boxes(
    boxes_xyxy: Float32[np.ndarray, "n 4"],
    height: int,
    width: int,
    geometry: Literal["pad", "stretch"],
) -> Float32[np.ndarray, "n 4"]:
    """Corners relative to the padded square → pixels of an image of this size, inside it.

    `geometry` is how the image came into the square (`config.PreprocessConfig`).
    """
    low, high = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
    centres = np.concatenate([(low + high) / 2, high - low], axis=1)
    return image_ops.boxes_from_padded(centres, height, width, geometry)
