"""Detection with a frozen model, against the same computed prompt by prompt in NumPy."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines import image_ops
from owl_det.inference import query_token, ranking
from owl_det.modeling import build
from owl_det.modeling.owl import OwlDetector
from owl_det.types import TokenEmbeddings
from tests import tiny

RNG = np.random.default_rng(0)
IMAGE = jnp.asarray(RNG.integers(0, 256, (2, 32, 32, 3)), jnp.uint8)
PROMPTS = jnp.asarray(RNG.normal(size=(3, 4, 16)), jnp.float32)  # three prompts of four queries
IS_QUERY = jnp.array([True, True, False, True])
SQUARE = jnp.full((2, 2), 32)  # sizes of the images: nothing is padded


@pytest.fixture(scope="module")
def model() -> tuple[OwlDetector, Any]:
    config = tiny.config()
    return build.make_detector(config), tiny.params(config, seed=2)


def _detect(model: tuple[OwlDetector, Any], prompts: jax.Array, top_k: int) -> ranking.TopPairs:
    detector, params = model

    def run(params: Any) -> ranking.TopPairs:
        tokens = ranking.embed_image_tokens(detector, params, IMAGE)
        return ranking.rank(
            tokens, prompts, IS_QUERY, SQUARE, top_k=top_k, dtype=jnp.float32, geometry="pad"
        )

    return jax.tree.map(np.asarray, jax.jit(run)(params))


def test_probabilities_are_averaged_over_prompts(model: tuple[OwlDetector, Any]) -> None:
    detector, params = model
    features = jax.jit(lambda p: detector.apply({"params": p}, IMAGE, method="encode_image"))(
        params
    )
    is_query = jnp.tile(IS_QUERY[None], (2, 1))
    scores, boxes = np.zeros((2, 16, 4)), None
    for prompt in PROMPTS:
        out: Any = detector.apply(
            {"params": params}, features, jnp.tile(prompt[None], (2, 1, 1)), is_query,
            method="predict",
        )  # fmt: skip
        scores += np.asarray(jax.nn.sigmoid(out.class_logits)) / 3
        boxes = np.asarray(out.boxes)
    assert boxes is not None
    top = _detect(model, PROMPTS, 10)
    assert top.scores.shape == (2, 10) and top.boxes_xyxy.shape == (2, 10, 4)
    for image in range(2):
        order = np.argsort(-scores[image].ravel(), kind="stable")[:10]
        np.testing.assert_allclose(top.scores[image], scores[image].ravel()[order], rtol=1e-4)
        token, query = np.divmod(order, 4)
        # Neighbours of nearly equal score may stand in either order.
        assert sorted(top.query[image]) == sorted(query)
        centre, half = boxes[image][token, :2], boxes[image][token, 2:] / 2
        wanted = np.concatenate([centre - half, centre + half], 1)
        np.testing.assert_allclose(np.sort(top.boxes_xyxy[image], 0), np.sort(wanted, 0), atol=1e-4)


def test_fillers_score_nothing_and_top_k_is_bounded(model: tuple[OwlDetector, Any]) -> None:
    top = _detect(model, PROMPTS[:1], 1000)
    assert top.scores.shape == (2, 16 * 4)
    assert (np.diff(top.scores, axis=1) <= 0).all(), "best first"
    assert (top.scores[top.query == 2] == 0).all() and (top.query == 2).sum() == 32
    assert (top.scores[top.query != 2] > 0).all()


def test_queries_are_encoded_prompt_by_prompt(model: tuple[OwlDetector, Any]) -> None:
    detector, params = model
    tokens = np.zeros((2, 3, 8), np.int32)
    tokens[..., 0], tokens[..., 2] = 49406, 49407
    tokens[..., 1] = np.arange(1, 7).reshape(2, 3)
    together = jax.jit(lambda p: ranking.embed_prompts(detector, p, jnp.asarray(tokens)))(params)
    assert together.shape == (2, 3, 16)
    alone = jax.jit(
        lambda p: detector.apply({"params": p}, jnp.asarray(tokens[1, 2:]), method="encode_text")
    )(params)
    np.testing.assert_allclose(together[1, 2], alone[0], atol=1e-5)


@pytest.mark.parametrize("geometry", ["pad", "stretch"])
@pytest.mark.parametrize(("height", "width"), [(40, 20), (20, 40), (33, 33)])
def test_pixel_boxes_undo_the_geometry(
    height: int, width: int, geometry: Literal["pad", "stretch"]
) -> None:
    pixels = np.array([[1, 2, 15, 18], [0, 0, width, height]], np.float32)
    cxcywh = image_ops.boxes_to_padded(pixels, height, width, geometry)
    half = cxcywh[:, 2:] / 2
    xyxy = np.concatenate([cxcywh[:, :2] - half, cxcywh[:, :2] + half], 1)
    back = ranking.pixel_boxes(xyxy, height, width, geometry)
    np.testing.assert_allclose(back, pixels, atol=1e-4)
    beyond = np.array([[-0.5, -0.5, 2.0, 2.0]], np.float32)
    np.testing.assert_array_equal(
        ranking.pixel_boxes(beyond, height, width, geometry), [[0, 0, width, height]]
    )


# --- embedded tokens -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens(model: tuple[OwlDetector, Any]) -> TokenEmbeddings:
    detector, params = model
    embed = jax.jit(lambda p: ranking.embed_image_tokens(detector, p, IMAGE))
    return jax.tree.map(np.asarray, embed(params))


@pytest.mark.parametrize("top_k", [5, 1000])
def test_chunks_of_queries_change_nothing(tokens: TokenEmbeddings, top_k: int) -> None:
    queries = jnp.asarray(RNG.normal(size=(2, 7, 16)), jnp.float32)
    is_query = jnp.arange(7) != 4

    def run(query_chunk: int) -> ranking.TopPairs:
        rank = jax.jit(
            partial(
                ranking.rank,
                top_k=top_k,
                dtype=jnp.float32,
                geometry="pad",
                query_chunk=query_chunk,
            )
        )
        return jax.tree.map(np.asarray, rank(tokens, queries, is_query, SQUARE))

    together, chunked = run(512), run(3)
    assert together.scores.shape == (2, min(top_k, 16 * 7))
    np.testing.assert_allclose(chunked.scores, together.scores, rtol=1e-5)
    assert (np.diff(chunked.scores, axis=1) <= 0).all()
    assert chunked.query.min() >= 0 and chunked.query.max() < 7
    for image in range(2):
        rows = [
            np.column_stack([found.query[image], found.boxes_xyxy[image].round(4)])
            for found in (chunked, together)
        ]
        ours, theirs = (row[np.lexsort(row.T)] for row in rows)
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_tokens_of_highest_objectness_are_kept(tokens: TokenEmbeddings) -> None:
    kept = ranking.keep_tokens(jax.tree.map(jnp.asarray, tokens), 5, SQUARE, "pad")
    for image in range(2):
        order = np.argsort(-tokens.objectness_logits[image])[:5]
        for name in ("boxes", "class_embeddings", "logit_shift", "objectness_logits"):
            wanted = np.asarray(getattr(tokens, name))[image, order]
            np.testing.assert_array_equal(getattr(kept, name)[image], wanted)


def _corners(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate(
        [boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], axis=-1
    )


def _token_by_hand(boxes: np.ndarray, raw: np.ndarray, query: np.ndarray) -> int:
    """The authors' choice for one image, box by box; all boxes are corners."""
    overlaps, hulls = [], []
    for box in boxes:
        width, height = np.minimum(box[2:], query[2:]) - np.maximum(box[:2], query[:2])
        inside = max(width, 0) * max(height, 0)
        union = np.prod(box[2:] - box[:2]) + np.prod(query[2:] - query[:2]) - inside
        hull = np.prod(np.maximum(box[2:], query[2:]) - np.minimum(box[:2], query[:2]))
        overlaps.append(inside / union)
        hulls.append(inside / union - (hull - union) / hull)
    overlaps = overlaps if max(overlaps) > 0 else hulls
    worst = max(overlaps) - 0.2 * abs(max(overlaps))
    candidates = [i for i, overlap in enumerate(overlaps) if overlap >= worst]
    mean = raw.mean(0)
    return min(candidates, key=lambda i: float(raw[i] @ mean))


