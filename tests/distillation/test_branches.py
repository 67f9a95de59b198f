"""What each branch takes of student and teacher: whole branches against loops in plain NumPy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from owl_det.config import (
    ClipSelfConfig,
    DenseVlmConfig,
    GridClipGridConfig,
    GridClipImageConfig,
    HierKdGlobalConfig,
    HierKdInstanceConfig,
)
from owl_det.distillation import clipself, densevlm, gridclip, hierkd
from owl_det.distillation.branch import Branch, BranchInputs
from owl_det.types import FeatureLevel, Features, Targets

B, E, SIDE = 2, 6, 4
# As after token dropping: of the first image the upper right quarter is gone.
KEPT = np.array([[0, 1, 4, 5, 8, 9, 10, 13, 14, 15], [0, 2, 3, 5, 6, 7, 9, 11, 12, 15]])
QUARTERS = [[x, y, 0.5, 0.5] for y in (0.25, 0.75) for x in (0.25, 0.75)]
REGIONS = np.tile(np.array([*QUARTERS, [0.5, 0.5, 1, 1]], np.float32), (B, 1, 1))
IS_REGION = np.array([[1, 1, 1, 0, 1], [1, 0, 1, 1, 1]], bool)
IS_COUNTED = IS_REGION & ~np.array([[0, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
# The first image is a mosaic of two, one above the other.
TILES = np.array([[[0.5, 0.25, 1, 0.5], [0.5, 0.75, 1, 0.5]], [[0.5, 0.5, 1, 1], [0] * 4]])
IS_TILE = np.array([[1, 1], [1, 0]], bool)


def _unit(x: Any) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _vectors(seed: int, *shape: int) -> np.ndarray:
    return _unit(_normal(seed, *shape, E)).astype(np.float32)


TOKENS = _vectors(0, B, KEPT.shape[1])


def _loss(branch: Branch, entry: Any, params: Any, inputs: BranchInputs) -> Any:
    """Compiled as a whole: operation by operation it takes many times as long."""
    return jax.jit(branch.loss, static_argnums=0)(entry, params, inputs)


def _features(tokens: np.ndarray) -> Features:
    index, grid = jnp.asarray(KEPT), (SIDE, SIDE)
    level = FeatureLevel(tokens=jnp.asarray(tokens), token_index=index, grid=grid, stride=1)
    return Features(levels=(level,))


def _inputs(signals: dict[str, np.ndarray] | None = None, **fields: Any) -> BranchInputs:
    given: dict[str, Any] = {
        "signals": jax.tree.map(jnp.asarray, signals or {}),
        "features": _features(TOKENS),
        "keys": jax.random.split(jax.random.key(0), B),
        "is_example": jnp.ones(B, bool),
        "tile_boxes": jnp.asarray(TILES, jnp.float32),
        "is_tile": jnp.asarray(IS_TILE),
        "region_boxes": jnp.asarray(REGIONS),
        "is_region": jnp.asarray(IS_REGION),
    }
    return BranchInputs(**(given | fields))


def _members(image: int, box: Any) -> list[int]:
    """The kept tokens whose patch lies in a box of whole patches."""
    centres = np.stack([KEPT[image] % SIDE, KEPT[image] // SIDE], -1) / SIDE + 0.5 / SIDE
    inside = (np.abs(centres - np.asarray(box)[:2]) < np.asarray(box)[2:] / 2).all(-1)
    return list(np.flatnonzero(inside))


def _pooled(image: int, box: Any) -> np.ndarray:
    return _unit(TOKENS[image, _members(image, box)].astype(np.float64).mean(0))


def _softmax(x: np.ndarray) -> np.ndarray:
    shifted = np.exp(x - x.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def test_clipself_sets_pooled_tokens_beside_their_own_crop() -> None:
    crops = _vectors(1, B, 5)
    found = _loss(clipself.BRANCH, ClipSelfConfig(weight=1.0), {}, _inputs({"regions": crops}))
    for i in range(B):
        each = [1 - _pooled(i, REGIONS[i, r]) @ crops[i, r] for r in np.flatnonzero(IS_COUNTED[i])]
        np.testing.assert_allclose(found[i], np.mean(each), rtol=1e-4)


@pytest.mark.parametrize("contrast", ["decoupled", "all", "separate"])
def test_densevlm_compares_the_models_by_their_own_texts(contrast: Any) -> None:
    """The teacher's space has another width, and the first two of five names are things."""
    entry = DenseVlmConfig(
        weight=1.0,
        things=("a", "b"),
        stuff=("c", "d", "e"),
        threshold=0.4,
        temperature=0.3,
        contrast=contrast,
    )
    names, theirs = _vectors(2, 5), _unit(_normal(3, 5, 4))
    dense = _unit(_normal(4, B, 5, 4))
    inputs = _inputs(
        {"dense_regions": dense.astype(np.float32)},
        names=jnp.asarray(names),
        teacher_names=jnp.asarray(theirs, jnp.float32),
    )
    found = _loss(densevlm.BRANCH, entry, {}, inputs)
    kinds = set()
    for i in range(B):
        each = []
        for r in np.flatnonzero(IS_COUNTED[i]):
            p = _softmax(dense[i, r] @ theirs.T / 0.3)
            if p.max() <= 0.4:
                continue
            is_thing = bool(p.argmax() < 2)
            kinds.add(is_thing)
            held = list(range(5))
            if contrast != "all" and is_thing:
                held = [0, 1]
            if contrast == "separate" and not is_thing:
                held = [2, 3, 4]
            p = _softmax((dense[i, r] @ theirs.T / 0.3)[held])
            q = _softmax((_pooled(i, REGIONS[i, r]) @ names.T / 0.3)[held])
            each.append((p * np.log(p / q)).sum())
        np.testing.assert_allclose(found[i], np.mean(each), rtol=1e-3)
    assert kinds == {True, False}


