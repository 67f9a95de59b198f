"""The `owl-det` command. Heavy imports happen inside the handlers, so that help is instant."""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from owl_det.errors import UserError

if TYPE_CHECKING:
    from owl_det.embeddings import QueryEmbeddings
    from owl_det.predictor import Detections, Predictor

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand. Returns 0, 1 if some images failed, or 2 for a user's error."""
    parser = argparse.ArgumentParser(prog="owl-det", description="Open-vocabulary detection.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_predict(commands)
    _add_embed(commands)
    _add_search(commands)
    _add_evaluate(commands)
    _add_evaluate_regions(commands)
    _add_sample(commands)
    _add_convert(commands)
    _add_models(commands)
    _add_annotate(commands)
    _add_annotate_precision(commands)
    _add_ensemble(commands)
    _add_cache_teacher(commands)
    _add_visualize(commands)
    _add_export(commands)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except (UserError, OSError) as error:
        print(f"owl-det: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _add_predict(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("predict", help="detect named things in images")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files or folders")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="workdir or checkpoint")
    parser.add_argument("--query", action="append", default=[], help="what to look for; repeat")
    parser.add_argument(
        "--query_image",
        action="append",
        default=[],
        metavar="FILE[:X0,Y0,X1,Y1]",
        help="look for what this image shows, in a box of pixels; repeat",
    )
    _add_filters(parser)
    parser.add_argument("--image_size", type=int, help="inference resolution; default: the model's")
    parser.add_argument("--out", metavar="DIR", help="where to write drawn pictures")
    parser.set_defaults(run=_predict)


def _add_filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threshold", type=float, default=0.1)
    parser.add_argument("--top_k", type=int, default=300, help="query-box pairs per image")
    parser.add_argument(
        "--nms_iou", type=float, help="drop boxes that overlap a better one of their query more"
    )
    parser.add_argument(
        "--prompts", choices=("none", "clip", "clip_best7"), help="default: the model's own"
    )


def _predict(arguments: argparse.Namespace) -> int:
    """One JSON line an image on stdout; pictures with `--out`."""
    from tqdm import tqdm

    from data_pipelines.image_ops import UnreadableImage
    from owl_det.predictor import Predictor

    paths = _image_paths(arguments.images)
    if not arguments.query and not arguments.query_image:
        raise UserError("predict: give at least one --query or --query_image")
    targets = _picture_paths(Path(arguments.out), paths) if arguments.out else [None] * len(paths)
    predictor = Predictor.load(arguments.checkpoint)
    queries = _queries(predictor, arguments)
    num_failed = 0
    images = zip(paths, targets, strict=True)
    for path, target in tqdm(images, total=len(paths), unit="image", disable=len(paths) < 5):
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
    return _exit_code(num_failed, len(paths))


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


def _exit_code(num_failed: int, num_images: int) -> int:
    if num_failed:
        print(f"owl-det: {num_failed} of {num_images} images could not be read", file=sys.stderr)
    return 1 if num_failed else 0


