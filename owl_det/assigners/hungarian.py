"""One-to-one matching of predictions and instances: cost matrix and optimal assignment.

Costs follow the authors' code: focal class cost (positive minus negative), L1 on cxcywh and
negative GIoU, with the weights of the losses (arXiv 2205.06230, appendix A1.3).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from owl_det import boxes as box_lib
from owl_det.assigners.pairs import Pairs
from owl_det.config import LossConfig
from owl_det.losses.focal import focal_terms
from owl_det.types import Predictions, Targets

# Stands for a cost that is no number; far above real costs, far below float32's precision limits.
FORBIDDEN = 1e5


def cost_matrix(
    predictions: Predictions, targets: Targets, config: LossConfig
) -> Float[Array, "*b k m"]:
    """Cost of matching each prediction with each instance; fillers hold arbitrary numbers."""
    classes = focal_cost(
        predictions.class_logits, targets.labels & targets.is_query[..., None, :], config
    )
    l1 = jnp.abs(predictions.boxes[..., :, None, :] - targets.boxes[..., None, :, :]).sum(-1)
    giou = box_lib.pairwise_giou(
        box_lib.cxcywh_to_xyxy(predictions.boxes), box_lib.cxcywh_to_xyxy(targets.boxes)
    )
    return config.class_weight * classes + config.l1_weight * l1 - config.giou_weight * giou


def focal_cost(
    logits: Float[Array, "*b k q"], labels: Bool[Array, "*b m q"], config: LossConfig
) -> Float[Array, "*b k m"]:
    """Σ over an instance's labels of focal loss as positive minus focal loss as negative."""
    positive, negative = focal_terms(logits, config.focal_alpha, config.focal_gamma)
    return jnp.einsum("...kq,...mq->...km", positive - negative, labels.astype(jnp.float32))


def optimal_pairs(cost: Float[Array, "*b k m"], is_instance: Bool[Array, "*b m"]) -> Pairs:
    """Optimal assignment: min(k, number of instances) pairs of least total cost.

    Costs that are no finite numbers count as `FORBIDDEN`: such a pair is taken only where there
    is no other. Fillers are never matched.
    """
    if cost.shape[-1] == 0:
        empty = jnp.zeros(is_instance.shape, jnp.int32)
        return Pairs(prediction=empty, is_matched=is_instance)
    solve = _pairs_of_one
    for _ in range(cost.ndim - 2):
        solve = jax.vmap(solve)
    return solve(jax.lax.stop_gradient(cost), is_instance)


def _pairs_of_one(cost: Float[Array, "k m"], is_instance: Bool[Array, " m"]) -> Pairs:
    k, m = cost.shape
    cost = jnp.where(jnp.isfinite(cost), cost.astype(jnp.float32), FORBIDDEN).T
    # Instances may outnumber predictions: some then get none, which costs the same for each, and
    # more than any prediction. So no prediction is left over while an instance has none, and what
    # is paid for having none does not depend on who has none.
    none_cost = jnp.maximum(jnp.max(jnp.where(is_instance[:, None], cost, -jnp.inf)), 0.0) + 1.0
    none = jnp.broadcast_to(none_cost, (m, max(0, m - k)))
    prediction = cheapest_columns(jnp.concatenate([cost, none], axis=1), is_instance)
    is_matched = (prediction >= 0) & (prediction < k)
    return Pairs(prediction=jnp.where(is_matched, prediction, 0), is_matched=is_matched)


class _Matching(NamedTuple):
    """A partial matching of rows and columns; -1 where there is none."""

    discount: Float[Array, " c"]  # of each column, 0 or negative: its dual variable
    row: Int[Array, " c"]
    column: Int[Array, " r"]


