"""The four distillation losses against plain NumPy, at their minimum, and where gradients go."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from owl_det.distillation import clipself, densevlm, gridclip, hierkd
from owl_det.losses import detection
from owl_det.types import Targets

B, R, E, C, N, M, Q = 3, 5, 8, 7, 16, 4, 6

# Compiled as a whole: operation by operation they take many times as long.
_region_loss, _image_loss = jax.jit(clipself.region_loss), jax.jit(gridclip.image_loss)
_alignment_loss = jax.jit(densevlm.alignment_loss, static_argnames=("threshold", "contrast"))
_grid_loss = jax.jit(gridclip.grid_loss, static_argnames=("alpha", "gamma"))
_instance_loss = jax.jit(hierkd.instance_loss, static_argnums=3)
_pool_cells = jax.jit(hierkd.pool_cells, static_argnums=(3, 4))
_caption_scores = jax.jit(hierkd.caption_scores)
_global_loss = jax.jit(hierkd.global_loss, static_argnums=4)


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _softmax(x: np.ndarray) -> np.ndarray:
    shifted = np.exp(x - x.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


IS_REGION = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]], bool)


def _reaches(loss: Callable[..., Any], *arrays: np.ndarray) -> list[bool]:
    """For each argument: is its gradient finite and not 0 somewhere?"""
    gradients = jax.grad(lambda *x: loss(*x).sum(), argnums=tuple(range(len(arrays))))(
        *map(jnp.asarray, arrays)
    )
    assert all(np.isfinite(g).all() for g in gradients)
    return [bool(np.abs(g).max() > 0) for g in gradients]


# --- CLIPSelf ------------------------------------------------------------------------------------


def test_clipself_equals_its_equation() -> None:
    student, teacher = _normal(0, B, R, E), _normal(1, B, R, E)
    found = _region_loss(*map(jnp.asarray, (student, teacher, IS_REGION)))
    cosine = (_unit(student) * _unit(teacher)).sum(-1)
    wanted = [np.mean(1 - cosine[i][IS_REGION[i]]) if IS_REGION[i].any() else 0 for i in range(B)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_clipself_is_zero_when_student_equals_teacher() -> None:
    teacher = jnp.asarray(_normal(1, B, R, E))
    loss = _region_loss(3.0 * teacher, teacher, jnp.asarray(IS_REGION))
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    assert _reaches(
        lambda s: _region_loss(s, teacher, jnp.asarray(IS_REGION)), _normal(2, B, R, E)
    ) == [True]


# --- DenseVLM ------------------------------------------------------------------------------------

IS_THING = np.array([1, 1, 1, 1, 0, 0, 0], bool)


def _densevlm(
    student: Any, teacher: Any, threshold: float = 0.3, contrast: Any = "decoupled"
) -> Any:
    return _alignment_loss(
        jnp.asarray(student),
        jnp.asarray(teacher),
        jnp.asarray(IS_THING),
        jnp.ones(student.shape[:2], bool),
        threshold=threshold,
        contrast=contrast,
    )


def _densevlm_by_hand(
    student: np.ndarray, teacher: np.ndarray, threshold: float, contrast: str
) -> list[float]:
    values = []
    for s, t in zip(student, teacher, strict=True):
        divergences = []
        for q_logits, p_logits in zip(s, t, strict=True):
            p = _softmax(p_logits)
            if p.max() <= threshold:
                continue
            held = np.ones(C, bool)
            if IS_THING[p.argmax()]:
                held = IS_THING if contrast != "all" else held
            elif contrast == "separate":
                held = ~IS_THING
            p, q = _softmax(p_logits[held]), _softmax(q_logits[held])
            divergences.append(np.sum(p * np.log(p / q)))
        values.append(float(np.mean(divergences)) if divergences else 0.0)
    return values


@pytest.mark.parametrize("contrast", ["decoupled", "all", "separate"])
def test_densevlm_equals_its_equations(contrast: Any) -> None:
    student, teacher = 2 * _normal(3, B, 20, C), 2 * _normal(4, B, 20, C)
    wanted = _densevlm_by_hand(
        student.astype(np.float64), teacher.astype(np.float64), 0.5, contrast
    )
    np.testing.assert_allclose(_densevlm(student, teacher, 0.5, contrast), wanted, rtol=1e-4)


def test_densevlm_logits_are_cosines_over_the_temperature() -> None:
    regions, names = _normal(5, B, R, E), _normal(6, C, E)
    found = densevlm.name_logits(jnp.asarray(regions), jnp.asarray(names), 0.01)
    wanted = np.einsum("bre,ce->brc", _unit(regions), _unit(names)) / 0.01
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


def test_densevlm_without_a_passing_region_is_zero_with_zero_gradient() -> None:
    student, teacher = 90 * _normal(3, B, R, C), _normal(4, B, R, C)
    assert not np.asarray(_densevlm(student, teacher, 1.0)).any()
    gradient = jax.grad(lambda s: _densevlm(s, teacher, 1.0).sum())(jnp.asarray(student))
    np.testing.assert_array_equal(gradient, 0)


def test_densevlm_is_zero_for_equal_students_and_reaches_them_alone() -> None:
    teacher = 5 * _normal(4, B, R, C)
    np.testing.assert_allclose(_densevlm(teacher, teacher), 0, atol=1e-5)
    assert _reaches(_densevlm, _normal(3, B, R, C), teacher) == [True, False]


def test_densevlm_things_do_not_see_stuff() -> None:
    """The gradient of a thing's region is 0 at stuff names, that of a stuff region is not."""
    teacher = np.zeros((1, 2, C), np.float32)
    teacher[0, 0, 1] = teacher[0, 1, 5] = 9
    gradient = jax.grad(lambda s: _densevlm(s, teacher).sum())(jnp.asarray(_normal(3, 1, 2, C)))
    assert not np.asarray(gradient)[0, 0, ~IS_THING].any()
    assert np.abs(np.asarray(gradient)[0, 1]).min() > 0


