"""`owl-det convert`, `models` and `export`: weights of other programs, and for them."""

import argparse
import json
from pathlib import Path

from owl_det.cli.options import Commands, local_path


def add_convert(commands: Commands) -> None:
    parser = commands.add_parser("convert", help="weights of other programs to ours and back")
    parser.add_argument("source", metavar="SRC", help="file, folder or name on the hub")
    parser.add_argument("target", type=local_path, metavar="DST", help="new folder")
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


def add_models(commands: Commands) -> None:
    parser = commands.add_parser("models", help="list published detectors and how to get them")
    parser.add_argument("--json", action="store_true", help="one JSON object a model")
    parser.set_defaults(run=_models)


def _models(arguments: argparse.Namespace) -> int:
    from owl_det.convert import published

    print("\n".join(published.json_lines() if arguments.json else published.table_lines()))
    return 0


def add_export(commands: Commands) -> None:
    parser = commands.add_parser("export", help="write a checkpoint for other runtimes")
    parser.add_argument("source", metavar="SRC", help="workdir or checkpoint")
    parser.add_argument("target", type=local_path, metavar="DST", help="new folder")
    formats = ("stablehlo", "saved_model", "onnx")
    parser.add_argument("--format", choices=formats, default="stablehlo", help="of the files")
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    """One JSON object on stdout: files, bytes, and differences from the checkpoint."""
    from owl_det.inference.export import export

    print(json.dumps(export(arguments.source, arguments.target, arguments.format)))
    return 0
