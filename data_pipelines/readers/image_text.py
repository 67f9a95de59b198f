"""Image-text pairs in shards, read front to back: what pseudo-annotation takes in.

    shapes_world:SPLIT:NUM[:SIZE]   images of the embedded data set with their captions
    a .tar file, or a folder of them   WebDataset: members of one stem are one sample
    a .tfrecord file, or a folder of them   tf.train.Example: image/encoded and caption
    a folder of images   captions in captions.jsonl or metadata.jsonl, or in a .txt beside each

Files keep their own shards; the first and the last kind are cut into contiguous shards. Nothing is
extracted or unpickled. What cannot be read is yielded as `Unreadable`, so that it can be counted.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from data_pipelines.features import Record
from data_pipelines.readers.folder import IMAGE_SUFFIXES
from data_pipelines.shapes_world import SPLITS, ShapesWorld
from owl_det.errors import DataError

IMAGES_PER_SHARD = 1000  # where the data has no shards of its own
MAX_MEMBER_BYTES = 256 * 2**20  # of one image or text
IMAGE_KEYS = ("image/encoded", "image", "jpg", "png")  # features of tf.train.Example, first wins
TEXT_KEYS = ("caption", "image/caption", "text", "txt")
TEXT_FIELDS = ("caption", "text")  # of JSON
FILE_FIELDS = ("file_name", "file", "image")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with the texts found with it."""

    key: str  # unique within a shard
    image: bytes | UInt8[np.ndarray, "h w 3"]  # an encoded file, or pixels
    texts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """Something that is no sample, with the reason."""

    key: str
    reason: str


class ImageTextShards(Protocol):
    name: str
    version: str  # changes with the list of files and their sizes

    def __len__(self) -> int:
        """Number of shards."""
        ...

    def samples(self, shard: int) -> Iterator[Sample | Unreadable]:
        """One shard, in the order of the file."""
        ...


def open_shards(where: str, num_shards: int = 0) -> ImageTextShards:
    """Opens what `where` names (see the top of this file).

    `num_shards` > 0 cuts a folder or shapes world into so many, 0 into shards of a thousand images.
    Raises `DataError` if nothing is there, the kind is unknown, or files have shards of their own.
    """
    if where.startswith("shapes_world:"):
        return _ShapesWorldShards(where, num_shards)
    path = Path(where)
    if not path.exists():
        raise DataError(f"{where}: no such file or folder (--input)")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    tars = [file for file in files if file.suffix == ".tar"]
    records = [file for file in files if ".tfrecord" in file.name]
    if not tars and not records:
        if not path.is_dir():
            raise DataError(f"{where}: neither .tar nor .tfrecord; name such a file or a folder")
        return _FolderShards(path, num_shards)
    if tars and records:
        raise DataError(f"{where}: holds .tar and .tfrecord files; name one kind (--input)")
    if num_shards not in (0, len(tars or records)):
        raise DataError(
            f"--shards: {num_shards}, but {where} has {len(tars or records)} files, which are the "
            "shards; leave --shards out"
        )
    return _TarShards(where, tars) if tars else _TfRecordShards(where, records)


# --- shapes world --------------------------------------------------------------------------------


def shapes_world_key(index: int) -> str:
    """The key of the sample of an image of shapes world."""
    return f"{index:08d}"


def open_shapes_world(where: str) -> ShapesWorld:
    """What `shapes_world:SPLIT:NUM[:SIZE]` names. Raises `DataError` if it is not of this form."""
    kind, *parts = where.split(":")
    is_number = all(part.isdigit() and int(part) > 0 for part in parts[1:])
    is_known = kind == "shapes_world" and len(parts) in (2, 3) and parts[0] in SPLITS
    if not is_known or not is_number:
        raise DataError(
            f"{where}: expected shapes_world:SPLIT:NUM[:SIZE], such as shapes_world:train:2000, "
            f"with the splits {', '.join(SPLITS)}"
        )
    size = int(parts[2]) if len(parts) == 3 else 64
    return ShapesWorld(split=parts[0], num_images=int(parts[1]), image_size=size)


