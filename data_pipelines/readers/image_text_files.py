"""Image-text pairs in files: .tar, .tfrecord, a folder of images, or COCO's captions.

`image_text_inputs` says what each kind holds.
"""

from pathlib import Path

from absl import logging

from data_pipelines import image_files
from data_pipelines.readers import captions as captions_lib
from data_pipelines.readers.folder import require_folder
from data_pipelines.readers.folder_shards import FolderShards, open_folder
from data_pipelines.readers.image_text_shards import LocatedShards
from data_pipelines.readers.tar_shards import TarShards
from data_pipelines.readers.tfrecord_shards import TfRecordShards
from owl_det.errors import DataError

_COMPRESSED_TARS = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_NO_RECORDS = (".idx", ".index", ".json", ".txt", ".md5")  # files that lie beside .tfrecord files


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
