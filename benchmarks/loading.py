"""Times a fresh start of the predictor, from import to boxes; prints JSON.

    python -m benchmarks.loading CHECKPOINT   # or a StableHLO export

Each number is seconds of this process: importing the library, loading the model, the first call
(which compiles), and the median of more calls on the same picture.
"""

import json
import statistics
import sys
import time

from benchmarks import command

QUERIES = ("red circle", "blue square")
NUM_CALLS = 5


def measure(path: str) -> dict[str, object]:
    """Loads a checkpoint or export and runs it on one grey picture of the model's size."""
    times = [time.perf_counter()]
    import jax
    import numpy as np

    from owl_det import Predictor

    times.append(time.perf_counter())
    predictor = Predictor.load(path)
    jax.block_until_ready(predictor.model.params)
    times.append(time.perf_counter())
    side = predictor.model.config.image_size
    picture = np.full((side, side, 3), 128, np.uint8)
    for _ in range(1 + NUM_CALLS):
        predictor.detect([picture], QUERIES)
        times.append(time.perf_counter())
    imported, loaded, first, *calls = (b - a for a, b in zip(times, times[1:], strict=False))
    return {
        "path": path,
        "import_s": round(imported, 2),
        "load_s": round(loaded, 2),
        "first_detect_s": round(first, 2),
        "detect_s": round(statistics.median(calls), 4),
        "device": jax.devices()[0].device_kind,
    }


def main(argv: list[str] | None = None) -> int:
    parser = command.parser(__doc__)
    parser.add_argument("path", metavar="DIR", help="workdir, checkpoint or StableHLO export")
    arguments = parser.parse_args(argv)
    return command.exit_code("loading", lambda: print(json.dumps(measure(arguments.path))))


if __name__ == "__main__":
    sys.exit(main())
