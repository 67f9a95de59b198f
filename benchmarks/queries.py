"""Times detection in one image with few and with many cached queries; prints JSON.

    python -m benchmarks.queries                       # OWLv2 B/16 at 960 pixels, 10 and 10,000

Parameters, image and query embeddings are random; embeddings are cached: no text tower runs. The
numbers of queries take turns, after a call each that compiles. `peak_bytes` is the most that the
process held (resident) during a call. Seconds of the processor (`cpu`) are what compares where
other work shares the cores.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import command
from benchmarks import train_step as train_benchmark
from benchmarks.inference import peak_resident, reset_peak
from owl_det.errors import ConfigError
from owl_det.inference.embeddings import QueryEmbeddings
from owl_det.inference.predictor import Predictor
from owl_det.modeling import build
from owl_det.types import LoadedModel


def make_predictor(model: str, seed: int = 0) -> Predictor:
    """A detector of `benchmarks.train_step.MODELS` with random parameters, in float32."""
    config = train_benchmark.make_config(model, "dense", dtype="float32")
    params = jax.jit(lambda: build.init_params(config, jax.random.key(seed)))()
    return Predictor(
        LoadedModel(
            params=params,
            config=config.model,
            preprocess=config.preprocess,
            eval_prompts="none",
            step=0,
        )
    )


def random_queries(predictor: Predictor, count: int, seed: int = 0) -> QueryEmbeddings:
    """Embeddings of `count` queries in one prompt."""
    rng = np.random.default_rng(seed)
    shape = (1, count, predictor.model.config.embedding_dim)
    return QueryEmbeddings(
        embeddings=rng.standard_normal(shape, np.float32),
        names=tuple(map(str, range(count))),
        checkpoint=predictor.checkpoint,
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All numbers of queries; ratios are to the first."""
    if min(arguments.repeats, *arguments.queries) < 1:
        raise ConfigError("--repeats and --queries: must be positive")
    predictor = make_predictor(arguments.model)
    side = predictor.model.config.image_size
    image = np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)
    queries = {count: random_queries(predictor, count) for count in arguments.queries}
    wall: dict[int, list[float]] = {count: [] for count in queries}
    cpu: dict[int, list[float]] = {count: [] for count in queries}
    peak: dict[int, list[int]] = {count: [] for count in queries}
    for _ in range(arguments.repeats + 1):
        for count, encoded in queries.items():
            reset_peak()
            starts = time.perf_counter(), time.process_time()
            predictor.detect([image], encoded, threshold=0.0)
            wall[count].append(time.perf_counter() - starts[0])
            cpu[count].append(time.process_time() - starts[1])
            peak[count].append(peak_resident())
    found = {
        count: {
            "wall_seconds": command.spread(wall[count][1:]),
            "cpu_seconds": command.spread(cpu[count][1:]),
            "peak_bytes": max(peak[count][1:]),
        }
        for count in queries
    }
    first = found[arguments.queries[0]]
    return {
        "machine": command.machine(),
        "load_average": os.getloadavg()[0],
        "model": arguments.model,
        "image_size": side,
        "repeats": arguments.repeats,
        "queries": found,
        "over_first": {
            count: {
                "wall": x["wall_seconds"]["median"] / first["wall_seconds"]["median"],
                "cpu": x["cpu_seconds"]["median"] / first["cpu_seconds"]["median"],
                "peak_bytes": x["peak_bytes"] / first["peak_bytes"],
            }
            for count, x in found.items()
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the measurements. Returns 2, with one line on stderr, for arguments of no use."""
    parser = command.parser(__doc__)
    parser.add_argument(
        "--model", choices=sorted(train_benchmark.MODELS), default="b16", help="its size"
    )
    parser.add_argument("--queries", type=int, nargs="+", default=[10, 10_000], help="numbers")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls")
    command.add_out(parser)
    arguments = parser.parse_args(argv)
    return command.report("queries", lambda: run(arguments), arguments.out)


if __name__ == "__main__":
    sys.exit(main())
