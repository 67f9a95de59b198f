"""Times the training input on mosaics of JPEG files against plain decoding; prints JSON.

    python -m benchmarks.input_pipeline
    python -m benchmarks.input_pipeline --images FOLDER     # your own JPEG files instead

Ours is all that `TrainInput` does for a mosaic of `--grid` x `--grid` images: reading files,
decoding, cropping, resizing, labels, queries, tokens and packing, on one thread. Plain is Pillow,
fully decoding the same files and shrinking each to its tile with antialiasing, and nothing else.
Least is Pillow decoding them at 1/8 and nothing else: the entropy coding of a JPEG has no short
cut, so no input is faster than that. They take turns, mosaic by mosaic. Seconds are of the
processor, so that other work on the core counts less.

Without `--images` the files are made: shapes over noise whose amplitude falls with the frequency
and whose contrast changes over the image, 480 to 1024 pixels a side, JPEG with halved chroma of
each `--quality`. They are as busy as photographs: 15 of those that scikit-learn, scikit-image,
Ultralytics, Gradio, imgaug and Matplotlib ship, at most 1024 pixels a side and encoded anew, have
1.23, 1.65 and 2.97 bits a pixel (medians; quality 75, 85 and 95) and made files 1.13, 1.57 and
3.00. Decoding at 1/8 is 36, 40 and 50 % of a full decode of those photographs, and 30, 38 and 47 %
of one of made files.

`feeding` is how many such cores keep one accelerator busy with the training step of OWLv2 B/16 at
960 pixels (half of the patches dropped), of which `--flops` and `--utilisation` say how many images
it takes a second.
"""

import argparse
import io
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from jaxtyping import Float64
from PIL import Image, ImageDraw, features

from benchmarks import command
from data_pipelines import image_ops
from data_pipelines.input import TrainInput
from owl_det.config import Config
from owl_det.config.resolve import resolve
from owl_det.errors import DataError

SIDES = (480, 1024)  # pixels, of made images
BOXES = 8  # in each image
# So that the files have as many bits a pixel as photographs (top of this file): a photograph's
# edges take fewer than noise of its spectrum, and some of it is smooth.
CALM = (1.0, 1.6)  # exponent of the spectrum, drawn for each image
PATCHINESS = 0.7  # standard deviation of the logarithm of the contrast over the image
NAMES = 80


def make_images(folder: Path, count: int, quality: int, seed: int = 0) -> list[Path]:
    """JPEG files of shapes over noise as busy as photographs; see `CALM` and `PATCHINESS`."""
    rng = np.random.default_rng(seed)
    paths = []
    for index in range(count):
        width, height = (int(x) for x in rng.integers(SIDES[0], SIDES[1] + 1, 2))
        noise = _noise(4, height, width, rng.uniform(*CALM), rng)
        # The colours of photographs go together: most of it is brightness.
        noise = 0.95 * noise[:1] + 0.3 * noise[1:]
        contrast = np.exp(PATCHINESS * _noise(1, height, width, max(CALM), rng))
        noise = 128 + 45 * noise * contrast / np.sqrt((contrast**2).mean())
        pixels = np.clip(noise, 0, 255).astype(np.uint8).transpose(1, 2, 0)
        image = Image.fromarray(np.ascontiguousarray(pixels))
        draw = ImageDraw.Draw(image)
        for _ in range(BOXES):
            x, y, w, h = rng.uniform(0, 0.7, 4) * (width, height, width, height)
            colour = tuple(int(c) for c in rng.integers(0, 256, 3))
            draw.ellipse((x, y, x + w / 2 + 8, y + h / 2 + 8), fill=colour)
        paths.append(folder / f"{index:05d}.jpg")
        image.save(paths[-1], quality=quality, subsampling="4:2:0")
    return paths


def _noise(
    count: int, height: int, width: int, calm: float, rng: np.random.Generator
) -> Float64[np.ndarray, "c h w"]:
    """Noise of amplitude 1 / frequency ** calm and random phase; each has standard deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = np.maximum(frequency, 1 / max(height, width)) ** -calm
    phases = rng.uniform(0, 2 * np.pi, (count, *frequency.shape))
    noise = np.fft.irfft2(amplitude * np.exp(1j * phases), s=(height, width))
    return noise / noise.std(axis=(1, 2), keepdims=True)


def write_labels(file: Path, paths: Sequence[Path], seed: int = 0) -> None:
    """COCO JSON with `BOXES` random boxes an image."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for index, path in enumerate(paths):
        height, width = image_ops.image_size(path.read_bytes())
        images.append({"id": index, "file_name": path.name, "width": width, "height": height})
        for _ in range(BOXES):
            w, h = rng.uniform(0.05, 0.5, 2) * (width, height)
            box = [rng.uniform(0, width - w), rng.uniform(0, height - h), w, h]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": int(rng.integers(NAMES)) + 1,
                    "bbox": [float(x) for x in box],
                    "area": float(w * h),
                    "iscrowd": 0,
                }
            )
    names = [{"id": i + 1, "name": f"object {i}"} for i in range(NAMES)]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": names}))


def make_config(labels: Path, folder: Path, grid: int, side: int) -> Config:
    """What configs/owlv2_b16.py does to images, in mosaics of one size."""
    from configs import owlv2_b16

    tree = owlv2_b16.get_config().to_dict()
    tree["model"]["image_size"] = side
    source = {"kind": "coco", "annotations": str(labels), "images": str(folder)}
    tree["data"]["train"], tree["data"]["eval"] = {"made": source}, {}
    tree["data"]["augment"]["mosaic_sizes"] = (grid,)
    tree["data"]["augment"]["mosaic_probabilities"] = (1.0,)
    return resolve(tree)