# --- GridCLIP ------------------------------------------------------------------------------------


def _targets() -> Targets:
    boxes = np.zeros((B, M, 4), np.float32)
    boxes[:, 0] = (0.5, 0.5, 0.9, 0.9)
    boxes[:, 1] = (0.4, 0.4, 0.3, 0.3)  # inside the first: it takes its tokens
    boxes[:, 2] = (0.8, 0.2, 0.3, 0.3)  # a crowd region
    labels = np.zeros((B, M, Q), bool)
    # The last query is not asked: its name gives no positive.
    labels[:, [0, 0, 0, 1, 2], [0, 3, Q - 1, 1, 2]] = True
    is_instance = np.zeros((B, M), bool)
    is_instance[:2, :2] = True
    return Targets(
        boxes=jnp.asarray(boxes),
        is_instance=jnp.asarray(is_instance),
        is_crowd=jnp.asarray(np.tile([False, False, True, False], (B, 1))),
        labels=jnp.asarray(labels),
        is_query=jnp.asarray(np.tile(np.arange(Q) < 5, (B, 1))),
    )


def _centres() -> np.ndarray:
    axis = (np.arange(4) + 0.5) / 4
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(N, 2)
    return np.tile(grid, (B, 1, 1)).astype(np.float32)


def _inside(point: np.ndarray, box: np.ndarray) -> bool:
    return bool((np.abs(point - box[:2]) < box[2:] / 2).all())


