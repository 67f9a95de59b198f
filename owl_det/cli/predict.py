"""`owl-det predict`, `embed` and `search`: find things in images, at once or later."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from owl_det import console
from owl_det.cli.images import exit_code, image_paths, picture_paths
from owl_det.cli.options import Commands, add_filters, local_path
from owl_det.errors import UserError

if TYPE_CHECKING:
    from owl_det.embeddings import QueryEmbeddings
    from owl_det.predictor import Detections, Predictor


def add_predict(commands: Commands) -> None:
    parser = commands.add_parser("predict", help="detect named things in images")
    parser.add_argument(
        "images", type=local_path, nargs="+", metavar="IMAGE", help="files or folders"
    )
    parser.add_argument(
        "--checkpoint",
        type=local_path,
        required=True,
        metavar="DIR",
        help="workdir or checkpoint",
    )
    parser.add_argument("--query", action="append", default=[], help="what to look for; repeat")
    parser.add_argument(
        "--query_image",
        action="append",
        default=[],
        metavar="FILE[:X0,Y0,X1,Y1]",
        help="look for what this image shows, in a box of pixels; repeat",
    )
    add_filters(parser)
    parser.add_argument("--image_size", type=int, help="inference resolution; default: the model's")
    parser.add_argument(
        "--out", type=local_path, metavar="DIR", help="where to write drawn pictures"
    )
    parser.set_defaults(run=_predict)


def _predict(arguments: argparse.Namespace) -> int:
    """One JSON line an image on stdout; pictures with `--out`."""
    from data_pipelines.image_ops import UnreadableImage
    from owl_det.predictor import Predictor

    paths = image_paths(arguments.images, arguments.out)
    if not arguments.query and not arguments.query_image:
        raise UserError("predict: give at least one --query or --query_image")
    targets = picture_paths(Path(arguments.out), paths) if arguments.out else [None] * len(paths)
    predictor = Predictor.load(arguments.checkpoint)
    queries = _queries(predictor, arguments)
    num_failed = 0
    images = zip(paths, targets, strict=True)
    shown = console.progress(images, total=len(paths), unit="image", is_shown=len(paths) >= 5)
    for path, target in shown:
        try:
            (found,) = predictor.detect(
                [path],
                queries,
                threshold=arguments.threshold,
                top_k=arguments.top_k,
                image_size=arguments.image_size,
                nms_iou=arguments.nms_iou,
                prompt_mode=arguments.prompts,
            )
        except UnreadableImage as error:
            print(f"owl-det: skipped {error}", file=sys.stderr)
            num_failed += 1
            continue
        # Query images of one name are one query.
        names = [*arguments.query, *dict.fromkeys(arguments.query_image)]
        detections = _described(found, names)
        print(json.dumps({"image": str(path), "detections": detections}), flush=True)
        if target:
            _draw(path, target, detections)
    return exit_code(num_failed, len(paths))


def _queries(
    predictor: "Predictor", arguments: argparse.Namespace
) -> "list[str] | QueryEmbeddings":
    """Texts, then query images. Raises `UserError` where an image cannot be read."""
    from data_pipelines.image_ops import UnreadableImage

    if not arguments.query_image:
        return arguments.query
    pairs = [_image_and_box(text) for text in arguments.query_image]
    images, boxes = [image for image, _ in pairs], [box for _, box in pairs]
    try:
        queries = predictor.encode_image_queries(images, boxes, arguments.query_image)
    except UnreadableImage as error:
        raise UserError(f"--query_image: {error}") from None
    if not arguments.query:
        return queries
    return predictor.encode_queries(arguments.query, arguments.prompts) + queries


def _image_and_box(text: str) -> tuple[str, list[float] | None]:
    """Splits FILE:X0,Y0,X1,Y1; a file's own name may hold colons."""
    file, _, numbers = text.rpartition(":")
    try:
        box = [float(number) for number in numbers.split(",")]
    except ValueError:
        return text, None
    if not file or len(box) != 4:
        raise UserError(f"--query_image {text}: give FILE or FILE:X0,Y0,X1,Y1 in pixels")
    return file, box