class _ShapesWorldShards:
    def __init__(self, where: str, num_shards: int):
        self._world = open_shapes_world(where)
        self._starts = _cut(len(self._world), num_shards)
        self.name, self.version = where, f"{self._world.version}-{where}-{len(self)}"

    def __len__(self) -> int:
        return len(self._starts) - 1

    def samples(self, shard: int) -> Iterator[Sample | Unreadable]:
        for index in range(self._starts[shard], self._starts[shard + 1]):
            record: Record = self._world[index]
            yield Sample(key=shapes_world_key(index), image=record.image, texts=record.captions)


def _cut(num_images: int, num_shards: int) -> list[int]:
    """Where contiguous shards start, and the end of the last."""
    shards = num_shards or -(-num_images // IMAGES_PER_SHARD)
    if shards > num_images:
        raise DataError(f"--shards: {shards} shards of {num_images} images; give fewer")
    return [i * num_images // shards for i in range(shards + 1)]


# --- WebDataset ----------------------------------------------------------------------------------


class _TarShards:
    def __init__(self, where: str, files: list[Path]):
        self._files = files
        self.name, self.version = where, _version("webdataset", files)

    def __len__(self) -> int:
        return len(self._files)

    def samples(self, shard: int) -> Iterator[Sample | Unreadable]:
        """Consecutive members of one stem (up to the first dot of the file name) are a sample."""
        stem, members = "", dict[str, bytes | str]()
        damaged = ""
        for name, content in _tar_members(self._files[shard]):
            if content is None:
                damaged = name
                break
            folder, _, file = name.rpartition("/")
            first, _, extension = file.partition(".")
            key = f"{folder}/{first}" if folder else first
            if key != stem and members:
                yield _tar_sample(stem, members)
                members = {}
            stem = key
            members[extension.lower()] = content
        if members:
            yield _tar_sample(stem, members)
        if damaged:
            yield Unreadable(key=damaged, reason="the tar file is damaged from here on")


def _tar_members(file: Path) -> Iterator[tuple[str, bytes | str | None]]:
    """(name, content) of the regular files; a reason as text where one is not read.

    The last content is None if the tar file breaks off or is damaged.
    """
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.size > MAX_MEMBER_BYTES:
                    reason = f"{member.size} bytes; the limit is {MAX_MEMBER_BYTES}"
                    yield _utf8(member.name), reason
                    continue
                opened = tar.extractfile(member)
                content = opened.read() if opened else b""
                if len(content) != member.size:
                    raise tarfile.ReadError("unexpected end of data")
                yield _utf8(member.name), content
            # tarfile takes a damaged header for the end; a whole file ends in zeros.
            if not _ends_in_zeros(file, tar.offset):
                yield f"{file.name}@{tar.offset}", None
    except (tarfile.TarError, OSError) as error:
        yield f"{file.name} ({error})", None


def _utf8(name: str) -> str:
    """A member's name; bytes that are no UTF-8 are written out."""
    return name.encode("utf-8", "backslashreplace").decode()


def _ends_in_zeros(file: Path, offset: int) -> bool:
    with file.open("rb") as opened:
        opened.seek(offset)
        return not opened.read(tarfile.BLOCKSIZE).strip(b"\0")


def _tar_sample(key: str, members: Mapping[str, bytes | str]) -> Sample | Unreadable:
    refused = [content for content in members.values() if isinstance(content, str)]
    if refused:
        return Unreadable(key=key, reason=refused[0])
    entries = {name: content for name, content in members.items() if isinstance(content, bytes)}
    image = next((entries[n] for n in entries if f".{n}" in IMAGE_SUFFIXES), None)
    if image is None:
        return Unreadable(key=key, reason=f"no image among the members {', '.join(entries)}")
    try:
        texts = [entries["txt"].decode("utf-8")] if "txt" in entries else []
        if not texts and "json" in entries:
            texts = list(_json_texts(json.loads(entries["json"])))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        return Unreadable(key=key, reason=f"its text cannot be read: {error}")
    return Sample(key=key, image=image, texts=tuple(text for text in texts if text.strip()))


def _json_texts(entry: Any) -> tuple[str, ...]:
    """The caption fields of a JSON object; each a text or a list of texts."""
    if not isinstance(entry, dict):
        raise ValueError("the JSON is no object")
    for field in TEXT_FIELDS:
        value = entry.get(field)
        values = value if isinstance(value, list) else [value]
        texts = tuple(text for text in values if isinstance(text, str))
        for text in texts:
            text.encode()  # JSON can hold half characters, which no file can
        if texts and len(texts) == len(values):
            return tuple(text for text in texts if text.strip())
    return ()


# --- TFRecord ------------------------------------------------------------------------------------


class _TfRecordShards:
    def __init__(self, where: str, files: list[Path]):
        self._files = files
        self.name, self.version = where, _version("tfrecord", files)

    def __len__(self) -> int:
        return len(self._files)

    def samples(self, shard: int) -> Iterator[Sample | Unreadable]:
        import tensorflow as tf

        file = self._files[shard]
        position = 0
        try:
            for position, raw in enumerate(tf.data.TFRecordDataset(str(file)), start=1):
                yield _tfrecord_sample(f"{position - 1:08d}", bytes(raw.numpy()), tf)
        except tf.errors.OpError as error:
            reason = f"{file.name} is damaged from here on: {error.message}"
            yield Unreadable(key=f"{position:08d}", reason=reason)


def _tfrecord_sample(key: str, raw: bytes, tf: Any) -> Sample | Unreadable:
    from google.protobuf.message import DecodeError

    try:
        features = tf.train.Example.FromString(raw).features.feature
    except DecodeError:
        return Unreadable(key=key, reason="no tf.train.Example")
    images = [features[k].bytes_list.value for k in IMAGE_KEYS if k in features]
    if not images or len(images[0]) != 1:
        return Unreadable(key=key, reason=f"not one image under {' or '.join(IMAGE_KEYS)}")
    found = next((features[k].bytes_list.value for k in TEXT_KEYS if k in features), ())
    try:
        texts = tuple(text.decode("utf-8") for text in found)
    except UnicodeDecodeError as error:
        return Unreadable(key=key, reason=f"its text cannot be read: {error}")
    return Sample(key=key, image=images[0][0], texts=tuple(t for t in texts if t.strip()))


# --- folders -------------------------------------------------------------------------------------


class _FolderShards:
    def __init__(self, folder: Path, num_shards: int):
        self._folder = folder
        self._captions = _read_captions(folder)
        self._files = sorted(self._captions) if self._captions else _find_images(folder)
        if not self._files:
            raise DataError(f"{folder}: no images, .tar or .tfrecord files there (--input)")
        self._starts = _cut(len(self._files), num_shards)
        self.name = str(folder)
        version = _version("folder", [folder / file for file in self._files])
        self.version = f"{version}-{len(self)}"

    def __len__(self) -> int:
        return len(self._starts) - 1

    def samples(self, shard: int) -> Iterator[Sample | Unreadable]:
        for name in self._files[self._starts[shard] : self._starts[shard + 1]]:
            file = self._folder / name
            try:
                image = file.read_bytes()
                texts = self._captions.get(name) or _text_beside(file)
            except (OSError, UnicodeDecodeError) as error:
                yield Unreadable(key=name, reason=str(error))
                continue
            yield Sample(key=name, image=image, texts=texts)


def _find_images(folder: Path) -> list[str]:
    found = (Path(root, file) for root, _, files in os.walk(folder) for file in files)
    images = (path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path.relative_to(folder).as_posix() for path in images)


def _text_beside(file: Path) -> tuple[str, ...]:
    beside = file.with_suffix(".txt")
    text = beside.read_text("utf-8").strip() if beside.is_file() else ""
    return (text,) if text else ()


def _read_captions(folder: Path) -> dict[str, tuple[str, ...]]:
    """Texts by file, relative to the folder, from its captions file; empty if there is none."""
    names = ("captions.jsonl", "metadata.jsonl")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return {}
    captions: dict[str, tuple[str, ...]] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                entry = json.loads(line)
                texts = _json_texts(entry)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: {error}; correct the line") from None
            image = next((entry[key] for key in FILE_FIELDS if key in entry), None)
            if not isinstance(image, str) or not _is_inside(image):
                raise DataError(f"{where}: no `file_name` that lies in {folder}; correct the line")
            captions[image] = captions.get(image, ()) + texts
    return captions


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _version(kind: str, files: list[Path]) -> str:
    """Of the names and sizes; a file that is missing counts as -1."""
    sizes = [(f.name, f.stat().st_size if f.is_file() else -1) for f in files]
    return f"{kind}-{hashlib.sha256(repr(sizes).encode()).hexdigest()[:12]}"
