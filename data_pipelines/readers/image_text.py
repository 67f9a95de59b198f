"""Image-text pairs in shards: what pseudo-annotation and contrastive pretraining take in.

    shapes_world:SPLIT:NUM[:SIZE]   images of the embedded data set with their captions
    a .tar file, or a folder of them   WebDataset: members of one stem are one sample
    a .tfrecord file, or a folder of them   tf.train.Example: image/encoded and caption
    a folder of images   captions in captions.jsonl or metadata.jsonl, or in a .txt beside each

Files keep their own shards; the first and the last kind are cut into contiguous shards. Nothing is
extracted or unpickled. What cannot be read is yielded as `Unreadable`, so that it can be counted.

Annotation reads shards front to back (`samples`). Training reads at random: `locate` goes through a
shard without its images, once, and `fetch` reads one sample from where it lies.
`image_text_reader` does that.
"""

import errno
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from data_pipelines.features import Record
from data_pipelines.readers import json_fields
from data_pipelines.readers.folder import IMAGE_SUFFIXES, require_folder
from data_pipelines.shapes_world import SPLITS, ShapesWorld
from owl_det.errors import DataError
from owl_det.optional import is_installed, leave_accelerators_to_jax

IMAGES_PER_SHARD = 1000  # where the data has no shards of its own
MAX_MEMBER_BYTES = 256 * 2**20  # of one image or text
IMAGE_KEYS = ("image/encoded", "image", "jpg", "png")  # features of tf.train.Example, first wins
TEXT_KEYS = ("caption", "image/caption", "text", "txt")
TEXT_FIELDS = ("caption", "text")  # of JSON
FILE_FIELDS = ("file_name", "file", "image")
COMPRESSED = (".gz", ".zlib", ".zst", ".bz2", ".xz")  # of a .tfrecord file


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


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a sample lies in its shard; what the numbers mean is the shard's affair."""

    key: str
    numbers: tuple[int, ...]  # as many for every sample of one data set


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


def open_shards(where: str, num_shards: int = 0) -> ImageTextShards:
    """Opens what `where` names (see the top of this file).

    `num_shards` > 0 cuts a folder or shapes world into so many, 0 into shards of a thousand images.
    Raises `DataError` if nothing is there, the kind is unknown, or files have shards of their own.
    """
    if where.startswith("shapes_world:"):
        return _ShapesWorldShards(where, num_shards)
    shards = open_files(Path(where), "--input", num_shards)
    if num_shards not in (0, len(shards)):
        raise DataError(
            f"--shards: {num_shards}, but {where} has {len(shards)} files, which are the shards; "
            "leave --shards out"
        )
    return shards