def test_query_token_is_the_authors_choice() -> None:
    b, n, e = 12, 40, 6
    centres = RNG.uniform(0.2, 0.5, (b, n, 2))
    boxes = np.concatenate([centres, RNG.uniform(0.1, 0.3, (b, n, 2))], -1).astype(np.float32)
    raw = RNG.normal(size=(b, n, e)).astype(np.float32)
    norm = np.linalg.norm(raw, axis=-1)
    embedded = TokenEmbeddings(
        boxes=jnp.asarray(boxes),
        class_embeddings=jnp.asarray(raw / norm[..., None]),
        embedding_norm=jnp.asarray(norm),
        logit_shift=jnp.zeros((b, n)),
        logit_scale=jnp.ones((b, n)),
        objectness_logits=jnp.asarray(RNG.normal(size=(b, n)), jnp.float32),
    )
    queries = boxes[:, 0] + RNG.normal(0, 0.01, (b, 4)).astype(np.float32)
    queries[0] = (0.9, 0.9, 0.02, 0.02)  # touches no box
    has_box = np.arange(b) != 5
    choose = partial(query_token.choose_query_token, geometry="pad")
    chosen = np.asarray(jax.jit(choose)(embedded, queries, has_box, np.full((b, 2), 100)))
    for image in range(b):
        wanted = _token_by_hand(_corners(boxes[image]), raw[image], _corners(queries[image]))
        if not has_box[image]:
            wanted = int(np.argmax(embedded.objectness_logits[image]))
        assert chosen[image] == wanted
    nearest = [
        np.argmax([-np.abs(box - q).sum() for box in x])
        for x, q in zip(boxes, queries, strict=True)
    ]
    assert (chosen != nearest).any(), "some choice differs from the nearest box"


