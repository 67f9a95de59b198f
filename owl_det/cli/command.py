"""What `owl-det COMMAND` runs. Of the modules beside this one, only the command's own is loaded.

Heavy imports happen inside the handlers, so that help is instant.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib import metadata

from owl_det import console
from owl_det.cli import options
from owl_det.errors import ExitCode

# The module of each command, in the order of the help. Its function `add_COMMAND` adds the parser.
_MODULES = {
    "predict": "predict",
    "embed": "predict",
    "search": "predict",
    "evaluate": "evaluate",
    "evaluate-regions": "evaluate",
    "sample": "visualize",
    "convert": "convert",
    "models": "convert",
    "annotate": "annotate",
    "annotate-precision": "annotate",
    "ensemble": "ensemble",
    "cache-teacher": "cache_teacher",
    "visualize": "visualize",
    "export": "convert",
}


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
    asked = [given[0]] if given and given[0] in _MODULES else _MODULES
    arguments = parser(list(asked)).parse_args(given)
    options.refuse_addresses(arguments)
    return arguments.run(arguments)


def parser(names: Sequence[str] = tuple(_MODULES)) -> options.CommandParser:
    """The parser of these subcommands; `run` of what it parses is the handler."""
    root = options.CommandParser(prog="owl-det", description="Open-vocabulary detection.")
    version = f"%(prog)s {metadata.version('owl-det')}"
    root.add_argument("--version", action="version", version=version)
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in names:
        module = importlib.import_module(f"owl_det.cli.{_MODULES[name]}")
        getattr(module, f"add_{name.replace('-', '_')}")(commands)
    return root
