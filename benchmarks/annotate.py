"""Times the parts of pseudo-annotation on one device; prints JSON.

    python -m benchmarks.annotate --model tiny
    python -m benchmarks.annotate --model b16 --dtype bfloat16     # on a GPU

Parameters are random and images come from shapes world, enlarged to `--source_size` and encoded as
JPEG, so decoding costs what it costs for photographs of that size. `stages` times each part of the
work on one batch alone; `job` is the whole pipeline, in which decoding runs beside the device.
`growth` is the cost of more queries: texts are encoded once, heads run for every image.
"""

import argparse
import io
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from benchmarks import command
from benchmarks import train_step as train_benchmark
from data_pipelines.pseudo_records import ShardWriter, encode_image
from data_pipelines.readers.image_text_shards import Sample
from data_pipelines.shapes_world import ShapesWorld
from owl_det.annotate.annotator import Annotated, Annotator
from owl_det.annotate.label_spaces import Curated, LabelSpace
from owl_det.errors import ConfigError
from owl_det.modeling import build
from owl_det.modeling.build import call, detector_of
from owl_det.types import LoadedModel


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All measurements of one model. Raises `ConfigError` for arguments of no use."""
    if min(arguments.batch_size, arguments.num_images, *arguments.queries) < 1:
        raise ConfigError("--batch_size, --num_images and --queries: must be positive")
    if arguments.num_images < arguments.batch_size:
        raise ConfigError("--num_images: fewer than --batch_size")
    config = train_benchmark.make_config(
        arguments.model, "dense", dtype=arguments.dtype, image_size=arguments.image_size
    )
    model = LoadedModel(
        params=jax.jit(lambda: build.init_params(config, jax.random.key(0)))(),
        config=config.model,
        preprocess=config.preprocess,
        eval_prompts=arguments.prompts,
        step=0,
    )
    samples = make_samples(arguments.num_images, arguments.source_size)
    space = LabelSpace(
        curated=_names(arguments.num_curated),
        phrases="ngrams",
        max_ngrams=arguments.max_ngrams,
        curated_factor=0.3,
    )
    annotator = Annotator(model, space, batch_size=arguments.batch_size, floor=0.0)
    return {
        "machine": command.machine(),
        "model": arguments.model,
        "image_size": config.model.image_size,
        "source_size": arguments.source_size,
        "dtype": config.model.dtype,
        "batch_size": arguments.batch_size,
        "prompts": arguments.prompts,
        "num_curated": arguments.num_curated,
        "max_ngrams": arguments.max_ngrams,
        "stages": stages(annotator, samples),
        "job": whole_job(annotator, samples),
        "growth": [growth(model, arguments.batch_size, size) for size in arguments.queries],
    }


def make_samples(count: int, side: int) -> list[Sample]:
    """JPEG files of `side` pixels with captions."""
    world = ShapesWorld(num_images=count)
    samples = []
    for index in range(count):
        record, buffer = world[index], io.BytesIO()
        image = Image.fromarray(np.asarray(record.image)).resize((side, side))
        image.save(buffer, format="JPEG", quality=90)
        samples.append(Sample(key=str(index), image=buffer.getvalue(), texts=record.captions))
    return samples


def stages(annotator: Annotator, samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Seconds an image of each part, and its share of their sum; decoding is on one thread."""
    batch = list(samples[: annotator.batch_size])
    b = len(batch)
    side = annotator.model.config.image_size
    pixels = np.zeros((annotator.batch_size, side, side, 3), np.uint8)
    queries = list({q for sample in batch for q in annotator.space.of_image(sample.texts)})
    detector = detector_of(annotator.model.config, annotator.model.preprocess)
    tower = jax.jit(lambda params, x: call(detector.encode_image, params, x))
    image_seconds = seconds(lambda: tower(annotator.model.params, pixels)) / b
    all_seconds = seconds(lambda: annotator.score(pixels, [()] * annotator.batch_size, {})) / b
    found = [item for item in annotator.annotate(batch) if isinstance(item, Annotated)]
    values = {
        "decode": seconds(lambda: [annotator.decode(sample) for sample in batch]) / b,
        "image_tower": image_seconds,
        "text_tower": seconds(lambda: annotator.encode(queries, Counter())) / b,
        "heads": max(0.0, all_seconds - image_seconds),
        "writing": seconds(lambda: _write(found)) / b,
    }
    total = sum(values.values())
    return {name: {"seconds": v, "share": v / total} for name, v in values.items()}


def whole_job(annotator: Annotator, samples: Sequence[Sample]) -> dict[str, float]:
    """Images and distinct queries a second of a shard, after one to compile."""
    list(annotator.annotate(samples[: annotator.batch_size]))
    counts: Counter[str] = Counter()
    started = time.perf_counter()
    _write([x for x in annotator.annotate(samples, counts) if isinstance(x, Annotated)])
    elapsed = time.perf_counter() - started
    return {
        "images": len(samples),
        "distinct_queries": counts["encoded queries"],
        "images_per_second": len(samples) / elapsed,
        "queries_per_second": counts["encoded queries"] / elapsed,
    }


def growth(model: LoadedModel, batch_size: int, queries: int) -> dict[str, float]:
    """Seconds to encode so many shared queries once, and to run an image with them."""
    side = model.config.image_size
    pixels = np.zeros((batch_size, side, side, 3), np.uint8)
    names = _names(queries)
    annotator = Annotator(model, LabelSpace(curated=names), batch_size=batch_size)
    own: list[tuple[str, ...]] = [()] * batch_size
    return {
        "queries": queries,
        "encode_seconds": seconds(lambda: annotator.encode(names.names, Counter()), 1),
        "image_seconds": seconds(lambda: annotator.score(pixels, own, {})) / batch_size,
    }


def seconds(function: Callable[[], Any], repeats: int = 3) -> float:
    """The least of some runs, after one that compiles."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - started)
    return min(times)


def _write(found: Sequence[Annotated]) -> None:
    with tempfile.TemporaryDirectory() as folder, ShardWriter(Path(folder), 0, 1) as writer:
        for item in found:
            writer.add(item.record, encode_image(item.image))
        writer.finish({})


def _names(count: int) -> Curated:
    return Curated(names=tuple(f"thing {i:05d}" for i in range(count)), dropped=())


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument(
        "--model", choices=sorted(train_benchmark.MODELS), default="tiny", help="its size"
    )
    parser.add_argument("--image_size", type=int, help="side in pixels; default: the model's")
    parser.add_argument("--source_size", type=int, default=640, help="side of the JPEG files")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of matrix work")
    parser.add_argument(
        "--prompts", choices=("none", "clip_best7"), default="clip_best7", help="around names"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="images at a time")
    parser.add_argument("--num_images", type=int, default=64, help="in all")
    parser.add_argument("--num_curated", type=int, default=2520, help="size of the paper's space")
    parser.add_argument("--max_ngrams", type=int, default=300, help="of a caption")
    parser.add_argument(
        "--queries", type=int, nargs="*", default=[10, 100, 1000, 10_000], help="for the growth"
    )
    command.add_out(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the measurements. Returns 2, with one line on stderr, for arguments of no use."""
    arguments = _parse(argv)
    return command.report("annotate", lambda: run(arguments), arguments.out)


if __name__ == "__main__":
    sys.exit(main())