# --- boxes that lie in the padding ---------------------------------------------------------------


def _tokens(boxes: np.ndarray, logits: np.ndarray) -> TokenEmbeddings:
    """One image's boxes (corners relative to the square); `logits` for a query of 1, 0, 0."""
    n = len(boxes)
    cxcywh = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)
    vectors = np.zeros((1, n, 3), np.float32)
    vectors[..., 0] = 1
    return TokenEmbeddings(
        boxes=jnp.asarray(cxcywh[None], jnp.float32),
        class_embeddings=jnp.asarray(vectors),
        embedding_norm=jnp.ones((1, n)),
        logit_shift=jnp.asarray(logits[None], jnp.float32) - 1,
        logit_scale=jnp.ones((1, n)),
        objectness_logits=jnp.asarray(logits[None], jnp.float32),
    )


# An image of 40 x 100 pixels: the square shows it in its upper 0.4.
WIDE = jnp.array([[40, 100]])
PLACES = np.array(
    [
        [0.1, 0.5, 0.3, 0.9],  # in the padding
        [0.1, 0.1, 0.3, 0.3],
        [0.5, 0.3, 0.7, 0.8],  # half in it
        [0.2, 0.4, 0.6, 0.8],  # begins where the image ends
        [-0.2, 0.1, 0.0, 0.3],  # left of the image
        [0.6, 0.0, 0.9, 0.2],
    ]
)
LOGITS = np.array([5.0, 1.0, 2.0, 4.0, 3.0, 0.0])
SHOWN = [2, 1, 5]  # best first


@pytest.mark.parametrize("query_chunk", [512, 2])
def test_boxes_in_the_padding_take_no_places(query_chunk: int) -> None:
    queries = jnp.asarray(np.eye(3)[None, [0, 1, 2]], jnp.float32)
    rank = partial(ranking.rank, dtype=jnp.float32, geometry="pad", query_chunk=query_chunk)
    is_query = jnp.array([True, False, False])
    found = rank(_tokens(PLACES, LOGITS), queries, is_query, WIDE, top_k=3)
    np.testing.assert_allclose(found.boxes_xyxy[0], PLACES[SHOWN], atol=1e-6)
    assert found.query[0].tolist() == [0, 0, 0]
    everything = rank(_tokens(PLACES, LOGITS), queries, is_query, WIDE, top_k=18)
    scores = np.asarray(everything.scores[0])
    assert (scores[:3] > 0).all() and (scores[3:9] == 0).all()  # fillers on boxes that are shown
    assert (scores[9:] == ranking.OUTSIDE).all()


def test_a_stretched_image_has_no_padding() -> None:
    assert np.asarray(ranking.shows_image(jnp.asarray(PLACES[None]), WIDE, "stretch")).tolist() == [
        [True, True, True, True, False, True]
    ]
    shown = np.asarray(ranking.shows_image(jnp.asarray(PLACES[None]), WIDE, "pad"))[0]
    assert np.flatnonzero(shown).tolist() == sorted(SHOWN)
    pixels = ranking.pixel_boxes(PLACES.astype(np.float32), 40, 100, "pad")
    np.testing.assert_array_equal(ranking.has_area(pixels), shown)


def test_nan_is_never_taken_for_padding() -> None:
    boxes = PLACES.copy()
    boxes[0] = np.nan
    assert bool(ranking.shows_image(jnp.asarray(boxes[None]), WIDE, "pad")[0, 0])


def test_tokens_in_the_padding_are_kept_and_chosen_last() -> None:
    tokens = _tokens(PLACES, LOGITS)
    kept = ranking.keep_tokens(tokens, 4, WIDE, "pad")
    assert np.asarray(kept.objectness_logits)[0].tolist() == [2.0, 1.0, 0.0, 5.0]
    choose = partial(query_token.choose_query_token, geometry="pad")
    nowhere, has_box = jnp.zeros((1, 4)), jnp.array([False])
    assert int(choose(tokens, nowhere, has_box, WIDE)[0]) == 2
    assert int(choose(tokens, nowhere, has_box, jnp.array([[100, 100]]))[0]) == 0
    # No predicted box touches this one, and the nearest lies in the padding.
    corner = jnp.array([[0.15, 0.39, 0.02, 0.01]])
    assert int(choose(tokens, corner, jnp.array([True]), WIDE)[0]) in SHOWN
    only_padding = _tokens(PLACES[[0, 3]], LOGITS[[0, 3]])
    assert int(choose(only_padding, nowhere, has_box, WIDE)[0]) == 0
