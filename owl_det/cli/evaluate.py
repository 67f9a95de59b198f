"""`owl-det evaluate` and `evaluate-regions`: measure a checkpoint."""

import argparse

from owl_det.cli.options import Commands, add_checkpoint, check_folder, local_path

_NUM_PICTURES = 8  # images that --pictures shows, of each data set


def add_evaluate(commands: Commands) -> None:
    parser = commands.add_parser("evaluate", help="measure a checkpoint on a benchmark")
    add_checkpoint(parser, "workdir or checkpoint")
    _add_benchmark(parser)
    parser.add_argument(
        "--protocol", choices=("coco", "lvis", "fixed"), help="lvis for LVIS, else coco"
    )
    parser.add_argument(
        "--prompts", default="", choices=("none", "clip", "clip_best7"), help="as trained"
    )
    parser.add_argument(
        "--top_k", type=int, default=0, help="query-box pairs per image: 300; fixed: 3,000"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="images at once")
    parser.add_argument("--max_images", type=int, default=0, help="per data set; 0 = all")
    parser.add_argument(
        "--out", type=local_path, metavar="FILE.json", help="where to write the metrics"
    )
    parser.add_argument(
        "--results",
        type=local_path,
        metavar="FILE.json",
        help="where to write detections in COCO's format",
    )
    parser.add_argument(
        "--pictures",
        type=local_path,
        metavar="DIR",
        help="where to draw detections beside the truth, precision and recall, and confusions",
    )
    parser.set_defaults(run=_evaluate)


def _add_benchmark(parser: argparse.ArgumentParser) -> None:
    """Which images and labels are measured."""
    parser.add_argument(
        "--dataset",
        required=True,
        help="benchmark or format of the labels",
        choices=("coco", "lvis", "ov_coco", "odinw", "voc", "yolo", "shapes_world"),
    )
    parser.add_argument(
        "--annotations",
        type=local_path,
        default="",
        metavar="PATH",
        help="JSON file; folder of labels (voc, yolo); data.yaml, or the folder it lies in (yolo)",
    )
    parser.add_argument(
        "--images",
        type=local_path,
        default="",
        metavar="DIR",
        help="of odinw: the folder of data sets; of yolo: not with data.yaml",
    )
    parser.add_argument(
        "--split_list",
        type=local_path,
        default="",
        metavar="FILE",
        help="of voc: image stems",
    )
    parser.add_argument(
        "--split",
        default="",
        choices=("train", "val", "valid", "test"),
        help="of odinw: valid (the default) or test; of yolo: which part of the data set",
    )


def _evaluate(arguments: argparse.Namespace) -> int:
    """A table on stdout; JSON with `--out`, pictures with `--pictures`."""
    from owl_det.checkpoints.load import load_detector
    from owl_det.evaluation import benchmark
    from owl_det.inference import stablehlo
    from owl_det.inference.export_folder import is_export

    settings = benchmark.settings(
        arguments.dataset,
        protocol=arguments.protocol,
        top_k=arguments.top_k,
        batch_size=arguments.batch_size,
        max_images=arguments.max_images,
        num_pictures=_NUM_PICTURES if arguments.pictures else 0,
    )
    if arguments.pictures:
        check_folder("--pictures", arguments.pictures)
    sources = benchmark.open_sources(
        benchmark.BenchmarkLocation(
            kind=arguments.dataset,
            annotations=arguments.annotations,
            images=arguments.images,
            split_list=arguments.split_list,
            split=arguments.split,
        )
    )
    if is_export(arguments.checkpoint):
        model, functions = stablehlo.load(arguments.checkpoint)
    else:
        model, functions = load_detector(arguments.checkpoint), None
    content = benchmark.run(
        model,
        sources,
        settings,
        prompts=arguments.prompts,
        results=arguments.results,
        pictures=arguments.pictures,
        functions=functions,
    )
    print(benchmark.table(content))
    if arguments.out:
        benchmark.write_summary(arguments.out, {"checkpoint": arguments.checkpoint, **content})
    return 0


def add_evaluate_regions(commands: Commands) -> None:
    parser = commands.add_parser(
        "evaluate-regions", help="measure dense features: names of true boxes and masks"
    )
    add_checkpoint(parser, "of any kind")
    parser.add_argument(
        "--dataset",
        required=True,
        choices=("coco_panoptic", "lvis", "coco", "shapes_world"),
        help="format of the labels",
    )
    parser.add_argument(
        "--annotations", type=local_path, default="", metavar="FILE.json", help="labels"
    )
    parser.add_argument(
        "--images", type=local_path, default="", metavar="DIR", help="folder of the images"
    )
    parser.add_argument(
        "--segments",
        type=local_path,
        default="",
        metavar="DIR",
        help="of coco_panoptic: folder of PNG files; default: named as --annotations",
    )
    parser.add_argument("--split", default="", help="of shapes_world; default: panoptic_test")
    parser.add_argument("--image_size", type=int, default=0, help="default: the model's")
    parser.add_argument(
        "--prompts", default="", choices=("none", "clip", "clip_best7"), help="as trained"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="images at once")
    parser.add_argument("--max_images", type=int, default=0, help="0 = all")
    parser.add_argument(
        "--out", type=local_path, metavar="FILE.json", help="where to write the metrics"
    )
    parser.set_defaults(run=_evaluate_regions)


def _evaluate_regions(arguments: argparse.Namespace) -> int:
    """A table on stdout; JSON with `--out`."""
    from owl_det.checkpoints.image_size import resized
    from owl_det.checkpoints.load import load_model
    from owl_det.evaluation import benchmark, region_evaluation

    source = region_evaluation.open_region_source(
        region_evaluation.RegionDataLocation(
            kind=arguments.dataset,
            annotations=arguments.annotations,
            images=arguments.images,
            segments=arguments.segments,
            split=arguments.split,
        )
    )
    model = load_model(arguments.checkpoint)
    if arguments.image_size:
        model = resized(model, arguments.image_size)
    content = region_evaluation.run(
        model,
        source,
        eval_prompts=arguments.prompts,
        batch_size=arguments.batch_size,
        max_images=arguments.max_images,
    )
    print(region_evaluation.table(content))
    if arguments.out:
        benchmark.write_summary(arguments.out, {"checkpoint": arguments.checkpoint, **content})
    return 0
