"""Times the assignment of predictions to instances against other solvers; prints JSON.

    python -m benchmarks.matching

Solvers are `assigners.hungarian`, Optax's `hungarian_algorithm` with the fillers that its fixed
shapes need, and SciPy's `linear_sum_assignment` on the real instances alone. All are given one cost
matrix, which the training's own cost function makes of a 6 x 6 mosaic and predictions of a kind:

    start      boxes at the places of their tokens, all scores alike: before training
    clustered  each token has the box and, with noise, the class of the object that is nearest
    copies     all tokens show the same quarter of the objects; the others compete for what is left

Half of the instance slots are fillers. Seconds are of the processor, so that other work on the same
cores counts less; `excess` is the total cost above the optimum, found by SciPy in float64.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import linear_sum_assignment

from benchmarks import command
from owl_det.assigners.hungarian import cost_matrix, optimal_pairs
from owl_det.config import LossConfig
from owl_det.errors import ConfigError
from owl_det.types import Predictions, Targets

KINDS = ("start", "clustered", "copies")
GRID = 6  # tiles a side
NUM_QUERIES = 300


def costs(kind: str, num_tokens: int, num_instances: int, seed: int = 0) -> np.ndarray:
    """Costs [k, 2 m]: m instances, then as many fillers."""
    rng = np.random.default_rng(seed)
    side = round(num_tokens**0.5)
    if side**2 != num_tokens:
        raise ConfigError(f"--tokens: {num_tokens} is no square number")
    m, k = num_instances, num_tokens
    tiles = np.stack(np.divmod(rng.integers(GRID**2, size=m), GRID), axis=1)
    boxes = np.concatenate(
        [(tiles + rng.uniform(0.2, 0.8, (m, 2))) / GRID, rng.uniform(0.05, 0.9, (m, 2)) / GRID],
        axis=1,
    )
    labels = rng.integers(NUM_QUERIES, size=m)
    places = (np.stack(np.divmod(np.arange(k), side), axis=1) + 1) / side
    if kind == "start":
        found = np.concatenate([places, np.full((k, 2), 1 / side)], axis=1)
        found, logits = found + rng.normal(0, 0.01, (k, 4)), rng.normal(-4.6, 0.05, (k, 300))
    else:
        shown = np.abs(places[:, None] - boxes[None, :, :2]).sum(-1).argmin(1)
        if kind == "copies":
            shown = rng.integers(max(1, m // 4), size=k)
        found = boxes[shown] + rng.normal(0, 0.01, (k, 4))
        logits = rng.normal(-4, 0.5, (k, NUM_QUERIES))
        logits[np.arange(k), labels[shown]] += rng.normal(2, 1, k)
    predictions = Predictions(
        boxes=jnp.asarray(found, jnp.float32),
        class_logits=jnp.asarray(logits, jnp.float32),
        class_embeddings=jnp.zeros((k, 1)),
        objectness_logits=jnp.zeros(k),
        token_index=jnp.arange(k),
    )
    slots = np.concatenate([np.ones(m, bool), np.zeros(m, bool)])
    targets = Targets(
        boxes=jnp.asarray(np.concatenate([boxes, np.zeros((m, 4))]), jnp.float32),
        is_instance=jnp.asarray(slots),
        is_crowd=jnp.zeros(2 * m, bool),
        labels=jnp.asarray(
            (np.concatenate([labels, labels])[:, None] == np.arange(NUM_QUERIES)) & slots[:, None]
        ),
        is_query=jnp.ones(NUM_QUERIES, bool),
    )
    return np.asarray(cost_matrix(predictions, targets, LossConfig()))


def measure(kind: str, num_tokens: int, num_instances: int, repeats: int) -> dict[str, Any]:
    """Seconds of every solver on one matrix, taking turns."""
    cost = costs(kind, num_tokens, num_instances)
    m, is_instance = num_instances, np.arange(cost.shape[1]) < num_instances
    real = np.ascontiguousarray(cost[:, :m])
    filled = np.where(is_instance, cost, max(float(real.max()), 0.0) + 1.0)
    on_device = jnp.asarray(cost), jnp.asarray(is_instance), jnp.asarray(filled)
    ours, theirs = jax.jit(optimal_pairs), jax.jit(optax.assignment.hungarian_algorithm)

    def by_optax() -> np.ndarray:
        tokens, columns = (np.asarray(x) for x in theirs(on_device[2]))
        return tokens[np.argsort(columns)][:m]

    def by_scipy() -> np.ndarray:
        tokens, columns = linear_sum_assignment(real)
        return tokens[np.argsort(columns)]

    solvers: dict[str, Callable[[], np.ndarray]] = {
        "owl_det": lambda: np.asarray(ours(*on_device[:2]).prediction)[:m],
        "optax": by_optax,
        "scipy": by_scipy,
    }
    exact = real.astype(np.float64)
    optimum = exact[linear_sum_assignment(exact)].sum()
    excess = {name: float(exact[f(), np.arange(m)].sum() - optimum) for name, f in solvers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in solvers}
    for _ in range(repeats):
        for name, solve in solvers.items():
            started = time.process_time()
            solve()
            seconds[name].append(time.process_time() - started)
    medians = {name: command.spread(values) for name, values in seconds.items()}
    ours_median = medians["owl_det"]["median"]
    return {
        "kind": kind,
        "tokens": num_tokens,
        "instances": m,
        "slots": 2 * m,
        "cpu_seconds": medians,
        "excess": excess,
        "over_ours": {name: x["median"] / ours_median for name, x in medians.items()},
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All combinations in which instances are fewer than tokens."""
    if min(arguments.repeats, *arguments.tokens, *arguments.instances) < 1:
        raise ConfigError("--repeats, --tokens and --instances: must be positive")
    return {
        "machine": command.machine(),
        "load_average_before": os.getloadavg()[0],
        "repeats": arguments.repeats,
        "cases": [
            measure(kind, k, m, arguments.repeats)
            for kind in KINDS
            for k in arguments.tokens
            for m in arguments.instances
            if m < k
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the measurements. Returns 2, with one line on stderr, for arguments of no use."""
    parser = command.parser(__doc__)
    tokens, instances = [324, 1764, 3600], [100, 200, 400]
    parser.add_argument("--tokens", type=int, nargs="+", default=tokens, help="of an image")
    parser.add_argument("--instances", type=int, nargs="+", default=instances, help="of an image")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls")
    command.add_out(parser)
    arguments = parser.parse_args(argv)
    return command.report("matching", lambda: run(arguments), arguments.out)


if __name__ == "__main__":
    sys.exit(main())