def test_gridclip_pools_every_tile() -> None:
    params = gridclip.init_adapter(jax.random.key(1), E, 3)
    tiles = _unit(_normal(5, B, 2, 3)).astype(np.float32)
    found = _loss(
        gridclip.IMAGE_BRANCH, GridClipImageConfig(weight=1.0), params, _inputs({"tiles": tiles})
    )
    for i in range(B):
        each = []
        for t in np.flatnonzero(IS_TILE[i]):
            hidden = _pooled(i, TILES[i, t])
            for k in range(3):
                hidden = hidden @ np.asarray(params[f"dense_{k}"]["kernel"], np.float64)
                hidden = np.maximum(hidden, 0) if k < 2 else hidden
            each.append(np.abs(_unit(hidden) - tiles[i, t]).mean())
        np.testing.assert_allclose(found[i], np.mean(each), rtol=1e-3)


def _one_object() -> Targets:
    """Of each image the lower left quarter, with the first of two names."""
    return Targets(
        boxes=jnp.tile(jnp.asarray(QUARTERS[2]), (B, 1, 1)),
        is_instance=jnp.ones((B, 1), bool),
        is_crowd=jnp.zeros((B, 1), bool),
        labels=jnp.tile(jnp.array([[[True, False]]]), (B, 1, 1)),
        is_query=jnp.ones((B, 2), bool),
    )


def _grid_branch(tokens: np.ndarray, queries: np.ndarray, scale: float, bias: float) -> Any:
    return _loss(
        gridclip.GRID_BRANCH,
        GridClipGridConfig(weight=1.0, focal_alpha=0.3, focal_gamma=1.5),
        {"log_scale": jnp.log(scale), "bias": jnp.asarray(bias)},
        _inputs(
            features=_features(tokens),
            queries=jnp.asarray(np.tile(queries, (B, 1, 1))),
            targets=_one_object(),
        ),
    )


def test_gridclip_holds_tokens_against_the_queries() -> None:
    queries = _vectors(6, 2)
    found = _grid_branch(TOKENS, queries, 4.0, -1.5)
    for i in range(B):
        inside, total = _members(i, QUARTERS[2]), 0.0
        for n in range(KEPT.shape[1]):
            for q in range(2):
                p = 1 / (1 + np.exp(1.5 - 4 * TOKENS[i, n].astype(np.float64) @ queries[q]))
                is_positive = n in inside and q == 0
                total -= 0.3 * (1 - p) ** 1.5 * np.log(p) if is_positive else 0
                total -= 0 if is_positive else 0.7 * p**1.5 * np.log(1 - p)
        np.testing.assert_allclose(found[i], total / len(inside), rtol=1e-3)


def test_gridclip_is_least_where_tokens_are_their_names() -> None:
    """Tokens of the object on its name, the others opposite to both names: a loss of nothing."""
    queries = np.eye(2, E, dtype=np.float32)
    perfect = np.tile(_unit(-queries.sum(0)), (B, KEPT.shape[1], 1)).astype(np.float32)
    for i in range(B):
        perfect[i, _members(i, QUARTERS[2])] = queries[0]
    assert _grid_branch(perfect, queries, 40.0, -10.0).max() < 1e-4
    assert _grid_branch(-perfect, queries, 40.0, -10.0).min() > 1


