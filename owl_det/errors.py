"""Errors that a user can mend, and the exit codes of all commands."""

import enum
from collections.abc import Generator
from contextlib import contextmanager


class ExitCode(enum.IntEnum):
    """What a command's exit code says; one table for all commands (docs/exit_codes.md)."""

    DONE = 0  # or nothing to do
    LOSSES = 1  # finished, but some images, shards or files were lost; stderr says which
    REFUSED = 2  # a user's error: nothing was done, or what was saved stays
    UNFINISHED = 75  # told to stop (SIGTERM); the same command goes on
    INTERRUPTED = 130  # Ctrl-C


class UserError(Exception):
    """Something the user gave is wrong; the message names the file or field and the remedy.

    It is one line, though names of files and what other libraries say may hold several.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines())


class ConfigError(UserError):
    """A config key, type or combination of values that cannot be run."""


class DataError(UserError):
    """A data set that is missing, empty, malformed or too damaged to use."""


class SourceError(DataError):
    """A data set that the keys of a config's source, or the flags of a command, describe wrongly.

    The message is in the words of a config, unless `in_flags` is around it.
    """

    def __init__(self, problem: str, *, keys: str, flags: str):
        """`keys` and `flags` are the remedy: what to change in a config, and of a command."""
        super().__init__(f"{problem}; {keys}")
        self.of_command = f"{problem}; {flags}"


class CheckpointError(UserError):
    """A checkpoint that is missing or does not fit the model."""


@contextmanager
def in_flags() -> Generator[None, None, None]:
    """Around a command that flags tell of a data set: messages name them, not a config's keys."""
    try:
        yield
    except SourceError as error:
        raise DataError(error.of_command) from None