def open_files(path: Path, keys: str, num_shards: int = 0) -> LocatedShards:
    """The shards of .tar files, of .tfrecord files or of a folder of images.

    `keys` name, in messages, what the user gave. `num_shards` cuts a folder of images. Raises
    `DataError` if nothing is there, the kind is unknown or mixed, or TensorFlow is missing.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; correct {keys}")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    tars = [file for file in files if file.suffix == ".tar"]
    records = [file for file in files if ".tfrecord" in file.name]
    if tars and records:
        raise DataError(f"{path}: holds .tar and .tfrecord files; name one kind in {keys}")
    if tars:
        return _TarShards(str(path), tars)
    if records:
        return _TfRecordShards(str(path), records)
    if not path.is_dir():
        raise DataError(
            f"{path}: neither .tar nor .tfrecord; name such files or a folder in {keys}"
        )
    names = ("captions.jsonl", "metadata.jsonl")
    captions = next((path / name for name in names if (path / name).is_file()), None)
    if captions is None:
        return _FolderShards(path, num_shards, {}, None)
    # An image that the file does not list has no caption, but is there.
    texts = dict.fromkeys(_find_images(path), ()) | _read_captions(captions)
    return _FolderShards(path, num_shards, texts, captions)


def open_coco_captions(folder: Path, captions: Path) -> LocatedShards:
    """The images of a folder with the captions of COCO's JSON (`captions_train2017.json`).

    Images of the file without a caption have none. Raises `DataError` if either is missing or the
    file is malformed.
    """
    require_folder(folder, "images")
    texts = _read_coco_captions(captions)
    if not texts:
        raise DataError(f"{captions}: images: there are none; name a file with images")
    return _FolderShards(folder, 0, texts, captions)


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
        for place in self.locate(shard):
            yield place if isinstance(place, Unreadable) else self._read(shard, place)

    def locate(self, shard: int) -> Iterator[Place | Unreadable]:
        """Consecutive members of one stem (up to the first dot of the file name) are a sample."""
        stem, members = "", dict[str, _Member]()
        for member in _tar_members(self._files[shard]):
            if members and (member.stem != stem or member.is_damage):
                yield _tar_place(stem, members)
                members = {}
            if member.is_damage:
                yield Unreadable(key=member.name, reason=member.refused)
                return
            stem = member.stem
            members[member.extension] = member
        if members:
            yield _tar_place(stem, members)

    def fetch(self, shard: int, place: Place) -> Sample | Unreadable:
        try:
            return self._read(shard, place)
        except OSError as error:
            return Unreadable(key=place.key, reason=f"{self._files[shard].name}: {error}")

    def _read(self, shard: int, place: Place) -> Sample | Unreadable:
        *image_span, text_offset, text_size, is_json = place.numbers
        image, text = _read_spans(self._files[shard], [image_span, (text_offset, text_size)])
        try:
            texts = _json_texts(json.loads(text)) if is_json else (text.decode("utf-8"),)
        except (UnicodeDecodeError, ValueError, RecursionError) as error:
            return Unreadable(key=place.key, reason=f"its text cannot be read: {error}")
        return Sample(key=place.key, image=image, texts=tuple(t for t in texts if t.strip()))


@dataclass(frozen=True, kw_only=True)
class _Member:
    """A regular file in a tar file, or the place where the tar file is damaged."""

    name: str
    offset: int = 0  # of its bytes in the tar file
    size: int = 0
    refused: str = ""  # why it is not read; empty = it is
    is_damage: bool = False

    @property
    def stem(self) -> str:
        folder, _, file = self.name.rpartition("/")
        first = file.partition(".")[0]
        return f"{folder}/{first}" if folder else first

    @property
    def extension(self) -> str:
        return self.name.rpartition("/")[2].partition(".")[2].lower()


def _tar_members(file: Path) -> Iterator[_Member]:
    """The regular files, from their headers alone; what follows damage is lost.

    Raises `OSError` where the file system fails, which is no damage of the file.
    """
    damage = "the tar file is damaged from here on"
    try:
        size = file.stat().st_size
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                # tarfile would keep every header.
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
                if not member.isfile():
                    continue
                if member.issparse() or member.size > MAX_MEMBER_BYTES:
                    reason = f"{member.size} bytes; the limit is {MAX_MEMBER_BYTES}"
                    reason = "a sparse file" if member.issparse() else reason
                    yield _Member(name=_utf8(member.name), refused=reason)
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                yield _Member(name=_utf8(member.name), offset=member.offset_data, size=member.size)
            # tarfile takes a damaged header for the end; a whole file ends in zeros.
            if not _ends_in_zeros(file, tar.offset):
                yield _Member(name=f"{file.name}@{tar.offset}", refused=damage, is_damage=True)
    except (tarfile.TarError, OSError, ValueError) as error:  # ValueError: of malformed pax headers
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: of absurd offsets
            raise
        yield _Member(name=f"{file.name} ({error})", refused=damage, is_damage=True)


def _utf8(name: str) -> str:
    """A member's name; bytes that are no UTF-8 are written out."""
    return name.encode("utf-8", "backslashreplace").decode()


def _ends_in_zeros(file: Path, offset: int) -> bool:
    with file.open("rb") as opened:
        opened.seek(offset)
        return not opened.read(tarfile.BLOCKSIZE).strip(b"\0")