@pytest.mark.parametrize("objective", ["contrastive", "positive"])
def test_hierkd_compares_captions_with_the_cells_of_their_tile(objective: Any) -> None:
    """Of the mosaic the second tile alone has a caption."""
    captions, words = _vectors(8, B, 2), np.arange(B * 2 * 3).reshape(B, 2, 3)
    is_caption, of = np.array([[0, 1], [1, 0]], bool), (1, 0)
    found = _loss(
        hierkd.GLOBAL_BRANCH,
        HierKdGlobalConfig(weight=1.0, grid_side=2, objective=objective),
        {"log_scale": jnp.log(5.0)},
        _inputs(
            {"captions": captions},
            caption_tokens=jnp.asarray(words, jnp.int32),
            is_caption=jnp.asarray(is_caption),
        ),
    )
    scores = np.zeros((B, B))
    for b in range(B):
        x, y, w, h = TILES[b, of[b]]
        cells = [[x + i * w / 4, y + j * h / 4, w / 2, h / 2] for j in (-1, 1) for i in (-1, 1)]
        members = [_members(b, cell) for cell in cells]
        keys = np.stack([_unit(TOKENS[b, m].max(0)) for m in members if m])
        for t in range(B):
            caption = captions[t, of[t]].astype(np.float64)
            gathered = _softmax(keys @ caption) @ keys
            scores[t, b] = gathered @ caption / np.linalg.norm(gathered)
    wanted = 1 - np.diagonal(scores)
    if objective == "contrastive":
        wanted = -np.log(np.diagonal(_softmax(5 * scores))) - np.log(
            np.diagonal(_softmax(5 * scores.T))
        )
    np.testing.assert_allclose(found, wanted, rtol=1e-3)


def test_hierkd_is_least_where_cells_are_their_caption() -> None:
    """Cells equal to one's own caption, captions opposite: "positive" 0, the contrast its bound."""
    caption = _unit(_normal(9, E)).astype(np.float32)
    captions = np.stack([caption, -caption])
    cells = np.repeat(captions[:, None], 9, axis=1)
    scores = hierkd.caption_scores(
        jnp.asarray(captions), jnp.asarray(cells), jnp.ones((2, 9), bool)
    )
    same, every = jnp.eye(2, dtype=bool), jnp.ones(2, bool)
    positive = hierkd.global_loss(scores, same, every, jnp.log(10.0), "positive")
    np.testing.assert_allclose(positive, 0, atol=1e-5)
    # Scores are 1 and -1, so that either softmax puts 1 / (1 + exp(-2 · scale)) on the own pair.
    contrast = hierkd.global_loss(scores, same, every, jnp.log(1.5), "contrastive")
    np.testing.assert_allclose(contrast, 2 * np.log1p(np.exp(-3.0)), rtol=1e-4)


def test_hierkd_embeds_crops_of_predicted_boxes() -> None:
    """Grown by half and cut to their tile; a matched token with a poor box does not count."""
    truth = np.array([[[0.2, 0.25, 0.4, 0.3]], [[0.6, 0.6, 0.2, 0.2]]], np.float32)
    predicted = truth + np.array([[[0.02, 0.0, 0.0, 0.0]], [[0.2, 0.0, 0.0, 0.0]]], np.float32)
    tokens, projection = _vectors(10, B, 1), _normal(11, 4, E)

    def embed(boxes: Any) -> Any:
        vectors = jnp.einsum("bmc,ce->bme", boxes, jnp.asarray(projection))
        return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)

    targets = dataclasses.replace(
        _one_object(), boxes=jnp.asarray(truth), labels=jnp.ones((B, 1, 2), bool)
    )
    inputs = _inputs(
        targets=targets,
        instance_tokens=jnp.asarray(tokens),
        instance_boxes=jnp.asarray(predicted),
        is_matched=jnp.ones((B, 1), bool),
        embed_boxes=embed,
    )
    entry = HierKdInstanceConfig(weight=1.0, boxes="predicted", crop_scale=1.5, max_crops=1)
    found = _loss(hierkd.INSTANCE_BRANCH, entry, {}, inputs)
    # (0.22, 0.25) ± (0.3, 0.225), the left side cut at 0: of the upper tile, 0 to 0.5 high.
    grown = [0.26, 0.25, 0.52, 0.45]
    wanted = np.abs(tokens[0, 0] - _unit(np.array(grown) @ projection)).sum()
    np.testing.assert_allclose(found, [wanted, 0.0], rtol=1e-3)
