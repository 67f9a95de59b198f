"""Times search in saved image embeddings against detection in the images; prints JSON.

    python -m benchmarks.search --checkpoint WORKDIR

The images are PNG files of shapes world. Detection reads them, search reads the saved embeddings;
both are compiled before, encode the texts anew each time and take turns. Found boxes are compared.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import command
from data_pipelines import image_ops
from data_pipelines.shapes_world import ShapesWorld
from owl_det.errors import DataError
from owl_det.inference import embedding_files
from owl_det.inference.predictor import Detections, Predictor


def write_images(folder: Path, num_images: int, image_size: int) -> list[Path]:
    """PNG files of the test split."""
    world = ShapesWorld(split="test", image_size=image_size, num_images=num_images)
    paths = [folder / f"{index:06d}.png" for index in range(num_images)]
    for index, path in enumerate(paths):
        image_ops.decode_image(world[index].image).save(path)
    return paths


class Timed(NamedTuple):
    """What a task returned, and the seconds it took: of the clock and of the processors."""

    found: list[Detections]
    wall: float
    cpu: float


def timed(task: Callable[[], list[Detections]]) -> Timed:
    """Runs the task once."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = task()
    return Timed(found, time.perf_counter() - wall, time.process_time() - cpu)


def differences(ours: list[Detections], theirs: list[Detections]) -> dict[str, Any]:
    """How far two lists of detections of the same images are from each other."""
    same = [
        len(a) == len(b) and np.array_equal(a.labels, b.labels)
        for a, b in zip(ours, theirs, strict=True)
    ]
    pairs = [(a, b) for a, b, is_same in zip(ours, theirs, same, strict=True) if is_same and len(a)]
    return {
        "detections": sum(map(len, theirs)),
        "images_that_differ": len(same) - sum(same),
        "largest_box_difference_pixels": max(
            (float(np.abs(a.boxes - b.boxes).max()) for a, b in pairs), default=0.0
        ),
        "largest_score_difference": max(
            (float(np.abs(a.scores - b.scores).max()) for a, b in pairs), default=0.0
        ),
    }


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All measurements; `folder` takes images and embeddings."""
    if min(arguments.num_images, arguments.repeats, arguments.batch_size) < 1:
        raise DataError("--num_images, --repeats and --batch_size: must be positive")
    predictor = Predictor.load(arguments.checkpoint)
    side, batch_size = predictor.model.config.image_size, arguments.batch_size
    paths = write_images(folder, arguments.num_images, side)
    saved = folder / "embeddings"

    def embed() -> list[Detections]:
        with embedding_files.Writer(saved) as writer:
            writer.add(predictor.embed_images(paths, batch_size=batch_size))
        return []

    def detect() -> list[Detections]:
        predictor.forget_texts()
        return predictor.detect(paths, arguments.query, batch_size=batch_size)

    def search() -> list[Detections]:
        predictor.forget_texts()
        shards = embedding_files.read(saved)
        return [x for shard in shards for x in predictor.search(shard, arguments.query)]

    embedded = timed(embed)
    rounds = [(timed(detect), timed(search)) for _ in range(arguments.repeats + 1)]
    detected, searched = zip(*rounds[1:], strict=True)  # the first compiles
    seconds = {
        "detect_wall_seconds": statistics.median(turn.wall for turn in detected),
        "detect_cpu_seconds": statistics.median(turn.cpu for turn in detected),
        "search_wall_seconds": statistics.median(turn.wall for turn in searched),
        "search_cpu_seconds": statistics.median(turn.cpu for turn in searched),
    }
    return {
        "machine": command.machine(),
        "num_images": arguments.num_images,
        "image_size": side,
        "queries": len(arguments.query),
        "batch_size": batch_size,
        "embed_wall_seconds": embedded.wall,
        **seconds,
        "faster_wall": seconds["detect_wall_seconds"] / seconds["search_wall_seconds"],
        "faster_cpu": seconds["detect_cpu_seconds"] / seconds["search_cpu_seconds"],
        "bytes_per_image": sum(f.stat().st_size for f in saved.iterdir()) / arguments.num_images,
        **differences(searched[-1].found, detected[-1].found),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the measurements. Returns 2, with one line on stderr, for arguments of no use."""
    parser = command.parser(__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="workdir or checkpoint")
    parser.add_argument("--num_images", type=int, default=1000, help="searched")
    parser.add_argument("--query", action="append", help="repeat; default: red circle")
    parser.add_argument("--batch_size", type=int, default=32, help="of the detector")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls")
    command.add_out(parser)
    arguments = parser.parse_args(argv)
    arguments.query = arguments.query or ["red circle"]
    with tempfile.TemporaryDirectory() as folder:
        return command.report("search", lambda: run(arguments, Path(folder)), arguments.out)


if __name__ == "__main__":
    sys.exit(main())