def plain(path: Path, side: int) -> np.ndarray:
    """A file, fully decoded and shrunk to `side` pixels."""
    image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR))


def least(path: Path) -> None:
    """Decodes a file at 1/8 of its size, which is hardly more than its entropy coding."""
    image = Image.open(io.BytesIO(path.read_bytes()))
    image.draft(None, (image.width // 8, image.height // 8))
    image.load()


def measure(data: TrainInput, paths: Sequence[Path], mosaics: int) -> dict[str, Any]:
    """Images a second of ours, of plain and at least, and ratios to plain, mosaic by mosaic."""
    grid = data.config.data.augment.mosaic_sizes[0]
    tile, count = data.config.model.image_size // grid, grid * grid
    ours, theirs, bound = [], [], []
    for number in range(mosaics + 1):
        places = [data.mixture.locate(number * data.max_tiles + i)[1] for i in range(count)]
        for rates, make in (
            (ours, lambda number=number: data.example(number)),
            (theirs, lambda places=places: [plain(paths[place], tile) for place in places]),
            (bound, lambda places=places: [least(paths[place]) for place in places]),
        ):
            started = time.process_time()
            make()
            rates.append(count / (time.process_time() - started))
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    bounds = [a / b for a, b in zip(bound, theirs, strict=True)]
    # The first reads files from the disk and imports what is lazy.
    return {
        "mosaics": mosaics,
        "tile_pixels": tile,
        "images_per_core_second": command.spread(ours[1:]),
        "plain_images_per_core_second": command.spread(theirs[1:]),
        "ratio": command.spread(ratios[1:]),
        "least_images_per_core_second": command.spread(bound[1:]),
        "least_ratio": command.spread(bounds[1:]),
    }


def feeding(images_per_core: float, grid: int, flops: float, utilisation: float) -> dict[str, Any]:
    """Cores that feed one accelerator which trains on mosaics of so many images.

    Raises `ConfigError` for a model that cannot be run.
    """
    from benchmarks import train_step
    from owl_det.training import flops as model_flops

    config = train_step.make_config("b16", "dropped")
    texts = model_flops.texts_per_image(config)
    per_mosaic = model_flops.flops_per_image(config, texts)
    mosaics = flops * utilisation / per_mosaic
    return {
        "assumed_flops_per_second": flops,
        "assumed_utilisation": utilisation,
        "texts_per_mosaic": texts,
        "flops_per_mosaic": per_mosaic,
        "mosaics_per_second": mosaics,
        "raw_images_per_second": mosaics * grid**2,
        "cores": math.ceil(mosaics * grid**2 / images_per_core),
    }


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Makes or finds the files and measures."""
    if min(arguments.grid, arguments.mosaics, arguments.num_images) < 1:
        raise DataError("--grid, --mosaics and --num_images: must be positive")
    sets: dict[str, Sequence[Path]] = {}
    if arguments.images:
        files = arguments.images.glob("*")
        sets["given"] = sorted(p for p in files if p.suffix.lower() in (".jpg", ".jpeg"))
        if not sets["given"]:
            raise DataError(f"{arguments.images}: no .jpg or .jpeg files there (--images)")
    else:
        for quality in arguments.quality:
            made = folder / f"quality_{quality}"
            made.mkdir()
            sets[made.name] = make_images(made, arguments.num_images, quality)
    return {
        "machine": {
            **command.processor(),
            "pillow": PIL.__version__,
            "libjpeg_turbo": features.version_feature("libjpeg_turbo"),
            "load_average_before": os.getloadavg()[0],
        },
        "grid": arguments.grid,
        "image_size": arguments.image_size,
        "sets": {
            name: run_set(paths, folder / f"{name}.json", arguments) for name, paths in sets.items()
        },
    }


def run_set(paths: Sequence[Path], labels: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The measurements on one set of files; `labels` is where their labels are written."""
    write_labels(labels, paths)
    config = make_config(labels, paths[0].parent, arguments.grid, arguments.image_size)
    sizes = [image_ops.image_size(path.read_bytes()) for path in paths]
    pixels = sum(height * width for height, width in sizes)
    measured = measure(TrainInput(config), paths, arguments.mosaics)
    median = measured["images_per_core_second"]["median"]
    return {
        "files": len(paths),
        "median_longer_side": statistics.median(max(size) for size in sizes),
        "bits_per_pixel": 8 * sum(path.stat().st_size for path in paths) / pixels,
        **measured,
        "feeding": feeding(median, arguments.grid, arguments.flops, arguments.utilisation),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the measurements. Returns 2, with one line on stderr, for arguments of no use."""
    parser = command.parser(__doc__)
    parser.add_argument("--images", type=Path, help="folder of JPEG files; default: made")
    parser.add_argument("--num_images", type=int, default=144, help="made files")
    parser.add_argument(
        "--quality", type=int, nargs="+", default=[75, 85, 95], help="of made files"
    )
    parser.add_argument("--grid", type=int, default=6, help="images a side of a mosaic")
    parser.add_argument("--image_size", type=int, default=960, help="of the mosaic, pixels")
    parser.add_argument("--mosaics", type=int, default=10, help="timed")
    parser.add_argument("--flops", type=float, default=989e12, help="of the accelerator; H200 bf16")
    parser.add_argument("--utilisation", type=float, default=0.5, help="share of them in use")
    command.add_out(parser)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        return command.report("input_pipeline", lambda: run(arguments, Path(folder)), arguments.out)


if __name__ == "__main__":
    sys.exit(main())
