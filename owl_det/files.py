"""Paths that a user gives, and files that appear whole or not at all."""

import os
import re
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from owl_det.errors import UserError

# gs://bucket/x; also gs:/bucket/x, which is what is left of it once it was taken for a path.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def is_address(text: str | os.PathLike[str]) -> bool:
    """True for `gs://…`, `s3://…`, `https://…` and their like, which are no local paths."""
    return _ADDRESS.match(os.fspath(text)) is not None


def local(text: str | os.PathLike[str], what: str = "") -> Path:
    """A path of this machine; `~` is the home folder.

    `what` is the flag or key that gave it. Raises `UserError` for an address.
    """
    if is_address(text):
        place = f"{what}: " if what else ""
        raise UserError(
            f"{place}{os.fspath(text)} is an address, and only local paths are read and written; "
            "mount that storage, or copy the files, and name the folder"
        )
    return Path(text).expanduser()


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Generator[Path, None, None]:
    """A temporary file beside `path`, which takes its name when the block is left in order.

    Missing folders are made. After an error nothing of the temporary file stays.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a whole file, text as UTF-8: readers see the old content or the new."""
    with atomic(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
