"""The `owl-det` command. Heavy imports happen inside the handlers, so that help is instant."""

import sys
from importlib import metadata

from owl_det import console
from owl_det.cli import (
    annotate,
    cache_teacher,
    convert,
    ensemble,
    evaluate,
    options,
    predict,
    visualize,
)
from owl_det.errors import ExitCode


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand. Returns an exit code (`owl_det.errors.ExitCode`)."""
    given = options.with_underscores(sys.argv[1:] if argv is None else argv)
    console.quiet_libraries()
    with console.plain_warnings("owl-det"):
        code = console.run("owl-det", lambda: _run(given))
    if code in (ExitCode.INTERRUPTED, ExitCode.UNFINISHED) and argv is None:
        console.leave(code)
    return code


def _run(given: list[str]) -> int:
    arguments = parser().parse_args(given)
    options.refuse_addresses(arguments)
    return arguments.run(arguments)


def parser() -> options.CommandParser:
    """The parser of all subcommands; `run` of what it parses is the handler."""
    root = options.CommandParser(prog="owl-det", description="Open-vocabulary detection.")
    version = f"%(prog)s {metadata.version('owl-det')}"
    root.add_argument("--version", action="version", version=version)
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    predict.add_predict(commands)
    predict.add_embed(commands)
    predict.add_search(commands)
    evaluate.add_evaluate(commands)
    evaluate.add_evaluate_regions(commands)
    visualize.add_sample(commands)
    convert.add_convert(commands)
    convert.add_models(commands)
    annotate.add_annotate(commands)
    annotate.add_annotate_precision(commands)
    ensemble.add_ensemble(commands)
    cache_teacher.add_cache_teacher(commands)
    visualize.add_visualize(commands)
    convert.add_export(commands)
    return root