def cheapest_columns(cost: Float[Array, "r c"], is_row: Bool[Array, " r"]) -> Int[Array, " r"]:
    """A column of its own for each row, at the least total cost; -1 for rows that are none.

    Successive shortest paths with column prices (Jonker and Volgenant 1987, Computing 38). Costs
    are finite, and there are at least as many columns as rows.

    Why the result is optimal: with a discount v ≤ 0 for each column, every matched row has the
    column that minimises cost - v, and columns that are not matched have v = 0. Then the total cost
    of any matching is at least Σ over rows of min(cost - v) plus Σ over columns of v, which is what
    this one costs. The start has v = 0 and gives rows the cheapest column of all, as long as it is
    free; most rows of a training step need no more. Each augmentation keeps both properties.
    """
    r, c = cost.shape
    rows = jnp.arange(r, dtype=jnp.int32)
    cheapest = _argmin(cost)
    # The first row that wants a column gets it; r = nobody.
    first = jnp.full(c, r, jnp.int32).at[cheapest].min(jnp.where(is_row, rows, r))
    is_first = is_row & (first[cheapest] == rows)
    start = _Matching(
        discount=jnp.zeros(c),
        row=jnp.where(first < r, first, -1),
        column=jnp.where(is_first, cheapest, -1),
    )

    def is_waiting(matching: _Matching) -> Bool[Array, " r"]:
        return is_row & (matching.column < 0)

    done = jax.lax.while_loop(
        lambda matching: jnp.any(is_waiting(matching)),
        lambda matching: _augment(cost, matching, jnp.argmax(is_waiting(matching))),
        start,
    )
    return done.column


class _Search(NamedTuple):
    """Dijkstra's algorithm from one row: over columns, through the rows that hold them."""

    distance: Float[Array, " c"]
    origin: Int[Array, " c"]  # the row from which the column is reached at this distance
    is_done: Bool[Array, " c"]
    column: Int[Array, ""]  # the nearest that is not done
    nearest: Float[Array, ""]  # its distance


def _augment(cost: Float[Array, "r c"], matching: _Matching, row: Int[Array, ""]) -> _Matching:
    """Matches one more row, along the shortest path to a free column."""

    def scan(search: _Search, row: Array, start: Array) -> _Search:
        """Looks at the columns from a row that is reached at the distance `start`."""
        through = start + cost[row] - matching.discount
        is_nearer = ~search.is_done & (through < search.distance)
        distance = jnp.where(is_nearer, through, search.distance)
        origin = jnp.where(is_nearer, row.astype(jnp.int32), search.origin)
        open_distance = jnp.where(search.is_done, jnp.inf, distance)
        column = _argmin(open_distance)
        return _Search(distance, origin, search.is_done, column, open_distance[column])

    def step(search: _Search) -> _Search:
        column = search.column
        row = matching.row[column]
        # The row's own column costs it nothing: the path came through that.
        start = search.nearest - (cost[row, column] - matching.discount[column])
        return scan(search._replace(is_done=search.is_done.at[column].set(True)), row, start)

    c = cost.shape[1]
    nowhere = _Search(
        distance=jnp.full(c, jnp.inf),
        origin=jnp.zeros(c, jnp.int32),
        is_done=jnp.zeros(c, bool),
        column=jnp.zeros((), jnp.int32),
        nearest=jnp.zeros(()),
    )
    first = scan(nowhere, row, jnp.zeros(()))

    def goes_on(search: _Search) -> Bool[Array, ""]:
        # The distance is infinite only under vmap, in an example that has no free column left
        # because it is finished, and is computed along with one that is not.
        return (matching.row[search.column] >= 0) & jnp.isfinite(search.nearest)

    found = jax.lax.while_loop(goes_on, step, first)
    discount = matching.discount + jnp.where(found.is_done, found.distance - found.nearest, 0.0)

    def shift(path: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        """Gives a column to the row it was reached from, which leaves its own to the next."""
        rows, columns, column, _ = path
        taker = found.origin[column]
        left = columns[taker]
        return rows.at[column].set(taker), columns.at[taker].set(column), left, taker == row

    path = matching.row, matching.column, found.column, jnp.array(False)
    rows, columns, _, _ = jax.lax.while_loop(lambda path: ~path[3], shift, path)
    return _Matching(discount, rows, columns)


def _argmin(x: Float[Array, "*b c"]) -> Int[Array, "*b"]:
    """The first of the least: two plain reductions, which a CPU does several times faster than
    XLA's argmin."""
    lowest = jnp.min(x, axis=-1, keepdims=True)
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return jnp.min(jnp.where(x == lowest, index, x.shape[-1]), axis=-1)


def match(predictions: Predictions, targets: Targets, config: LossConfig) -> Pairs:
    """The pairs of least total cost in each image."""
    return optimal_pairs(cost_matrix(predictions, targets, config), targets.is_instance)