def _add_embed(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("embed", help="embed images once, to search them later")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files or folders")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="workdir or checkpoint")
    parser.add_argument("--out", required=True, metavar="EMB", help="folder to write")
    parser.add_argument(
        "--num_tokens", type=int, default=0, help="tokens kept by objectness; 0 = all, exact"
    )
    parser.add_argument("--image_size", type=int, help="inference resolution; default: the model's")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--shard_size", type=int, default=256, help="images in a file")
    parser.set_defaults(run=_embed)


def _embed(arguments: argparse.Namespace) -> int:
    """Writes the folder; unreadable images are left out and named on stderr."""
    from tqdm import tqdm

    from data_pipelines.image_ops import UnreadableImage
    from owl_det import embeddings
    from owl_det.predictor import Predictor

    paths = _image_paths(arguments.images)
    if arguments.shard_size < 1:
        raise UserError(f"embed: --shard_size must be positive, got {arguments.shard_size}")
    writer = embeddings.Writer(arguments.out)
    predictor = Predictor.load(arguments.checkpoint)
    failed: list[UnreadableImage] = []

    def skip(error: UnreadableImage) -> None:
        print(f"owl-det: skipped {error}", file=sys.stderr)
        failed.append(error)

    with writer:
        for start in tqdm(range(0, len(paths), arguments.shard_size), unit="shard", disable=None):
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
    return _exit_code(len(failed), len(paths))


def _add_search(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("search", help="detect named things in embedded images")
    parser.add_argument("embeddings", metavar="EMB", help="what owl-det embed wrote")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="workdir or checkpoint")
    parser.add_argument("--query", action="append", required=True, help="what to look for; repeat")
    _add_filters(parser)
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


def _picture_paths(out: Path, paths: list[Path]) -> list[Path]:
    """Where the picture of each image goes: `<out>/<stem>.png`.

    With the folder's name in front where stems are the same, and a number where that is no help.
    Raises `UserError` if a picture would take the place of an image.
    """
    stems = Counter(path.stem for path in paths)
    names = [p.stem if stems[p.stem] == 1 else f"{p.parent.name}_{p.name}" for p in paths]
    uses, seen = Counter(names), Counter[str]()
    targets: list[Path] = []
    for name in names:
        seen[name] += 1
        targets.append(out / (f"{name}.png" if uses[name] == 1 else f"{name}_{seen[name]}.png"))
    images = {path.resolve() for path in paths}
    for target in targets:
        if target.resolve() in images:
            raise UserError(f"--out {out}: {target} is one of the images; name another folder")
    return targets


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
    parser.add_argument(
        "--split", default="", choices=("valid", "test"), help="of odinw; default: valid"
    )
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
    from owl_det import checkpoint, stablehlo
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
    if stablehlo.is_export(arguments.checkpoint):
        model, functions = stablehlo.load(arguments.checkpoint)
    else:
        model, functions = checkpoint.load_detector(arguments.checkpoint), None
    content = benchmark.run(
        model,
        sources,
        settings,
        prompts=arguments.prompts,
        results=arguments.results,
        functions=functions,
    )
    print(benchmark.table(content))
    if arguments.out:
        benchmark.write_summary(arguments.out, {"checkpoint": arguments.checkpoint, **content})
    return 0


def _add_evaluate_regions(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "evaluate-regions", help="measure dense features: names of true boxes and masks"
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="of any kind")
    parser.add_argument(
        "--dataset", required=True, choices=("coco_panoptic", "lvis", "coco", "shapes_world")
    )
    parser.add_argument("--annotations", default="", metavar="FILE.json")
    parser.add_argument("--images", default="", metavar="DIR")
    parser.add_argument(
        "--segments",
        default="",
        metavar="DIR",
        help="of coco_panoptic: folder of PNG files; default: named as --annotations",
    )
    parser.add_argument("--split", default="", help="of shapes_world; default: panoptic_test")
    parser.add_argument("--image_size", type=int, default=0, help="default: the model's")
    parser.add_argument(
        "--prompts", default="", choices=("none", "clip", "clip_best7"), help="as trained"
    )
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_images", type=int, default=0, help="0 = all")
    parser.add_argument("--out", metavar="FILE.json", help="where to write the metrics")
    parser.set_defaults(run=_evaluate_regions)


def _evaluate_regions(arguments: argparse.Namespace) -> int:
    """A table on stdout; JSON with `--out`."""
    from owl_det import checkpoint
    from owl_det.evaluation import benchmark, dense

    source = dense.open_source(
        dense.Location(
            kind=arguments.dataset,
            annotations=arguments.annotations,
            images=arguments.images,
            segments=arguments.segments,
            split=arguments.split,
        )
    )
    model = checkpoint.load_model(arguments.checkpoint)
    if arguments.image_size:
        model = checkpoint.resized(model, arguments.image_size)
    content = dense.run(
        model,
        source,
        eval_prompts=arguments.prompts,
        batch_size=arguments.batch_size,
        max_images=arguments.max_images,
    )
    print(dense.table(content))
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

    for key in ("num_images", "image_size"):
        if getattr(arguments, key) < 1:
            raise UserError(f"--{key}: must be positive, got {getattr(arguments, key)}")
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


def _add_convert(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("convert", help="weights of other programs to ours and back")
    parser.add_argument("source", metavar="SRC", help="file, folder or name on the hub")
    parser.add_argument("target", metavar="DST", help="new folder")
    # Names are checked by the list of formats itself, which takes seconds to import.
    sources = "scenic, hf, clip, siglip, lit, clip_resnet, owl_det"
    parser.add_argument("--from", dest="from_format", required=True, metavar="FORMAT", help=sources)
    parser.add_argument(
        "--to", dest="to_format", default="owl_det", metavar="FORMAT", help="owl_det, hf"
    )
    parser.add_argument("--eval_prompts", choices=("none", "clip_best7"), help="kept with it")
    parser.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> int:
    """One JSON object on stdout; what is left out or differs is logged."""
    from owl_det.convert import formats

    model = formats.convert(
        arguments.source,
        Path(arguments.target),
        arguments.from_format,
        arguments.to_format,
        eval_prompts=arguments.eval_prompts,
    )
    print(json.dumps({"wrote": arguments.target, **formats.summary(model)}))
    return 0


def _add_models(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("models", help="list published detectors and how to get them")
    parser.add_argument("--json", action="store_true", help="one JSON object a model")
    parser.set_defaults(run=_models)


def _models(arguments: argparse.Namespace) -> int:
    from owl_det.convert import published

    print("\n".join(published.json_lines() if arguments.json else published.table_lines()))
    return 0


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("export", help="write a checkpoint for other runtimes")
    parser.add_argument("source", metavar="SRC", help="workdir or checkpoint")
    parser.add_argument("target", metavar="DST", help="new folder")
    formats = ("stablehlo", "saved_model", "onnx")
    parser.add_argument("--format", choices=formats, default="stablehlo")
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    """One JSON object on stdout: files, bytes, and differences from the checkpoint."""
    from owl_det.export import export

    print(json.dumps(export(arguments.source, arguments.target, arguments.format)))
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
        help="curated, ngrams, noun_phrases, union (curated and ngrams), union_noun_phrases, or a "
        "list of names as in --vocabulary",
    )
    parser.add_argument(
        "--vocabulary",
        dest="vocabularies",
        action="append",
        default=[],
        help="curated names: text or COCO JSON file, tfds:BUILDER, shapes_world; repeat to merge",
    )
    parser.add_argument(
        "--max_ngrams", type=int, default=300, help="N-grams or noun phrases of one image"
    )
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
    parser.add_argument(
        "--hard_negatives",
        type=int,
        default=0,
        help="of each image, so many curated names that are wrongly detected; 0 = none",
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
    """Prints the counts of all complete shards as one JSON line.

    1 if of the images of this process's shards more than one, and more than 1 %, were unreadable.
    """
    from data_pipelines.image_ops import is_tolerable
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
    mine = job.share(len(done.shards), arguments.shard_index, arguments.shard_step)
    ours = done.counts(mine)
    num_images = ours["images"] + ours["unreadable"]
    return 0 if is_tolerable(ours["unreadable"], num_images) else 1


def _add_annotate_precision(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    parser = commands.add_parser(
        "annotate-precision", help="share of right pseudo-boxes, where the truth is known"
    )
    parser.add_argument("records", metavar="RECORDS", help="what owl-det annotate wrote")
    parser.add_argument(
        "--source",
        default="",
        help="the truth: shapes_world:SPLIT:NUM[:SIZE] (default: the job's --input), or of a "
        "folder of images a source as in a config, kind=coco,path=ROOT,annotations=FILE,images=DIR",
    )
    parser.add_argument("--min_box_score", type=float, help="as in training; default: the job's")
    parser.add_argument("--min_image_score", type=float, help="likewise")
    parser.add_argument("--out", metavar="FILE.json", help="where to write the same as JSON")
    parser.set_defaults(run=_annotate_precision)


def _annotate_precision(arguments: argparse.Namespace) -> int:
    """A table on stdout; JSON with `--out`."""
    from data_pipelines import pseudo_records
    from owl_det.annotate import precision

    content = precision.run(
        arguments.records,
        arguments.source,
        min_box_score=arguments.min_box_score,
        min_image_score=arguments.min_image_score,
    )
    print(precision.table(content))
    if arguments.out:
        pseudo_records.write_json(Path(arguments.out), content)
    return 0


def _add_visualize(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("visualize", help="pictures of what a model computes")
    kinds = parser.add_subparsers(dest="kind", required=True)
    features = kinds.add_parser("features", help="token embeddings: clusters, likeness to texts")
    features.add_argument("images", nargs="+", metavar="IMAGE", help="files or folders")
    features.add_argument("--checkpoint", required=True, metavar="DIR", help="of any kind")
    features.add_argument("--query", action="append", default=[], help="a heat map of it; repeat")
    features.add_argument("--num_clusters", type=int, default=6)
    features.add_argument("--image_size", type=int, default=0, help="default: the model's")
    features.add_argument("--prompts", default="", choices=("none", "clip", "clip_best7"))
    features.add_argument("--out", required=True, metavar="DIR")
    features.set_defaults(run=_visualize_features)


def _visualize_features(arguments: argparse.Namespace) -> int:
    """One PNG an image: the image, its clusters, a heat map a query. Prints the paths."""
    import numpy as np

    from data_pipelines import image_ops
    from data_pipelines.image_ops import UnreadableImage
    from owl_det import checkpoint, dense_features, viz

    paths = _image_paths(arguments.images)
    model = checkpoint.load_model(arguments.checkpoint)
    if arguments.image_size:
        model = checkpoint.resized(model, arguments.image_size)
    features = dense_features.DenseFeatures(model)
    read: list[tuple[Path, Path]] = []
    grids: list[np.ndarray] = []
    for path, target in zip(paths, _picture_paths(Path(arguments.out), paths), strict=True):
        try:
            grids.append(features.embed(image_ops.decode_image(path.read_bytes())))
            read.append((path, target))
        except (UnreadableImage, OSError) as error:
            print(f"owl-det: skipped {path}: {error}", file=sys.stderr)
    if not read:
        return _exit_code(len(paths), len(paths))
    texts = features.encode(arguments.query, arguments.prompts) if arguments.query else []
    clusters = dense_features.cluster(grids, arguments.num_clusters)
    for (path, target), grid, labels in zip(read, grids, clusters, strict=True):
        image = image_ops.decode_image(path.read_bytes())  # again: not all fit into memory
        pixels, extent = np.asarray(image), features.extent(image)
        coloured = viz.draw_clusters(pixels, labels, extent, arguments.num_clusters)
        pictures = [viz.titled(pixels, "image"), viz.titled(coloured, "clusters")]
        for query, text in zip(arguments.query, texts, strict=True):
            pictures.append(viz.draw_heat(pixels, grid @ text, extent, query))
        viz.save_png(target, viz.picture_grid(pictures))
        print(target)
    return _exit_code(len(paths) - len(read), len(paths))


def _add_ensemble(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("ensemble", help="average two checkpoints of one model")
    parser.add_argument(
        "--self_trained", "--self-trained", required=True, metavar="DIR", help="has weight 1 - w"
    )
    parser.add_argument(
        "--fine_tuned", "--fine-tuned", required=True, metavar="DIR", help="has weight w"
    )
    parser.add_argument("--weight", type=float, help="w; writes the checkpoint")
    weights = "0,0.2,0.4,0.6,0.8,1"
    parser.add_argument(
        "--sweep",
        nargs="?",
        const=weights,
        metavar="WEIGHTS",
        help=f"evaluates weights instead, by default {weights}",
    )
    parser.add_argument("--out", metavar="DIR", help="default: runs/ensemble, runs/sweep")
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
        out = arguments.out or "runs/ensemble"
        ensemble.save(arguments.self_trained, arguments.fine_tuned, arguments.weight, out)
        return 0
    points = ensemble.sweep(
        arguments.self_trained,
        arguments.fine_tuned,
        ensemble.parse_weights(arguments.sweep),
        arguments.out or "runs/sweep",
        in_domain=arguments.in_domain,
        out_of_domain=arguments.out_of_domain,
        max_images=arguments.max_images,
    )
    for point in points:
        print(json.dumps(point))
    return 0


def _add_cache_teacher(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "cache-teacher", help="compute what distillation's teachers say of every training image"
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="of the training; .py, .json"
    )
    parser.add_argument(
        "--set", action="append", default=[], dest="changes", metavar="KEY=VALUE", help="repeat"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the training's distill.cache")
    parser.add_argument("--shard_size", type=int, default=256, help="images in a file")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--shard_index", type=int, default=0, help="first shard of this process")
    parser.add_argument("--shard_step", type=int, default=1, help="and every so-many-th after it")
    parser.set_defaults(run=_cache_teacher)


def _cache_teacher(arguments: argparse.Namespace) -> int:
    """One JSON object of counts on stdout; 1 if images could not be read."""
    from owl_det import cache_teacher

    counts = cache_teacher.run(
        cache_teacher.read_config(arguments.config, arguments.changes),
        arguments.out,
        shard_size=arguments.shard_size,
        batch_size=arguments.batch_size,
        shard_index=arguments.shard_index,
        shard_step=arguments.shard_step,
    )
    print(json.dumps({"wrote": arguments.out, **counts}))
    return 1 if counts["unreadable"] else 0


if __name__ == "__main__":
    sys.exit(main())
