"""The `owl-det` command. Heavy imports happen inside the handlers, so that help is instant."""

import argparse
import json
import sys
from pathlib import Path

from owl_det.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand. Returns 0, 1 if some images failed, or 2 for a user's error."""
    parser = argparse.ArgumentParser(prog="owl-det", description="Open-vocabulary detection.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_predict(commands)
    _add_evaluate(commands)
    _add_sample(commands)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except UserError as error:
        print(f"owl-det: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _add_predict(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("predict", help="detect named things in images")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files or folders")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="workdir or checkpoint")
    parser.add_argument("--query", action="append", required=True, help="what to look for; repeat")
    parser.add_argument("--threshold", type=float, default=0.1)
    parser.add_argument("--top_k", type=int, default=300, help="query-box pairs per image")
    parser.add_argument("--out", metavar="DIR", help="where to write drawn pictures")
    parser.set_defaults(run=_predict)


def _predict(arguments: argparse.Namespace) -> int:
    """One JSON line an image on stdout; pictures with `--out`."""
    from tqdm import tqdm

    from data_pipelines.image_ops import UnreadableImage
    from owl_det.predictor import Predictor

    paths = _image_paths(arguments.images)
    predictor = Predictor.load(arguments.checkpoint)
    num_failed = 0
    for path in tqdm(paths, unit="image", disable=len(paths) < 5):
        try:
            (found,) = predictor.detect(
                [path], arguments.query, threshold=arguments.threshold, top_k=arguments.top_k
            )
        except UnreadableImage as error:
            print(f"owl-det: skipped {error}", file=sys.stderr)
            num_failed += 1
            continue
        detections = [
            {
                "query": arguments.query[label],
                "label": int(label),
                "score": round(float(score), 5),
                "box": [round(float(x), 2) for x in box],
            }
            for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True)
        ]
        print(json.dumps({"image": str(path), "detections": detections}), flush=True)
        if arguments.out:
            _draw(path, _picture_path(Path(arguments.out), path, paths), detections)
    if num_failed:
        print(f"owl-det: {num_failed} of {len(paths)} images could not be read", file=sys.stderr)
    return 1 if num_failed else 0


def _image_paths(arguments: list[str]) -> list[Path]:
    """The named files, and all images of the named folders. Raises `UserError` if one is absent."""
    paths: list[Path] = []
    for path in map(Path, arguments):
        if path.is_dir():
            paths += sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        elif path.exists():
            paths.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    if not paths:
        raise UserError(f"no images in {', '.join(arguments)}")
    return paths


def _picture_path(out: Path, path: Path, paths: list[Path]) -> Path:
    """`<out>/<stem>.png`; with the folder's name in front where two stems are the same."""
    is_alone = sum(other.stem == path.stem for other in paths) == 1
    name = path.stem if is_alone else f"{path.parent.name}_{path.name}"
    return out / f"{name}.png"


def _draw(path: Path, target: Path, detections: list[dict[str, object]]) -> None:
    import numpy as np

    from data_pipelines import image_ops
    from owl_det import viz

    image = np.asarray(image_ops.decode_image(path.read_bytes()))
    boxes = np.array([d["box"] for d in detections], np.float32).reshape(-1, 4)
    scores = np.array([d["score"] for d in detections], np.float32)
    target.parent.mkdir(parents=True, exist_ok=True)
    labels = [str(d["query"]) for d in detections]
    viz.save_png(target, viz.draw_detections(image, boxes, labels, scores))


def _add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("evaluate", help="measure a checkpoint on a benchmark")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="workdir or checkpoint")
    parser.add_argument(
        "--dataset",
        required=True,
        choices=("coco", "lvis", "ov_coco", "odinw", "voc", "yolo", "shapes_world"),
    )
    parser.add_argument(
        "--annotations", default="", metavar="PATH", help="JSON file; folder of labels (voc, yolo)"
    )
    parser.add_argument(
        "--images", default="", metavar="DIR", help="of odinw: the folder of data sets"
    )
    parser.add_argument("--split_list", default="", metavar="FILE", help="of voc: image stems")
    parser.add_argument("--split", default="valid", choices=("valid", "test"), help="of odinw")
    parser.add_argument(
        "--protocol", choices=("coco", "lvis", "fixed"), help="lvis for LVIS, else coco"
    )
    parser.add_argument(
        "--prompts", default="", choices=("none", "clip", "clip_best7"), help="as trained"
    )
    parser.add_argument(
        "--top_k", type=int, default=0, help="query-box pairs per image: 300; fixed: 3,000"
    )
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_images", type=int, default=0, help="per data set; 0 = all")
    parser.add_argument("--out", metavar="FILE.json", help="where to write the metrics")
    parser.add_argument(
        "--results", metavar="FILE.json", help="where to write detections in COCO's format"
    )
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    """A table on stdout; JSON with `--out`."""
    from owl_det import checkpoint
    from owl_det.evaluation import benchmark

    settings = benchmark.settings(
        arguments.dataset,
        protocol=arguments.protocol,
        top_k=arguments.top_k,
        batch_size=arguments.batch_size,
        max_images=arguments.max_images,
    )
    sources = benchmark.open_sources(
        benchmark.Location(
            kind=arguments.dataset,
            annotations=arguments.annotations,
            images=arguments.images,
            split_list=arguments.split_list,
            split=arguments.split,
        )
    )
    model = checkpoint.load_model(arguments.checkpoint)
    content = benchmark.run(
        model, sources, settings, prompts=arguments.prompts, results=arguments.results
    )
    print(benchmark.table(content))
    if arguments.out:
        benchmark.write_summary(arguments.out, {"checkpoint": arguments.checkpoint, **content})
    return 0


def _add_sample(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("sample", help="write images of the embedded data set as PNG")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--num_images", type=int, default=4)
    parser.add_argument("--image_size", type=int, default=64)
    parser.set_defaults(run=_sample)


def _sample(arguments: argparse.Namespace) -> int:
    from data_pipelines import image_ops
    from data_pipelines.shapes_world import ShapesWorld

    world = ShapesWorld(
        split="test", image_size=arguments.image_size, num_images=arguments.num_images
    )
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    for index in range(len(world)):
        path = out / f"shapes_{index:04d}.png"
        record = world[index]
        image_ops.decode_image(record.image).save(path)
        names = ", ".join(name for group in record.names for name in group)
        print(f"{path}: {names}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
