"""Reading and writing of files: every other module opens them through this one.

Today these are files of this machine. Other storage is to be added here alone, on `etils.epath`.
A file that is written appears whole or not at all.
"""

import errno
import hashlib
import io
import os
import re
import unicodedata
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias, cast

from owl_det.errors import UserError

if TYPE_CHECKING:
    from etils import epath

AnyPath: TypeAlias = str | os.PathLike[str]

# gs://bucket/x; also gs:/bucket/x, which is what is left of it once it was taken for a path.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def is_address(text: AnyPath) -> bool:
    """True for `gs://…`, `s3://…`, `https://…` and their like, which are not local paths."""
    return _ADDRESS.match(os.fspath(text)) is not None


def local(text: AnyPath, what: str = "") -> Path:
    """A path of this machine; `~` is the home folder.

    `what` is the flag or key that gave it. Raises `UserError` for an address.
    """
    _refuse_address(text, what)
    return Path(text).expanduser()


def did_you_mean(path: AnyPath) -> str:
    """`; did you mean 'a/IMG.JPG'?` if that file differs only in spelling, else nothing.

    Spelling is case, form of Unicode, outer spaces and separators. The text goes after the message
    that `path` does not exist.
    """
    meant = _other_spelling(os.fspath(path))
    return f"; did you mean {meant!r}?" if meant else ""


def read_bytes(path: AnyPath) -> bytes:
    """The content of a file. Raises `OSError`, as all readers here."""
    with open_read(path) as file:
        return file.read()


def read_text(path: AnyPath, encoding: str = "utf-8") -> str:
    """The text of a file, ends of lines as they are. Raises `UnicodeDecodeError` as well."""
    return read_bytes(path).decode(encoding)


def open_read(path: AnyPath) -> io.BufferedReader:
    """A file to read from its start, in bytes; the caller closes it."""
    return cast(io.BufferedReader, _path(path).open("rb"))


def open_range(path: AnyPath, start: int, length: int) -> bytes:
    """The bytes from `start` on: `length` of them, or fewer where the file ends before."""
    with open_read(path) as file:
        file.seek(start)
        return file.read(length)


def fetch(path: AnyPath) -> Path:
    """A file of this machine with the same content, for libraries that open files themselves."""
    _refuse_address(path)
    return Path(path)  # it is of this machine


def sha256(path: AnyPath) -> str:
    """The SHA-256 of a file's content, as 64 hex digits."""
    with open_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic(path: AnyPath, *, fsync: bool = False) -> Generator[Path, None, None]:
    """A temporary file beside `path`, which takes its name when the block is left in order.

    Missing folders are made. After an error nothing of the temporary file stays. With `fsync` the
    content is on the disk before the name is. Raises `OSError`, as all writers here.
    """
    with _temporary(Path(path)) as partial:
        yield partial
        if fsync:
            _fsync(partial)
        _path(partial).replace(path)


def write_atomic(path: AnyPath, content: str | bytes, *, fsync: bool = False) -> None:
    """Writes a whole file, text as UTF-8: readers see the old content or the new."""
    with atomic(path, fsync=fsync) as partial:
        _write(partial, content)


def write_new(path: AnyPath, content: str | bytes) -> bool:
    """Writes a whole file and syncs it to disk, unless one is there: False then.

    Of several processes that write the same new file one writes it.
    """
    with _temporary(Path(path)) as partial:
        _write(partial, content)
        _fsync(partial)
        try:
            os.link(partial, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            _path(partial).replace(path)
    return True


@contextmanager
def atomic_folder(path: AnyPath) -> Generator[Path, None, None]:
    """An empty folder `<path>.partial`, which takes the name when the block is left in order.

    What an interrupted run left in it is removed first. After an error nothing of it stays. `path`
    may be an empty folder; raises `OSError` if it holds anything.
    """
    target = Path(path).absolute()
    partial = target.with_name(f"{target.name}.partial")
    _path(partial).rmtree(missing_ok=True)
    _path(partial).mkdir(parents=True)
    try:
        yield partial
        if target.is_dir():
            target.rmdir()
        _path(partial).rename(target)
    except BaseException:
        _path(partial).rmtree(missing_ok=True)
        raise


def open_write(path: AnyPath) -> BinaryIO:
    """An empty file to write bytes to; for files that `atomic` gives, or in an `atomic_folder`."""
    return cast(BinaryIO, _path(path).open("wb"))


def open_append(path: AnyPath) -> BinaryIO:
    """A file to append bytes to; it is made if it is missing."""
    return cast(BinaryIO, _path(path).open("ab"))


def _path(path: AnyPath) -> "epath.Path":
    """The path as `etils.epath` opens it. Raises `UserError` for an address."""
    from etils import epath  # takes 30 ms, which commands that read nothing do not wait for

    _refuse_address(path)
    return epath.Path(path)


def _refuse_address(text: AnyPath, what: str = "") -> None:
    if is_address(text):
        place = f"{what}: " if what else ""
        raise UserError(
            f"{place}{os.fspath(text)} is an address, and only local paths are read and written; "
            "mount that storage, or copy the files, and name the folder"
        )


@contextmanager
def _temporary(target: Path) -> Generator[Path, None, None]:
    """A name beside the target that no other process uses; its file is removed in the end."""
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    _path(target.parent).mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
    finally:
        _path(partial).unlink(missing_ok=True)


def _write(path: Path, content: str | bytes) -> None:
    with open_write(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def _fsync(path: Path) -> None:
    with open_read(path) as file:
        os.fsync(file.fileno())


def _other_spelling(text: str) -> str:
    """The path that exists and differs from `text` only in spelling; empty = there is none."""
    turned = text.replace("\\", "/")
    for spelt in (turned, text.replace("\\", "")):  # of another system; escaped for a shell
        if spelt != text and os.path.exists(spelt):
            return spelt
    expanded = Path(turned).expanduser() if turned.startswith("~") else Path(turned)
    known = Path(expanded.anchor)
    for part in expanded.parts[1 if expanded.anchor else 0 :]:
        step = known / part
        if not os.path.lexists(step):
            similar = _similar(known, part)
            if similar is None:
                return ""
            step = known / similar
        known = step
    return str(known) if str(known) != text and known.exists() else ""


def _similar(folder: Path, name: str) -> str | None:
    """The entry of the folder that is `name` but for case, Unicode form and outer spaces."""
    try:
        entries = sorted(os.listdir(folder))
    except OSError:
        return None
    return next((entry for entry in entries if _spelling_key(entry) == _spelling_key(name)), None)


def _spelling_key(name: str) -> str:
    # Folded again: composed letters may fold to others.
    folded = unicodedata.normalize("NFKC", name).casefold().strip()
    stem, suffix = os.path.splitext(unicodedata.normalize("NFKC", folded))
    return stem + {".jpeg": ".jpg", ".tiff": ".tif"}.get(suffix, suffix)