def _described(found: "Detections", queries: list[str]) -> list[dict[str, object]]:
    return [
        {
            "query": queries[label],
            "label": int(label),
            "score": round(float(score), 5),
            "box": [round(float(x), 2) for x in box],
        }
        for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True)
    ]


def _draw(path: Path, target: Path, detections: list[dict[str, object]]) -> None:
    import numpy as np

    from data_pipelines import image_ops
    from owl_det import viz

    image = np.asarray(image_ops.decode_image(path.read_bytes()))
    boxes = np.array([d["box"] for d in detections], np.float32).reshape(-1, 4)
    scores = np.array([d["score"] for d in detections], np.float32)
    names = [str(d["query"]) for d in detections]
    classes = np.array([d["label"] for d in detections], int).tolist()
    viz.save_png(target, viz.draw_best(image, boxes, names, scores, classes=classes))


def add_embed(commands: Commands) -> None:
    parser = commands.add_parser("embed", help="embed images once, to search them later")
    parser.add_argument(
        "images", type=local_path, nargs="+", metavar="IMAGE", help="files or folders"
    )
    parser.add_argument(
        "--checkpoint",
        type=local_path,
        required=True,
        metavar="DIR",
        help="workdir or checkpoint",
    )
    parser.add_argument(
        "--out", type=local_path, required=True, metavar="EMB", help="folder to write"
    )
    parser.add_argument(
        "--num_tokens", type=int, default=0, help="tokens kept by objectness; 0 = all, exact"
    )
    parser.add_argument("--image_size", type=int, help="inference resolution; default: the model's")
    parser.add_argument("--batch_size", type=int, default=8, help="images at once")
    parser.add_argument("--shard_size", type=int, default=256, help="images in a file")
    parser.set_defaults(run=_embed)


def _embed(arguments: argparse.Namespace) -> int:
    """Writes the folder; unreadable images are left out and named on stderr."""
    from data_pipelines.image_ops import UnreadableImage
    from owl_det import embeddings
    from owl_det.predictor import Predictor

    paths = image_paths(arguments.images)
    if arguments.shard_size < 1:
        raise UserError(f"embed: --shard_size must be positive, got {arguments.shard_size}")
    writer = embeddings.Writer(arguments.out)
    predictor = Predictor.load(arguments.checkpoint)
    failed: list[UnreadableImage] = []

    def skip(error: UnreadableImage) -> None:
        print(f"owl-det: skipped {error}", file=sys.stderr)
        failed.append(error)

    with writer:
        starts = range(0, len(paths), arguments.shard_size)
        for start in console.progress(starts, unit="shard"):
            here = paths[start : start + arguments.shard_size]
            writer.add(
                predictor.embed_images(
                    here,
                    [str(path) for path in here],
                    num_tokens=arguments.num_tokens,
                    batch_size=arguments.batch_size,
                    image_size=arguments.image_size,
                    on_unreadable=skip,
                )
            )
    return exit_code(len(failed), len(paths))


def add_search(commands: Commands) -> None:
    parser = commands.add_parser("search", help="detect named things in embedded images")
    parser.add_argument(
        "embeddings", type=local_path, metavar="EMB", help="what owl-det embed wrote"
    )
    parser.add_argument(
        "--checkpoint",
        type=local_path,
        required=True,
        metavar="DIR",
        help="workdir or checkpoint",
    )
    parser.add_argument("--query", action="append", required=True, help="what to look for; repeat")
    add_filters(parser)
    parser.set_defaults(run=_search)


def _search(arguments: argparse.Namespace) -> int:
    """One JSON line an image on stdout, as `predict` prints them."""
    from owl_det import embeddings
    from owl_det.predictor import Predictor

    shards = embeddings.read(arguments.embeddings)
    predictor = Predictor.load(arguments.checkpoint)
    for shard in shards:
        results = predictor.search(
            shard,
            arguments.query,
            threshold=arguments.threshold,
            top_k=arguments.top_k,
            prompt_mode=arguments.prompts,
            nms_iou=arguments.nms_iou,
        )
        for name, found in zip(shard.names, results, strict=True):
            detections = _described(found, arguments.query)
            print(json.dumps({"image": name, "detections": detections}))
    return 0
