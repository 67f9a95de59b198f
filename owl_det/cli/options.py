"""What the options of all commands share: spelling, defaults in the help, paths, filters."""

import argparse
import difflib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from owl_det import files
from owl_det.errors import ExitCode, UserError
from owl_det.inference import ranges

Commands: TypeAlias = "argparse._SubParsersAction[CommandParser]"


class HelpWithDefaults(argparse.RawDescriptionHelpFormatter):
    """Names the default of every option that has one, unless its help does so in words.

    The lines of examples stay as they are.
    """

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


class CommandParser(Parser):
    """One that takes no arguments but its own, and names the flag that was meant.

    With `takes_changes` it also takes changes of a config, `--config.KEY=VALUE`, as `changes`.
    """

    def __init__(self, *arguments: object, takes_changes: bool = False, **options: object):
        super().__init__(*arguments, **options)
        self._takes_changes = takes_changes
        if takes_changes:
            self.set_defaults(changes=[])

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; a command within this one refuses by itself what it does not know."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if self._takes_changes and unknown and is_change(unknown[0]):
            parsed.changes, unknown = unknown, []
        flags = [text for text in unknown if text.startswith("--")]
        if unknown and self._subparsers is None:
            name = (flags or unknown)[0].partition("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unknown arguments: {' '.join(unknown)}{meant}")
        return parsed, unknown


def is_change(argument: str) -> bool:
    """True for `--config.KEY=VALUE` and its like, not for `--config=FILE`."""
    return re.match(r"--?(no)?config\.", argument) is not None


def with_underscores(arguments: Sequence[str]) -> list[str]:
    """`--query-image` is `--query_image`; values and what follows a bare `--` stay as they are.

    So do keys of a config, which are looked up in it.
    """
    spelt: list[str] = []
    for index, argument in enumerate(arguments):
        if argument == "--":
            return [*spelt, *arguments[index:]]
        name, sign, value = argument.partition("=")
        is_flag = name.startswith("--") and not is_change(argument)
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


def fraction(flag: str) -> Callable[[str], float]:
    """The `type` of an option that takes a number in [0, 1]. Raises `DataError` for another."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            return ranges.fraction(flag, text)
        return ranges.fraction(flag, number)

    return parse


def count(flag: str, least: int = 1) -> Callable[[str], int]:
    """The `type` of an option that takes a whole number. Raises `DataError` below `least`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            return ranges.count(flag, text, least)
        return ranges.count(flag, number, least)

    return parse


def check_folder(flag: str, path: str | os.PathLike[str]) -> None:
    """Raises `UserError` if no folder can be made or written there."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{flag} {path}: {folder} is a file; name a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: {folder} may not be written to; name another folder")


def add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images",
        type=local_path,
        nargs="+",
        metavar="IMAGE",
        help="files, or folders with their subfolders",
    )


def add_checkpoint(
    parser: argparse.ArgumentParser, what: str = "workdir, checkpoint or export"
) -> None:
    parser.add_argument("--checkpoint", type=local_path, required=True, metavar="DIR", help=what)


def add_image_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image_size",
        type=count("--image_size"),
        metavar="PIXELS",
        help="side of the square that the model sees; default: the model's own",
    )


def add_filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threshold", type=fraction("--threshold"), default=0.1, help="lowest score, in [0, 1]"
    )
    parser.add_argument(
        "--top_k", type=count("--top_k"), default=300, help="query-box pairs per image"
    )
    parser.add_argument(
        "--nms_iou",
        type=fraction("--nms_iou"),
        metavar="IOU",
        help="drop boxes that overlap a better one of their query more, such as 0.5; default: none",
    )
    parser.add_argument(
        "--nms_across_queries",
        action="store_true",
        help="with --nms_iou: better boxes of other queries count too",
    )
    parser.add_argument(
        "--prompts",
        choices=("none", "clip", "clip_best7"),
        help="sentences around each query; default: the model's own",
    )
