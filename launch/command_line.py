"""What the command lines of the launchers share; the standard library is all they need."""

import argparse
from collections.abc import Sequence
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Flags are written out, with - or _; what is wrong is one line and exit code 2."""

    def __init__(self, *, prog: str, usage: str, description: str | None):
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The launcher's own flags, spelt with _, and the command that follows `--`."""
    own, command = list(argv), []
    if "--" in own:
        place = own.index("--")
        own, command = own[:place], own[place + 1 :]
    return [_with_underscores(word) for word in own], command


def positive(text: str) -> int:
    """The `type` of a flag that counts something."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def _with_underscores(word: str) -> str:
    name, sign, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + sign + value if name.startswith("--") else word