def test_gridclip_grid_equals_a_loop_over_tokens_and_queries() -> None:
    tokens, queries, centres, targets = (
        _normal(7, B, N, E),
        _normal(8, B, Q, E),
        _centres(),
        _targets(),
    )
    found = _grid_loss(
        *map(jnp.asarray, (tokens, queries, centres)),
        targets,
        jnp.log(10.0),
        jnp.asarray(-2.0),
        alpha=0.25,
        gamma=2.0,
    )
    boxes, labels = np.asarray(targets.boxes), np.asarray(targets.labels)
    for i in range(B):
        total, num_positive = 0.0, 0
        for n in range(N):
            holders = [
                m
                for m in (1, 0)
                if targets.is_instance[i, m] and _inside(centres[i, n], boxes[i, m])
            ]
            num_positive += bool(holders)
            for q in range(5):
                is_label = bool(holders) and labels[i, holders[0], q]
                if not is_label and q == 2 and _inside(centres[i, n], boxes[i, 2]):
                    continue
                p = 1 / (1 + np.exp(2 - 10 * _unit(tokens[i, n]) @ _unit(queries[i, q])))
                positive, negative = -0.25 * (1 - p) ** 2 * np.log(p), -0.75 * p**2 * np.log(1 - p)
                total += positive if is_label else negative
        np.testing.assert_allclose(found[i], total / max(num_positive, 1), rtol=1e-4)


def test_gridclip_image_equals_its_equation_and_is_zero_for_equals() -> None:
    adapted, teacher = _normal(9, B, R, E), _normal(10, B, R, E)
    found = _image_loss(*map(jnp.asarray, (adapted, teacher, IS_REGION)))
    distance = np.abs(_unit(adapted) - _unit(teacher)).mean(-1)
    wanted = [np.mean(distance[i][IS_REGION[i]]) if IS_REGION[i].any() else 0 for i in range(B)]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    same = _image_loss(*map(jnp.asarray, (2 * teacher, teacher, IS_REGION)))
    np.testing.assert_allclose(same, 0, atol=1e-6)


def test_gridclip_adapter_is_three_layers_whose_output_has_both_signs() -> None:
    params = gridclip.init_adapter(jax.random.key(0), E, 5)
    x = _normal(11, B, E)
    hidden = x.astype(np.float64)
    for i in range(3):
        hidden = hidden @ np.asarray(params[f"dense_{i}"]["kernel"], np.float64)
        hidden = np.maximum(hidden, 0) if i < 2 else hidden
    found = gridclip.adapt(params, jnp.asarray(x))
    np.testing.assert_allclose(found, hidden, rtol=1e-4, atol=1e-5)
    assert found.shape == (B, 5) and found.min() < 0 < found.max()


# --- HierKD --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_hierkd_instances_equal_their_equation(norm: Any) -> None:
    student, teacher = _normal(12, B, R, E), _normal(13, B, R, E)
    found = _instance_loss(*map(jnp.asarray, (student, teacher, IS_REGION)), norm)
    order = 1 if norm == "l1" else 2
    distance = np.linalg.norm(_unit(student) - _unit(teacher), ord=order, axis=-1)
    wanted = [np.mean(distance[i][IS_REGION[i]]) if IS_REGION[i].any() else 0 for i in range(B)]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    mask = jnp.asarray(IS_REGION)
    same = _instance_loss(2 * jnp.asarray(teacher), jnp.asarray(teacher), mask, norm)
    np.testing.assert_allclose(same, 0, atol=1e-5)
    at_minimum = jax.grad(lambda s: _instance_loss(s, s + 0.0, mask, norm).sum())(
        jnp.asarray(teacher)
    )
    assert np.isfinite(at_minimum).all()


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_hierkd_cells_equal_a_loop(pooling: Any) -> None:
    tokens, centres = _normal(14, B, N, E), _centres()
    kept = np.array([0, 2, 5, 7, 8, 13, 15])  # as after token dropping
    area = np.array([[0.5, 0.5, 1, 1], [0.4, 0.5, 0.8, 1], [0.25, 0.25, 0.5, 0.5]], np.float32)
    found, has_any = _pool_cells(
        *map(jnp.asarray, (tokens[:, kept], centres[:, kept], area)), 3, pooling
    )
    for i in range(B):
        for cell in range(9):
            row, column = divmod(cell, 3)
            low = area[i, :2] - area[i, 2:] / 2 + np.array([column, row]) * area[i, 2:] / 3
            inside = [
                n
                for n in kept
                if (low <= centres[i, n]).all() and (centres[i, n] < low + area[i, 2:] / 3).all()
            ]
            assert bool(has_any[i, cell]) == bool(inside)
            if inside:
                members = tokens[i, inside]
                pooled = members.max(0) if pooling == "max" else members.mean(0)
                np.testing.assert_allclose(found[i, cell], _unit(pooled), rtol=1e-4, atol=1e-5)
            else:
                np.testing.assert_array_equal(found[i, cell], 0)


