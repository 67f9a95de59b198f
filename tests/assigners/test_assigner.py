"""What predictions should be, by the assigner of the config."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from owl_det.assigners import assigner
from owl_det.assigners.hungarian import cost_matrix
from owl_det.config import Assigner, LossConfig
from owl_det.types import BACKGROUND, IGNORED, Assignment, Predictions, Targets

K, M, Q = 6, 3, 4


def _case() -> tuple[Predictions, Targets]:
    rng = np.random.default_rng(1)
    predictions = Predictions(
        boxes=jnp.asarray(rng.uniform(0.2, 0.8, (K, 4)), jnp.float32),
        class_logits=jnp.asarray(rng.normal(size=(K, Q)), jnp.float32),
        class_embeddings=jnp.zeros((K, 2)),
        objectness_logits=jnp.zeros(K),
        token_index=jnp.arange(K),
    )
    targets = Targets(
        boxes=jnp.asarray(rng.uniform(0.2, 0.8, (M, 4)), jnp.float32),
        is_instance=jnp.array([True, True, False]),
        is_crowd=jnp.zeros(M, bool),
        labels=jnp.asarray(rng.random((M, Q)) < 0.7),
        is_query=jnp.array([True, True, False, True]),
    )
    return predictions, targets


def test_every_kind_of_the_config_has_its_assigner() -> None:
    assert {Assigner().kind} == set(assigner.ASSIGNERS)


def test_hungarian_is_the_cheapest_pairing_by_scipy() -> None:
    predictions, targets = _case()
    assign, cost = (jax.jit(f, static_argnums=2) for f in (assigner.assign, cost_matrix))
    found = np.asarray(assign(predictions, targets, LossConfig()).instance)
    costs = np.asarray(cost(predictions, targets, LossConfig()))[:, :2]
    wanted = np.full(K, BACKGROUND)
    rows, columns = linear_sum_assignment(costs)
    wanted[rows] = columns
    np.testing.assert_array_equal(found, wanted)


def test_targets_are_those_of_each_predictions_instance() -> None:
    _, targets = _case()
    instance = [1, BACKGROUND, 0, IGNORED, 1, BACKGROUND]
    found = assigner.prediction_targets(Assignment(instance=jnp.asarray(instance)), targets)
    names = np.asarray(targets.labels) & np.asarray(targets.is_query)
    for k, i in enumerate(instance):
        assert bool(found.is_counted[k]) == (i != IGNORED)
        assert float(found.weight[k]) == (i >= 0)
        np.testing.assert_array_equal(found.labels[k], names[i] if i >= 0 else np.zeros(Q, bool))
        if i >= 0:
            np.testing.assert_array_equal(found.boxes[k], targets.boxes[i])


def test_without_a_slot_for_instances_all_is_background() -> None:
    predictions, targets = _case()
    none = jax.tree.map(lambda x: x[:0], targets)
    none = Targets(
        boxes=none.boxes,
        is_instance=none.is_instance,
        is_crowd=none.is_crowd,
        labels=none.labels,
        is_query=targets.is_query,
    )
    found = assigner.assign(predictions, none, LossConfig())
    assert (np.asarray(found.instance) == BACKGROUND).all()
    wanted = assigner.prediction_targets(found, none)
    assert not wanted.labels.any() and not wanted.weight.any() and wanted.is_counted.all()
