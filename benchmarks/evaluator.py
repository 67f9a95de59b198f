"""Memory and time of the evaluator on synthetic detections. Prints one JSON line.

    python -m benchmarks.evaluator --num_images=20000 --num_categories=1203 --protocol=lvis

Memory is that of the process (resident) above what it held before the first image.
"""

import json
import resource
import sys
import time
from collections.abc import Sequence

import numpy as np
import psutil

from benchmarks import command
from data_pipelines.features import Category
from owl_det.errors import ConfigError
from owl_det.evaluation.coco import CocoEvaluator


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the measurements."""
    parser = command.parser(__doc__)
    parser.add_argument("--num_images", type=int, default=20_000, help="of 12 objects each")
    parser.add_argument("--num_categories", type=int, default=1203, help="of objects")
    parser.add_argument("--num_detections", type=int, default=300, help="per image")
    parser.add_argument(
        "--protocol", choices=("coco", "lvis", "fixed"), default="lvis", help="of the metrics"
    )
    parser.add_argument("--is_federated", action="store_true", help="LVIS-like negatives")
    arguments = vars(parser.parse_args(argv))
    return command.exit_code("evaluator", lambda: print(json.dumps(measure(**arguments))))


def measure(
    *,
    num_images: int,
    num_categories: int,
    num_detections: int,
    protocol: str,
    is_federated: bool,
) -> dict[str, float]:
    """Seconds and MiB; 12 instances an image, each found with some error.

    Raises `ConfigError` for a number that is not positive.
    """
    counts = {"images": num_images, "categories": num_categories, "detections": num_detections}
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"--num_{name}: must be positive, got {count}")
    rng = np.random.default_rng(0)
    evaluator = CocoEvaluator(
        [Category(id=i, name=str(i)) for i in range(1, num_categories + 1)],
        protocol,  # pyright: ignore[reportArgumentType]  # argparse has checked it
    )
    before = _rss()
    started = time.time()
    for image_id in range(num_images):
        true = _boxes(rng, 12)
        labels = rng.integers(1, num_categories + 1, 12)
        boxes = np.concatenate([true + rng.normal(0, 4, true.shape), _boxes(rng, num_detections)])
        found = np.concatenate([labels, rng.integers(1, num_categories + 1, num_detections)])
        kept = slice(0, num_detections)
        federated = {}
        if is_federated:
            negatives = rng.integers(1, num_categories + 1, 10).tolist()
            federated = {"negatives": negatives, "not_exhaustive": []}
        evaluator.add(
            image_id,
            (480, 640),
            (true, labels, np.zeros(12, bool)),
            (boxes[kept], rng.uniform(size=len(boxes))[kept], found[kept]),
            **federated,
        )
    added, seconds = _rss(), time.time() - started
    started = time.time()
    metrics = evaluator.compute()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "num_images": num_images,
        "AP": round(metrics.AP, 4),
        "add_seconds": round(seconds, 1),
        "compute_seconds": round(time.time() - started, 1),
        "growth_while_adding_mib": round((added - before) / 2**20),
        "peak_growth_mib": round((peak - before) / 2**20),
    }


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    low = rng.uniform(0, 400, (count, 2))
    return np.concatenate([low, low + rng.uniform(10, 200, (count, 2))], axis=1)


def _rss() -> int:
    return psutil.Process().memory_info().rss


if __name__ == "__main__":
    sys.exit(main())
