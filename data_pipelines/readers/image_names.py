"""Finds the files of images whose names in a label file are written in another way.

Labels travel between machines: names come with backslashes, with folders that only existed
elsewhere, as addresses, with a suffix in other letters, or in Unicode's decomposed form.
"""

import os
import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

_MAX_FILES = 1_000_000  # that are listed to compare names with
_MAX_TAILS = 6  # folders of a name that are tried
_DRIVE = re.compile(r"^[A-Za-z]:(?=[/\\])")


class ImageNames:
    """The files of a folder by the names that a data set gives them.

    A file is taken as it is named; else one that is named alike, if there is no other such file and
    no other image that it could be of.
    """

    def __init__(self, folder: Path, wanted: Iterable[tuple[str, ...]]) -> None:
        """`wanted` are the names of each image of the data set, the first that exists counts."""
        self._folder = folder
        self._wanted = wanted
        self._lock = threading.Lock()
        self._claims: Counter[str] | None = None
        self._files: dict[str, list[str]] | None = None

    def find(self, names: Sequence[str]) -> Path | None:
        """The file of an image; None if there is none, or no telling which it is."""
        return self.exact(names) or self.alike(names)

    def exact(self, names: Sequence[str]) -> Path | None:
        paths = (self._folder / name for name in names)
        return next((path for path in paths if os.path.isfile(path)), None)

    def alike(self, names: Sequence[str]) -> Path | None:
        """The only file that is named alike and that only this image can mean."""
        files = self._by_key()
        for name in names:
            for tail in _tails(name):
                found = files.get(_key(tail), [])
                same = [file for file in found if file == tail] or found
                if len(same) == 1 and self._claimed()[_key(tail)] == 1:
                    return self._folder / same[0]
        return None

    def cause(self, names: Sequence[str]) -> str:
        """Why no file was found, as far as that shows, with the remedy; may be empty."""
        name = names[0]
        files = self._by_key()
        tails = _tails(name)
        alike = next((files[_key(tail)] for tail in tails if _key(tail) in files), [])
        if alike:
            listed = ", ".join(alike[:3])
            return f"{name!r} may be {listed}, or several images may be one of these; rename them"
        if not files:
            return "the folder holds no file"
        below = self._below(tails)
        if below:
            return below
        if "://" in name:
            return "the file names are addresses; download the images, and name them as they end"
        if "\\" in name:
            return "the file names use backslashes; name the folder that they begin in"
        if os.path.isabs(name) or _DRIVE.match(name):
            return "the file names are paths of another machine; name the folder with the files"
        return f"the folder holds {next(iter(files.values()))[0]}, for instance"

    def _below(self, tails: Sequence[str]) -> str:
        """What to say of files that lie deeper, or are of another format."""
        if not tails:
            return ""
        base = _key(tails[-1])
        stem = os.path.splitext(base)[0]
        for key, found in self._by_key().items():
            if key.endswith(f"/{base}"):
                return f"{found[0]} lies in a subfolder; name that folder"
            if os.path.splitext(key)[0] == stem:
                return f"there is {found[0]}, of another format; correct the file names"
        return ""

    def _by_key(self) -> dict[str, list[str]]:
        """The folder's files by their `_key`, relative to it."""
        with self._lock:
            if self._files is None:
                self._files = _list(self._folder)
            return self._files

    def _claimed(self) -> Counter[str]:
        """How many images of the data set could mean a file, by its `_key`."""
        with self._lock:
            if self._claims is None:
                self._claims = Counter()
                for names in dict.fromkeys(self._wanted):
                    self._claims.update({_key(tail) for name in names for tail in _tails(name)})
            return self._claims


def _list(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    number = 0
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.relpath(os.path.join(root, name), folder).replace(os.sep, "/")
            found.setdefault(_key(path), []).append(path)
            number += 1
        if number > _MAX_FILES:
            break
    return found


def _key(name: str) -> str:
    """The same for names that differ in the case of letters or in Unicode's form."""
    return unicodedata.normalize("NFC", name).casefold()


def _tails(name: str) -> list[str]:
    """The name as a relative path, then without its first folder, its first two, …"""
    paths = [name, *_of_address(name)]
    tails: list[str] = []
    for path in paths:
        parts = _DRIVE.sub("", path).replace("\\", "/").split("/")
        parts = [part for part in parts if part not in ("", ".", "..")][-_MAX_TAILS:]
        tails += ["/".join(parts[i:]) for i in range(len(parts))]
    return list(dict.fromkeys(tails))


def _of_address(name: str) -> list[str]:
    """The paths in an address, percent signs decoded: its own, and Label Studio's `?d=`."""
    if "://" not in name and "?" not in name:
        return [unquote(name)] if "%" in name else []
    try:
        parts = urlsplit(name)
    except ValueError:  # a malformed host
        return []
    return [*parse_qs(parts.query).get("d", []), unquote(parts.path)]
