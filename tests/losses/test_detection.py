"""Detection losses against a computation in plain NumPy loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from owl_det.assigners.assigner import assign, prediction_targets
from owl_det.config import LossConfig, SelectionConfig
from owl_det.losses import detection
from owl_det.losses.total import total_loss
from owl_det.types import BACKGROUND, IGNORED, Assignment, Predictions, PredictionTargets, Targets

K, M, Q = 9, 4, 5


def _case(seed: int = 0) -> tuple[Predictions, Targets]:
    rng = np.random.default_rng(seed)

    def boxes(n: int) -> jax.Array:
        return jnp.asarray(
            np.concatenate([rng.uniform(0.2, 0.8, (n, 2)), rng.uniform(0.05, 0.4, (n, 2))], 1),
            jnp.float32,
        )

    predictions = Predictions(
        boxes=boxes(K),
        class_logits=jnp.asarray(rng.normal(size=(K, Q)) * 2, jnp.float32),
        class_embeddings=jnp.zeros((K, 2)),
        objectness_logits=jnp.asarray(rng.normal(size=K), jnp.float32),
        token_index=jnp.arange(K),
    )
    targets = Targets(
        boxes=boxes(M),
        is_instance=jnp.array([True, True, True, False]),
        is_crowd=jnp.zeros(M, bool),
        labels=jnp.asarray(rng.random((M, Q)) < 0.4).at[:, 0].set(True),
        is_query=jnp.array([True] * 4 + [False]),
    )
    return predictions, targets


# Compiled as a whole: operation by operation they take ten times as long.
_assign = jax.jit(assign, static_argnums=2)
_parts = jax.jit(detection.detection_losses, static_argnums=3)
_sum = jax.jit(total_loss, static_argnums=(3, 4))


def _wanted(predictions: Predictions, targets: Targets) -> PredictionTargets:
    return prediction_targets(_assign(predictions, targets, LossConfig()), targets)


def _total(
    predictions: Predictions, targets: Targets, **loss: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    wanted = _wanted(predictions, targets)
    return _sum(predictions, targets, wanted, LossConfig(**loss), SelectionConfig())


def _sigmoid(x: float) -> float:
    return 1 / (1 + np.exp(-x))


def _giou(a: np.ndarray, b: np.ndarray) -> float:
    def corners(box: np.ndarray) -> tuple[float, float, float, float]:
        cx, cy, w, h = (float(x) for x in box)
        return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2

    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = corners(a), corners(b)
    overlap = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - overlap
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return overlap / union - (hull - union) / hull


def _by_hand(
    predictions: Predictions, targets: Targets, assignment: Assignment
) -> dict[str, float]:
    logits = np.asarray(predictions.class_logits, np.float64)
    labels = np.zeros((K, Q), bool)
    pairs = [(k, int(i)) for k, i in enumerate(assignment.instance) if i >= 0]
    for prediction, instance in pairs:
        labels[prediction] = np.asarray(targets.labels[instance] & targets.is_query)
    total = 0.0
    for i in range(K):
        for j in range(Q):
            if not targets.is_query[j]:
                continue
            p = _sigmoid(logits[i, j])
            positive, negative = -0.3 * (1 - p) ** 2 * np.log(p), -0.7 * p**2 * np.log(1 - p)
            total += positive if labels[i, j] else negative
    l1 = giou = 0.0
    for prediction, instance in pairs:
        a, b = np.asarray(predictions.boxes[prediction]), np.asarray(targets.boxes[instance])
        low, high = (
            (a[:2] - a[2:] / 2) - (b[:2] - b[2:] / 2),
            (a[:2] + a[2:] / 2) - (b[:2] + b[2:] / 2),
        )
        l1 += np.abs(low).sum() + np.abs(high).sum()
        giou += 1 - _giou(a, b)
    objectness = 0.0
    for i in range(K):
        target = max(_sigmoid(logits[i, j]) for j in range(Q) if targets.is_query[j])
        o = _sigmoid(float(predictions.objectness_logits[i]))
        objectness -= (target * np.log(o) + (1 - target) * np.log(1 - o)) / K
    return {
        "class": total / max(labels.sum(), 1),
        "l1": l1 / max(len(pairs), 1),
        "giou": giou / max(len(pairs), 1),
        "objectness": objectness,
    }


@pytest.mark.parametrize("seed", range(4))
def test_parts_equal_a_computation_by_hand(seed: int) -> None:
    predictions, targets = _case(seed)
    assignment = _assign(predictions, targets, LossConfig())
    wanted = prediction_targets(assignment, targets)
    parts = _parts(predictions, targets, wanted, LossConfig())
    for name, value in _by_hand(predictions, targets, assignment).items():
        np.testing.assert_allclose(parts[name], value, rtol=2e-4, err_msg=name)
    total, _ = _total(predictions, targets, objectness_weight=3.0)
    wanted = parts["class"] + parts["l1"] + parts["giou"] + 3 * parts["objectness"]
    np.testing.assert_allclose(total, wanted, rtol=1e-4)


def test_an_image_without_a_query_teaches_no_objectness() -> None:
    """Of its tokens nothing is known: not that nothing is there."""
    predictions, targets = _case()
    nothing = dataclasses.replace(
        targets, is_query=jnp.zeros(Q, bool), is_instance=jnp.zeros(M, bool)
    )
    wanted = _wanted(predictions, nothing)
    parts = _parts(predictions, nothing, wanted, LossConfig())
    assert float(parts["objectness"]) == 0.0 and float(parts["class"]) == 0.0


def test_fillers_and_order_of_instances_change_nothing() -> None:
    predictions, targets = _case()
    total, _ = _total(predictions, targets)
    order = jnp.array([3, 2, 0, 1])
    moved = dataclasses.replace(
        targets,
        boxes=targets.boxes[order],
        is_instance=targets.is_instance[order],
        is_crowd=targets.is_crowd[order],
        labels=targets.labels[order],
    )
    filled = dataclasses.replace(
        targets, boxes=targets.boxes.at[3].set(0.0), labels=targets.labels.at[3].set(True)
    )
    for other in (moved, filled):
        again, _ = _total(predictions, other)
        np.testing.assert_allclose(again, total, rtol=1e-5)


def test_a_batch_holds_the_losses_of_its_images() -> None:
    cases = [_case(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *cases)
    together, _ = _total(*stacked)
    for i, case in enumerate(cases):
        alone, _ = _total(*case)
        np.testing.assert_allclose(together[i], alone, rtol=1e-5)


def test_predictions_in_a_crowd_region_are_not_background() -> None:
    predictions, targets = _case()
    none = dataclasses.replace(targets, is_instance=jnp.zeros(M, bool))
    crowd = dataclasses.replace(
        none,
        is_crowd=jnp.array([True, False, False, False]),
        boxes=targets.boxes.at[0].set(jnp.array([0.5, 0.5, 1.0, 1.0])),
        labels=jnp.zeros((M, Q), bool).at[0, 1].set(True),
    )
    background = prediction_targets(Assignment(instance=jnp.full(K, BACKGROUND)), crowd)
    with_crowd = detection.class_loss(predictions, crowd, background, LossConfig())
    p = _sigmoid(np.asarray(predictions.class_logits, np.float64)[:, [0, 2, 3]])
    np.testing.assert_allclose(with_crowd, (-0.7 * p**2 * np.log(1 - p)).sum(), rtol=2e-4)


def test_gradients_are_finite_without_instances() -> None:
    predictions, targets = _case()
    none = dataclasses.replace(targets, is_instance=jnp.zeros(M, bool), boxes=targets.boxes * 0)

    def loss(boxes: jax.Array) -> jax.Array:
        return _total(dataclasses.replace(predictions, boxes=boxes), none)[0]

    assert np.isfinite(jax.grad(loss)(predictions.boxes)).all()


def test_share_of_matched_tokens_in_the_top() -> None:
    is_positive = jnp.array([True, False, False, True])
    logits = jnp.array([5.0, 4.0, 3.0, 2.0])
    assert detection.matched_share_in_top_k(logits, is_positive, 2) == 0.5


def test_ignored_predictions_count_in_no_class_or_box_loss() -> None:
    """An assigner may leave a prediction out: it is neither its instance nor background."""
    predictions, targets = _case()
    instance = jnp.asarray([0, IGNORED, BACKGROUND] + [IGNORED] * (K - 3))
    wanted = prediction_targets(Assignment(instance=instance), targets)
    parts = _parts(predictions, targets, wanted, LossConfig())
    kept = dataclasses.replace(
        predictions,
        boxes=predictions.boxes[jnp.array([0, 2])],
        class_logits=predictions.class_logits[jnp.array([0, 2])],
        objectness_logits=predictions.objectness_logits[jnp.array([0, 2])],
    )
    pair = Assignment(instance=jnp.array([0, BACKGROUND]))
    alone = _parts(kept, targets, prediction_targets(pair, targets), LossConfig())
    for name in ("class", "l1", "giou"):
        np.testing.assert_allclose(parts[name], alone[name], rtol=1e-6, err_msg=name)


def test_an_instance_may_have_several_predictions() -> None:
    """Boxes count by the weights of all positive predictions, labels once for each of them."""
    predictions, targets = _case()
    instance = jnp.asarray([0, 0, 1] + [BACKGROUND] * (K - 3))
    wanted = prediction_targets(Assignment(instance=instance), targets)
    l1, giou = detection.box_losses(predictions.boxes, wanted)
    pairs = [(0, 0), (1, 0), (2, 1)]
    boxes = [(np.asarray(predictions.boxes[k]), np.asarray(targets.boxes[i])) for k, i in pairs]
    np.testing.assert_allclose(giou, np.mean([1 - _giou(a, b) for a, b in boxes]), rtol=1e-4)
    assert float(l1) > 0 and int(wanted.labels[0].sum()) == int(wanted.labels[1].sum()) > 0