def _scores_by_hand(captions: np.ndarray, cells: np.ndarray, is_cell: np.ndarray) -> np.ndarray:
    scores = np.zeros((len(captions), len(cells)))
    for t, caption in enumerate(captions):
        for b in range(len(cells)):
            keys = cells[b][is_cell[b]]
            gathered = _softmax(keys @ caption) @ keys
            scores[t, b] = gathered @ caption / np.linalg.norm(gathered)
    return scores


def test_hierkd_scores_and_contrast_equal_their_equations() -> None:
    captions, cells = _unit(_normal(15, B, E)), _unit(_normal(16, B, 9, E))
    is_cell = np.ones((B, 9), bool)
    is_cell[1, 3:] = False
    scores = _caption_scores(
        *(jnp.asarray(x, jnp.float32) for x in (captions, cells)), jnp.asarray(is_cell)
    )
    wanted = _scores_by_hand(captions, cells, is_cell)
    np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-5)
    same, is_counted = jnp.eye(B, dtype=bool), jnp.ones(B, bool)
    found = _global_loss(scores, same, is_counted, jnp.log(10.0), "contrastive")
    for i in range(B):
        over_captions = -np.log(_softmax(10 * wanted[:, i])[i])
        over_images = -np.log(_softmax(10 * wanted[i])[i])
        np.testing.assert_allclose(found[i], over_captions + over_images, rtol=1e-4)
    positive = _global_loss(scores, same, is_counted, jnp.log(10.0), "positive")
    np.testing.assert_allclose(positive, 1 - np.diagonal(wanted), rtol=1e-4)


def test_hierkd_contrast_leaves_out_pairs_without_a_caption() -> None:
    captions, cells = _unit(_normal(15, B, E)), _unit(_normal(16, B, 9, E))
    is_counted = jnp.array([True, True, False])

    def loss(captions: Any, cells: Any) -> Any:
        scores = _caption_scores(captions, cells, jnp.ones((B, 9), bool))
        return _global_loss(
            scores, jnp.eye(B, dtype=bool), is_counted, jnp.log(10.0), "contrastive"
        )

    arrays = [jnp.asarray(x, jnp.float32) for x in (captions, cells)]
    two = _global_loss(
        _caption_scores(arrays[0][:2], arrays[1][:2], jnp.ones((2, 9), bool)),
        jnp.eye(2, dtype=bool),
        jnp.ones(2, bool),
        jnp.log(10.0),
        "contrastive",
    )
    np.testing.assert_allclose(loss(*arrays), [*np.asarray(two), 0], rtol=1e-5)
    gradient = jax.grad(lambda c: loss(arrays[0], c).sum())(arrays[1])
    assert np.abs(gradient[:2]).max() > 0 and not np.asarray(gradient[2]).any()


def test_hierkd_samples_a_share_of_the_negatives_and_every_positive() -> None:
    is_positive = jnp.arange(4000) % 100 == 0
    kept = np.asarray(detection.sample_negatives(jax.random.key(1), is_positive, 0.1))
    assert kept[::100].all()
    # Five standard deviations of 3,960 draws.
    np.testing.assert_allclose(kept[np.arange(4000) % 100 != 0].mean(), 0.1, atol=0.024)