def _tar_place(key: str, members: Mapping[str, _Member]) -> Place | Unreadable:
    """Where the image and the text of a sample are: offset and size each, and if it is JSON."""
    refused = [member.refused for member in members.values() if member.refused]
    if refused:
        return Unreadable(key=key, reason=refused[0])
    image = next((members[name] for name in members if f".{name}" in IMAGE_SUFFIXES), None)
    if image is None:
        return Unreadable(key=key, reason=f"no image among the members {', '.join(members)}")
    text = members.get("txt", _Member(name=""))
    is_json = not text.size and "json" in members  # an empty .txt says nothing
    text = members["json"] if is_json else text
    numbers = (image.offset, image.size, text.offset, text.size, int(is_json))
    return Place(key=key, numbers=numbers)


def _read_spans(file: Path, spans: Sequence[Sequence[int]]) -> list[bytes]:
    """The bytes at these (offset, size) of a file. Raises `OSError` if it ends before."""
    parts = []
    with file.open("rb") as opened:
        for offset, size in spans:
            opened.seek(offset)
            parts.append(opened.read(size))
            if len(parts[-1]) != size:
                raise OSError("the file has become shorter")
    return parts


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
        if not is_installed("tensorflow"):
            raise DataError(
                f"{where}: reading TFRecord needs TensorFlow: pip install tensorflow, or store the "
                "pairs in .tar files (WebDataset), which need nothing"
            )
        for file in files:
            if file.suffix in COMPRESSED:
                raise DataError(f"{file}: is compressed; decompress it first")
        leave_accelerators_to_jax()
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
        except tf.errors.DataLossError as error:
            reason = f"{file.name} is damaged from here on: {error.message}"
            yield Unreadable(key=f"{position:08d}", reason=reason)
        except tf.errors.OpError as error:
            raise OSError(f"{file}: {error.message}") from error

    def locate(self, shard: int) -> Iterator[Place | Unreadable]:
        """From the lengths alone: unlike `samples` it looks at no checksum.

        A record is a length (8 bytes), its checksum (4), the data, and the data's checksum (4).
        """
        file = self._files[shard]
        end, offset, number = file.stat().st_size, 0, 0
        with file.open("rb") as opened:
            while offset < end:
                opened.seek(offset)
                size = int.from_bytes(opened.read(8), "little")
                if size > MAX_MEMBER_BYTES or offset + size + 16 > end:
                    reason = f"{file.name} is damaged, or compressed, from byte {offset} on"
                    yield Unreadable(key=f"{number:08d}", reason=reason)
                    return
                yield Place(key=f"{number:08d}", numbers=(offset + 12, size))
                offset += size + 16
                number += 1

    def fetch(self, shard: int, place: Place) -> Sample | Unreadable:
        import tensorflow as tf

        file = self._files[shard]
        try:
            (raw,) = _read_spans(file, [place.numbers])
        except OSError as error:
            return Unreadable(key=place.key, reason=f"{file.name}: {error}")
        return _tfrecord_sample(place.key, raw, tf)


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
    def __init__(
        self,
        folder: Path,
        num_shards: int,
        captions: Mapping[str, tuple[str, ...]],
        captions_file: Path | None,
    ):
        """`captions` by file, and where they were read; else in text files beside the images."""
        self._folder, self._captions = folder, captions
        self._files = sorted(captions) if captions else _find_images(folder)
        if not self._files:
            raise DataError(f"{folder}: no images, .tar or .tfrecord files there")
        self._starts = _cut(len(self._files), num_shards)
        self.name = str(folder)
        files = [folder / file for file in self._files]
        texts = [captions_file] if captions_file else _text_files(files)
        version = _version("folder", [*files, *texts])
        self.version = f"{version}-{len(self)}"

    def __len__(self) -> int:
        return len(self._starts) - 1

    def samples(self, shard: int) -> Iterator[Sample | Unreadable]:
        """Files that are gone, or may not be read, are `Unreadable`; not if all are."""
        is_any_read = False
        for place in self.locate(shard):
            try:
                sample = self._read(place)
            except (FileNotFoundError, PermissionError) as error:
                sample = Unreadable(key=place.key, reason=str(error))
            else:
                is_any_read = True
            yield sample
        if not is_any_read:
            raise OSError(f"{self._folder}: no file of shard {shard} can be read; is it there?")

    def locate(self, shard: int) -> Iterator[Place]:
        for index in range(self._starts[shard], self._starts[shard + 1]):
            # Of names that are no UTF-8 the bytes are written out.
            key = os.fsencode(self._files[index]).decode("utf-8", "backslashreplace")
            yield Place(key=key, numbers=(index,))

    def fetch(self, shard: int, place: Place) -> Sample | Unreadable:
        try:
            return self._read(place)
        except OSError as error:
            return Unreadable(key=place.key, reason=str(error))

    def _read(self, place: Place) -> Sample | Unreadable:
        name = self._files[place.numbers[0]]
        file = self._folder / name
        image = file.read_bytes()
        try:
            texts = self._captions[name] if self._captions else _text_beside(file)
        except UnicodeDecodeError as error:
            return Unreadable(key=place.key, reason=str(error))
        return Sample(key=place.key, image=image, texts=texts)


