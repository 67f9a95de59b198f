"""`owl-det predict`, `embed` and `search`: find things in images, at once or later."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from owl_det import console, files
from owl_det.cli import options, summary
from owl_det.cli.images import exit_code, image_paths, picture_paths
from owl_det.cli.options import Commands
from owl_det.errors import UserError

if TYPE_CHECKING:
    from owl_det.inference.detections import Detections
    from owl_det.inference.embeddings import QueryEmbeddings
    from owl_det.inference.predictor import Predictor

_PREDICT_EXAMPLES = """\
examples:
  owl-det predict photos --checkpoint RUN --query "red circle" --query "blue star"
  owl-det predict a.jpg --checkpoint RUN --query cat --threshold 0.3 --nms_iou 0.5 --out drawn
  owl-det predict photos --checkpoint RUN --query_image cup.jpg:10,10,140,140 > found.jsonl

Each line on stdout is one image as JSON. Exit codes: 0 done, 1 some images could not be read,
2 refused, 130 interrupted."""
_EMBED_EXAMPLES = """\
example:
  owl-det embed photos --checkpoint RUN --out collection
  owl-det search collection --checkpoint RUN --query "red circle" """


def add_predict(commands: Commands) -> None:
    parser = commands.add_parser(
        "predict", help="detect named things in images", epilog=_PREDICT_EXAMPLES
    )
    options.add_images(parser)
    options.add_checkpoint(parser)
    parser.add_argument(
        "--query",
        action="append",
        default=[],
        help="what to look for; repeat. Default: the names that the checkpoint was trained to find",
    )
    parser.add_argument(
        "--query_image",
        action="append",
        default=[],
        metavar="FILE[:X0,Y0,X1,Y1]",
        help="look for what this image shows, whole or in a box of corners in pixels; repeat",
    )
    options.add_filters(parser)
    options.add_image_size(parser)
    parser.add_argument(
        "--out", type=options.local_path, metavar="DIR", help="where to write drawn pictures"
    )
    parser.set_defaults(run=_predict)


def _predict(arguments: argparse.Namespace) -> int:
    """One JSON line an image on stdout; pictures with `--out`."""
    from data_pipelines.image_ops import UnreadableImage
    from owl_det.inference.predictor import Predictor

    paths = image_paths(arguments.images, arguments.out)
    targets: list[Path | None] = [None] * len(paths)
    if arguments.out:
        options.check_folder("--out", arguments.out)
        targets = [*picture_paths(Path(arguments.out), paths)]
    _check_queries(arguments)
    predictor = Predictor.load(arguments.checkpoint)
    queries = _queries(predictor, arguments)
    num_failed = num_found = 0
    images = zip(paths, targets, strict=True)
    shown = console.progress(images, total=len(paths), unit="image", is_shown=len(paths) >= 5)
    for path, target in shown:
        try:
            (found,) = predictor.detect(
                [path], queries, image_size=arguments.image_size, **_filters(arguments)
            )
        except UnreadableImage as error:
            print(f"owl-det: skipped {error}", file=sys.stderr)
            num_failed += 1
            continue
        detections = _described(found)
        num_found += len(detections)
        print(json.dumps({"image": str(path), "detections": detections}), flush=True)
        if target:
            _draw(path, target, detections)
    drawn = f"; pictures in {arguments.out}" if arguments.out else ""
    images_read = summary.many(len(paths) - num_failed, "image")
    summary.say(f"{images_read}, {summary.many(num_found, 'detection')}{drawn}")
    return exit_code(num_failed, len(paths))


def _filters(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "threshold": arguments.threshold,
        "top_k": arguments.top_k,
        "nms_iou": arguments.nms_iou,
        "nms_across_queries": arguments.nms_across_queries,
        "prompt_mode": arguments.prompts,
    }


def _check_queries(arguments: argparse.Namespace) -> None:
    """Raises `UserError` for a query of no use, before the model is loaded."""
    from data_pipelines.image_ops import UnreadableImage
    from owl_det.inference import image_inputs, text_queries

    if arguments.query:
        text_queries.texts(arguments.query)
    for text in arguments.query_image:
        try:
            image_inputs.read(_image_and_box(text)[0])
        except UnreadableImage as error:
            raise UserError(f"--query_image: {error}") from None


def _queries(
    predictor: "Predictor", arguments: argparse.Namespace
) -> "tuple[str, ...] | QueryEmbeddings":
    """Texts, then query images; without either the names that the model keeps."""
    texts = tuple(arguments.query)
    if not arguments.query_image:
        if not texts and not predictor.names:
            raise UserError(
                "predict: give at least one --query or --query_image; "
                f"{arguments.checkpoint} keeps no names of its own"
            )
        return texts or predictor.names
    pairs = [_image_and_box(text) for text in arguments.query_image]
    images, boxes = [image for image, _ in pairs], [box for _, box in pairs]
    queries = predictor.encode_image_queries(
        images, boxes, arguments.query_image, image_size=arguments.image_size
    )
    return predictor.encode_queries(texts, arguments.prompts) + queries if texts else queries


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


def _described(found: "Detections") -> list[dict[str, object]]:
    return [
        {
            "query": name,
            "label": int(label),
            "score": round(float(score), 5),
            "box": [round(float(x), 2) for x in box],
        }
        for name, box, score, label in zip(
            found.names, found.boxes, found.scores, found.labels, strict=True
        )
    ]


def _draw(path: Path, target: Path, detections: list[dict[str, object]]) -> None:
    import numpy as np

    from data_pipelines import image_ops
    from owl_det.viz.detections import draw_best
    from owl_det.viz.pictures import save_png

    image = np.asarray(image_ops.decode_image(files.read_bytes(path)))
    boxes = np.array([d["box"] for d in detections], np.float32).reshape(-1, 4)
    scores = np.array([d["score"] for d in detections], np.float32)
    names = [str(d["query"]) for d in detections]
    classes = np.array([d["label"] for d in detections], int).tolist()
    picture = draw_best(image, boxes, names, scores, classes=classes)
    try:
        save_png(target, picture)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror or error}); make room, or name another "
            "folder with --out"
        ) from None


def add_embed(commands: Commands) -> None:
    parser = commands.add_parser(
        "embed", help="embed images once, to search them later", epilog=_EMBED_EXAMPLES
    )
    options.add_images(parser)
    options.add_checkpoint(parser)
    parser.add_argument(
        "--out", type=options.local_path, required=True, metavar="EMB", help="folder to write"
    )
    parser.add_argument(
        "--num_tokens",
        type=options.count("--num_tokens", least=0),
        default=0,
        help="tokens kept of an image, by objectness; 0 = all, exact (default: 0)",
    )
    options.add_image_size(parser)
    parser.add_argument(
        "--batch_size", type=options.count("--batch_size"), default=8, help="images at once"
    )
    parser.add_argument(
        "--shard_size", type=options.count("--shard_size"), default=256, help="images in a file"
    )
    parser.set_defaults(run=_embed)


def _embed(arguments: argparse.Namespace) -> int:
    """Writes the folder; unreadable images are left out and named on stderr."""
    from data_pipelines.image_ops import UnreadableImage
    from owl_det.inference import embedding_files
    from owl_det.inference.predictor import Predictor

    paths = image_paths(arguments.images)
    options.check_folder("--out", Path(arguments.out).absolute().parent)
    writer = embedding_files.Writer(arguments.out)
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
                    here,
                    num_tokens=arguments.num_tokens,
                    batch_size=arguments.batch_size,
                    image_size=arguments.image_size,
                    on_unreadable=skip,
                )
            )
    num_bytes = sum(file.stat().st_size for file in writer.path.iterdir())
    images = summary.many(len(paths) - len(failed), "image")
    summary.say(f"wrote {arguments.out}: {images}, {summary.size(num_bytes)}")
    return exit_code(len(failed), len(paths))


def add_search(commands: Commands) -> None:
    parser = commands.add_parser(
        "search", help="detect named things in embedded images", epilog=_EMBED_EXAMPLES
    )
    parser.add_argument(
        "embeddings", type=options.local_path, metavar="EMB", help="what owl-det embed wrote"
    )
    options.add_checkpoint(parser)
    parser.add_argument(
        "--query",
        action="append",
        default=[],
        help="what to look for; repeat. Default: the names that the checkpoint was trained to find",
    )
    options.add_filters(parser)
    parser.set_defaults(run=_search, query_image=[])


def _search(arguments: argparse.Namespace) -> int:
    """One JSON line an image on stdout, as `predict` prints them."""
    from owl_det.inference import embedding_files
    from owl_det.inference.predictor import Predictor

    shards = embedding_files.read(arguments.embeddings)
    _check_queries(arguments)
    predictor = Predictor.load(arguments.checkpoint)
    queries = _queries(predictor, arguments)
    num_images = num_found = 0
    for shard in shards:
        results = predictor.search(shard, queries, **_filters(arguments))
        for name, found in zip(shard.names, results, strict=True):
            num_found += len(found)
            print(json.dumps({"image": name, "detections": _described(found)}))
        num_images += len(shard)
    images = summary.many(num_images, "image")
    summary.say(f"{images}, {summary.many(num_found, 'detection')}")
    return 0
