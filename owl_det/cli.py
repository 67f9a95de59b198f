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
    _add_sample(commands)
    _add_annotate(commands)
    _add_ensemble(commands)
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


def _add_annotate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("annotate", help="pseudo-boxes for image-text pairs (OWL-ST)")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="the annotator")
    parser.add_argument(
        "--input",
        required=True,
        help="folder of .tar or .tfrecord files or of images, or shapes_world:SPLIT:NUM[:SIZE]",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the records")
    parser.add_argument(
        "--labels",
        default="union",
        help="curated, ngrams, union, or a list of names as in --vocabulary",
    )
    parser.add_argument(
        "--vocabulary",
        dest="vocabularies",
        action="append",
        default=[],
        help="curated names: text or COCO JSON file, tfds:BUILDER, shapes_world; repeat to merge",
    )
    parser.add_argument("--max_ngrams", type=int, default=300, help="N-grams of one image")
    parser.add_argument(
        "--prompts", default="", choices=["", "none", "clip", "clip_best7"], help="ensemble of"
    )
    parser.add_argument("--min_box_score", type=float, default=0.1)
    parser.add_argument("--min_image_score", type=float, default=0.3)
    parser.add_argument(
        "--keep_below",
        type=float,
        default=0.05,
        help="weaker boxes stay in the records down to this score; 1 = none do",
    )
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_threads", type=int, default=0, help="that decode; 0 = one a core")
    parser.add_argument(
        "--shards",
        dest="num_shards",
        type=int,
        default=0,
        help="cut a folder of images or shapes world into so many; files are shards already",
    )
    parser.add_argument("--shard_index", type=int, help="do only this shard")
    parser.add_argument("--shard_step", type=int, default=0, help="and every so-many-th after it")
    parser.add_argument("--runner", choices=["direct", "beam"], default="direct")
    parser.add_argument(
        "--beam_option", action="append", default=[], help="--beam_option=--runner=…; repeat"
    )
    parser.set_defaults(run=_annotate)


def _annotate(arguments: argparse.Namespace) -> int:
    """Prints the counts of all complete shards as one JSON line; 1 if images were unreadable."""
    from owl_det.annotate import job

    done = job.run(
        job.from_arguments(arguments),
        shard_index=arguments.shard_index,
        shard_step=arguments.shard_step,
        runner=arguments.runner,
        beam_options=arguments.beam_option,
    )
    counts = done.counts()
    keys = ("images", "unreadable", "recorded images", "recorded boxes")
    print(json.dumps({key.replace(" ", "_"): counts[key] for key in keys}))
    return 1 if counts["unreadable"] else 0


def _add_ensemble(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("ensemble", help="average two checkpoints of one model")
    parser.add_argument(
        "--self_trained", "--self-trained", required=True, metavar="DIR", help="has weight 1 - w"
    )
    parser.add_argument(
        "--fine_tuned", "--fine-tuned", required=True, metavar="DIR", help="has weight w"
    )
    parser.add_argument("--weight", type=float, help="w; writes the checkpoint")
    parser.add_argument("--sweep", help="evaluates weights instead, such as 0,0.2,0.4,0.6,0.8,1")
    parser.add_argument("--out", required=True, metavar="DIR")
    source = "kind=shapes_world,split=test"
    parser.add_argument(
        "--in_domain",
        default=f"{source},group=base",
        help="with --sweep: a source as in a config, and a group of its names",
    )
    parser.add_argument("--out_of_domain", default=f"{source},group=novel", help="likewise")
    parser.add_argument("--max_images", type=int, default=512, help="of each; 0 = all")
    parser.set_defaults(run=_ensemble)


def _ensemble(arguments: argparse.Namespace) -> int:
    """Writes one checkpoint, or evaluates a range of weights and draws the trade-off."""
    from owl_det import ensemble

    if (arguments.weight is None) == (arguments.sweep is None):
        raise UserError("ensemble: give either --weight or --sweep")
    if arguments.weight is not None:
        ensemble.save(arguments.self_trained, arguments.fine_tuned, arguments.weight, arguments.out)
        return 0
    points = ensemble.sweep(
        arguments.self_trained,
        arguments.fine_tuned,
        ensemble.parse_weights(arguments.sweep),
        arguments.out,
        in_domain=arguments.in_domain,
        out_of_domain=arguments.out_of_domain,
        max_images=arguments.max_images,
    )
    for point in points:
        print(json.dumps(point))
    return 0


if __name__ == "__main__":
    sys.exit(main())
