"""What all shards of image-text pairs share: samples, where they lie, and what is none."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import UInt8

from owl_det import files
from owl_det.errors import DataError

IMAGES_PER_SHARD = 1000  # where the data has no shards of its own
# How files begin that are sometimes stored under the name of another kind.
_BEGINNINGS = {
    b"\x1f\x8b": "compressed with gzip; decompress it first",
    b"BZh": "compressed with bzip2; decompress it first",
    b"\xfd7zXZ": "compressed with xz; decompress it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; decompress it first",
    b"PK\x03\x04": "a ZIP archive; store it as .tar",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself",
    b"<": "a page (HTML or XML), such as a server sends in place of a file; fetch it again",
    b"{": "JSON; fetch the file itself",
}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with the texts found with it."""

    key: str  # names it within a shard
    image: bytes | UInt8[np.ndarray, "h w 3"]  # an encoded file, or pixels
    texts: tuple[str, ...]
    note: str = ""  # what is there in place of a caption, or of a part of one


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """Something that is no sample, with the reason."""

    key: str
    reason: str
    is_damage: bool = False  # of the whole file: what follows, or all of it, is lost


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a sample lies in its shard; what the numbers mean is the shard's affair."""

    key: str
    numbers: tuple[int, ...]  # as many for every sample of one data set
    has_text: bool = True  # False: it certainly has no caption


class ImageTextShards(Protocol):
    name: str
    version: str  # changes with the list of files and their sizes

    def __len__(self) -> int:
        """Number of shards."""
        ...

    def samples(self, shard: int) -> Iterator[Sample | Unreadable]:
        """One shard, in the order of the file.

        Raises `OSError` where the file system fails: that is no property of the data.
        """
        ...


class LocatedShards(ImageTextShards, Protocol):
    """Shards of files, which can be read at random."""

    def locate(self, shard: int) -> Iterator[Place | Unreadable]:
        """Every sample of a shard, in the order of the file; images are not read."""
        ...

    def fetch(self, shard: int, place: Place) -> Sample | Unreadable:
        """Reads one sample. The same as `samples` yields, but for the key, which is the place's."""
        ...


def cut(num_images: int, num_shards: int) -> list[int]:
    """Where contiguous shards start, and the end of the last; 0 shards: a thousand images each."""
    shards = num_shards or -(-num_images // IMAGES_PER_SHARD)
    if shards > num_images:
        raise DataError(f"--shards: {shards} shards of {num_images} images; give fewer")
    return [i * num_images // shards for i in range(shards + 1)]


def read_spans(file: Path, spans: Sequence[Sequence[int]]) -> list[bytes]:
    """The bytes at these (offset, size) of a file. Raises `OSError` if it ends before."""
    parts = []
    with files.open_read(file) as opened:
        for offset, size in spans:
            opened.seek(offset)
            parts.append(opened.read(size))
            if len(parts[-1]) != size:
                raise OSError("the file has become shorter")
    return parts


def what_it_is(file: Path) -> str:
    """What a file is that is not what its name says; empty = nothing known."""
    start = files.open_range(file, 0, 64)
    if not start:
        return "empty"
    known = (said for beginning, said in _BEGINNINGS.items() if start.startswith(beginning))
    return next(known, "")


def version_of(kind: str, files: Sequence[Path]) -> str:
    """Of the names and sizes; a file that is missing counts as -1."""
    sizes = [(f.name, f.stat().st_size if f.is_file() else -1) for f in files]
    return f"{kind}-{hashlib.sha256(repr(sizes).encode()).hexdigest()[:12]}"
