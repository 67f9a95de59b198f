"""Image-text pairs in shards: what pseudo-annotation and contrastive pretraining take in.

    shapes_world:SPLIT:NUM[:SIZE]   images of the embedded data set with their captions
    a .tar file, or a folder of them   WebDataset (`tar_shards`)
    a .tfrecord file, or a folder of them   tf.train.Example (`tfrecord_shards`)
    a folder of images   with captions in a file, or beside each image (`folder_shards`)

Files keep their own shards; the first and the last kind are cut into contiguous shards. What cannot
be read is yielded as `Unreadable`, so that it can be counted.

Annotation reads shards front to back (`samples`). Training reads at random: `locate` goes through a
shard without its images, once, and `fetch` reads one sample from where it lies.
`image_text_reader` does that.
"""

from collections.abc import Iterator
from pathlib import Path

from absl import logging

from data_pipelines import image_files
from data_pipelines.features import Record
from data_pipelines.readers import captions as captions_lib
from data_pipelines.readers.folder import require_folder
from data_pipelines.readers.folder_shards import FolderShards, open_folder
from data_pipelines.readers.image_text_shards import (
    ImageTextShards,
    LocatedShards,
    Sample,
    Unreadable,
    cut,
)
from data_pipelines.readers.tar_shards import TarShards
from data_pipelines.readers.tfrecord_shards import TfRecordShards
from data_pipelines.shapes_world import SPLITS, ShapesWorld
from owl_det import files
from owl_det.errors import DataError

_COMPRESSED_TARS = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_NO_RECORDS = (".idx", ".index", ".json", ".txt", ".md5")  # files that lie beside .tfrecord files


def open_shards(where: str, num_shards: int = 0) -> ImageTextShards:
    """Opens what `where` names (see the top of this file).

    `num_shards` > 0 cuts a folder or shapes world into so many, 0 into shards of a thousand images.
    Raises `UserError` if nothing is there, the kind is unknown, or files have shards of their own.
    """
    if where.startswith("shapes_world:"):
        return _ShapesWorldShards(where, num_shards)
    shards = open_files(files.local(where, "--input"), "--input", num_shards)
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
    there = sorted(path.iterdir()) if path.is_dir() else [path]
    there = [file for file in there if not image_files.is_hidden(file.name)]
    packed = [file for file in there if file.name.lower().endswith(_COMPRESSED_TARS)]
    if packed:
        raise DataError(f"{packed[0]}: is compressed; decompress it first")
    tars = [file for file in there if file.suffix.lower() == ".tar"]
    records = [f for f in there if ".tfrecord" in f.name and f.suffix not in _NO_RECORDS]
    if tars and records:
        raise DataError(f"{path}: holds .tar and .tfrecord files; name one kind in {keys}")
    others = [file.name for file in there if file not in {*tars, *records}]
    num_images = sum(map(image_files.is_image, others))
    if num_images and (tars or records):
        logging.warning(
            "%s: %d images beside the shards are not read; move them to a folder of their own",
            *(path, num_images),
        )
    if path.is_dir():
        _tell_of_deeper(path, are_all=not tars and not records)
    if tars:
        return TarShards(str(path), tars)
    if records:
        return TfRecordShards(str(path), records)
    if not path.is_dir():
        raise DataError(
            f"{path}: neither .tar nor .tfrecord; name such files or a folder in {keys}"
        )
    return open_folder(path, num_shards)


def _tell_of_deeper(path: Path, are_all: bool) -> None:
    """Logs shards in subfolders, which are not read; an error where nothing else is."""
    found = image_files.find(path)
    below = sorted(n for n in found.others if "/" in n and n.endswith((".tar", ".tfrecord")))
    if below and are_all and not found.images:
        raise DataError(
            f"{path}: its shards lie in subfolders, such as {below[0]}; name that folder"
        )
    if below:
        logging.warning(
            "%s: %d shards lie in subfolders and are not read, such as %s",
            *(path, len(below), below[0]),
        )


def open_coco_captions(folder: Path, captions: Path) -> LocatedShards:
    """The images of a folder with the captions of COCO's JSON (`captions_train2017.json`).

    Images of the file without a caption have none. Raises `DataError` if either is missing or the
    file is malformed.
    """
    require_folder(folder, "images")
    texts = captions_lib.read_coco(captions)
    if not texts:
        raise DataError(f"{captions}: images: there are none; name a file with images")
    found = image_files.FoundFiles(folder=folder, images=tuple(sorted(texts)), others=frozenset())
    return FolderShards(found, 0, texts, captions)


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
        self._starts = cut(len(self._world), num_shards)
        self.name, self.version = where, f"{self._world.version}-{where}-{len(self)}"

    def __len__(self) -> int:
        return len(self._starts) - 1

    def samples(self, shard: int) -> Iterator[Sample | Unreadable]:
        for index in range(self._starts[shard], self._starts[shard + 1]):
            record: Record = self._world[index]
            yield Sample(key=shapes_world_key(index), image=record.image, texts=record.captions)