def _find_images(folder: Path) -> list[str]:
    found = (Path(root, file) for root, _, files in os.walk(folder) for file in files)
    images = (path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path.relative_to(folder).as_posix() for path in images)


def _text_files(files: Sequence[Path]) -> list[Path]:
    return [text for file in files if (text := file.with_suffix(".txt")).is_file()]


def _text_beside(file: Path) -> tuple[str, ...]:
    beside = file.with_suffix(".txt")
    text = beside.read_text("utf-8").strip() if beside.is_file() else ""
    return (text,) if text else ()


def _read_captions(path: Path) -> dict[str, tuple[str, ...]]:
    """Texts by file, relative to the folder of the captions file."""
    captions: dict[str, tuple[str, ...]] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                entry = json.loads(line.decode("utf-8"))
                texts = _json_texts(entry)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: {error}; correct the line") from None
            named = next((entry[key] for key in FILE_FIELDS if key in entry), None)
            image = _inside(named) if isinstance(named, str) else None
            if image is None:
                raise DataError(
                    f"{where}: no `file_name` that lies in {path.parent}; correct the line"
                )
            captions[image] = captions.get(image, ()) + texts
    return captions


def _read_coco_captions(path: Path) -> dict[str, tuple[str, ...]]:
    """Texts of each image of a captions file of COCO, by file name."""
    content = json_fields.load(path, "captions")
    names: dict[int, str] = {}
    for i, entry in enumerate(json_fields.items(content, "images", path)):
        where = f"{path}: images[{i}]"
        given = json_fields.text(entry, "file_name", where)
        name = _inside(given)
        if name is None:
            raise DataError(f"{where}.file_name: {given!r} lies outside the folder; correct it")
        names[json_fields.integer(entry, "id", where)] = name
    captions: dict[str, tuple[str, ...]] = dict.fromkeys(names.values(), ())
    for i, entry in enumerate(json_fields.items(content, "annotations", path)):
        where = f"{path}: annotations[{i}]"
        image_id = json_fields.integer(entry, "image_id", where)
        if image_id not in names:
            raise DataError(f"{where}.image_id: no image has the id {image_id}")
        text = json_fields.text(entry, "caption", where).strip()
        if text:
            captions[names[image_id]] += (text,)
    return captions


def _inside(name: str) -> str | None:
    """The name, spelt in one way; None if no file in the folder can have it."""
    path = PurePosixPath(name)
    is_outside = path.is_absolute() or ".." in path.parts or "\0" in name
    is_text = name.encode("utf-8", "replace").decode() == name  # no lone surrogates
    return path.as_posix() if is_text and not is_outside else None


def _version(kind: str, files: list[Path]) -> str:
    """Of the names and sizes; a file that is missing counts as -1."""
    sizes = [(f.name, f.stat().st_size if f.is_file() else -1) for f in files]
    return f"{kind}-{hashlib.sha256(repr(sizes).encode()).hexdigest()[:12]}"
