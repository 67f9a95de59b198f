"""What the options of all commands share: spelling, defaults in the help, paths, filters."""

import argparse
import os
import re
from collections.abc import Sequence
from typing import NoReturn, TypeAlias

from owl_det import files
from owl_det.errors import ExitCode

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


class HelpWithDefaults(argparse.HelpFormatter):
    """Names the default of every option that has one, unless its help does so in words."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        is_said = action.default in (None, "", False, argparse.SUPPRESS) or action.default == []
        if is_said or "default" in text or not action.option_strings:
            return text
        return f"{text} (default: %(default)s)".strip()


class Parser(argparse.ArgumentParser):
    """A parser whose help names the defaults, and whose flags are written out in full."""

    def __init__(self, *arguments: object, **options: object):
        options.setdefault("formatter_class", HelpWithDefaults)
        options.setdefault("allow_abbrev", False)
        super().__init__(*arguments, **options)  # pyright: ignore[reportArgumentType]

    def error(self, message: str) -> NoReturn:
        """One line, as for any other user's error."""
        self.exit(ExitCode.REFUSED, f"{self.prog}: {message}; see {self.prog} --help\n")


def with_underscores(arguments: Sequence[str]) -> list[str]:
    """`--query-image` is `--query_image`; values and what follows a bare `--` stay as they are."""
    spelt: list[str] = []
    for index, argument in enumerate(arguments):
        if argument == "--":
            return [*spelt, *arguments[index:]]
        name, sign, value = argument.partition("=")
        is_flag = name.startswith("--")
        spelt.append("--" + name[2:].replace("-", "_") + sign + value if is_flag else argument)
    return spelt


def local_path(text: str) -> str:
    """The `type` of an argument that takes a path: `~` is the home folder."""
    return os.path.expanduser(text)


def refuse_addresses(arguments: argparse.Namespace) -> None:
    """Raises `UserError` where any argument but a query is an address, such as gs://bucket."""
    for name, value in vars(arguments).items():
        texts = value if isinstance(value, list) else [value]
        for text in texts if name != "query" else ():
            # The parts of a source, kind=coco,path=…, too.
            parts = re.split("[,=]", text) if isinstance(text, str) else ()
            for part in parts:
                files.local(part)


def add_filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threshold", type=float, default=0.1, help="lowest score, in [0, 1]")
    parser.add_argument("--top_k", type=int, default=300, help="query-box pairs per image")
    parser.add_argument(
        "--nms_iou", type=float, help="drop boxes that overlap a better one of their query more"
    )
    parser.add_argument(
        "--prompts", choices=("none", "clip", "clip_best7"), help="default: the model's own"
    )
