"""Image embeddings in a folder of safetensors files, one a shard of images.

    boxes [i, n, 4], class_embeddings [i, n, e], embedding_norm, logit_shift, logit_scale,
    objectness_logits [i, n]     float32, the fields of `types.TokenEmbeddings`
    sizes [i, 2]                 int32, height and width of each image in pixels
    metadata                     format, checkpoint, image_size, names (JSON)

The folder is complete or absent. Reading checks types and shapes before anything is allocated.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from owl_det import files
from owl_det.checkpoints import finite
from owl_det.errors import DataError
from owl_det.inference.embeddings import ImageEmbeddings
from owl_det.types import TokenEmbeddings

FORMAT = "owl_det image embeddings 1"

_FIELDS = tuple(field.name for field in dataclasses.fields(TokenEmbeddings))


class Writer:
    """Writes shards to a folder that is there once the block is left in order.

    Raises `DataError` if `path` exists.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self._folder = files.atomic_folder(self.path)
        self._num_shards = 0
        if self.path.exists():
            raise DataError(f"{self.path}: exists; remove it or write to another folder")

    def __enter__(self) -> "Writer":
        self._partial = self._folder.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self._folder.__exit__(kind, error, traceback)

    def add(self, images: ImageEmbeddings) -> None:
        """Writes one shard. Raises `DataError` where it cannot be written."""
        arrays = {name: np.ascontiguousarray(getattr(images.tokens, name)) for name in _FIELDS}
        metadata = {
            "format": FORMAT,
            "checkpoint": images.checkpoint,
            "image_size": str(images.image_size),
            "names": json.dumps(images.names),
        }
        file = self._partial / f"shard-{self._num_shards:05d}.safetensors"
        try:
            save_file({**arrays, "sizes": images.sizes}, file, metadata=metadata)
        except SafetensorError as error:  # of a full disk, too
            raise DataError(f"{self.path}: cannot be written ({error})") from None
        self._num_shards += 1


def read(path: str | os.PathLike[str]) -> Iterator[ImageEmbeddings]:
    """The shards of a folder that `Writer` wrote, one at a time, in order.

    Raises `DataError`, naming the file, where there is none or one cannot be used.
    """
    shards = sorted(Path(path).glob("shard-*.safetensors"))
    if not shards:
        hint = "" if Path(path).exists() else files.did_you_mean(path)
        raise DataError(f"{path}: no embeddings there; write them with owl-det embed{hint}")
    return map(_read_shard, shards)


def _read_shard(file: Path) -> ImageEmbeddings:
    try:
        with safe_open(files.fetch(file), framework="numpy") as shard:
            metadata = _checked_metadata(file, shard.metadata() or {})
            _check_shapes(file, shard, len(metadata["names"]))
            arrays = {name: shard.get_tensor(name) for name in (*_FIELDS, "sizes")}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: cannot be read ({error}); embed the images again") from None
    _check_values(file, arrays)
    return ImageEmbeddings(
        tokens=TokenEmbeddings(**{name: arrays[name] for name in _FIELDS}),
        sizes=arrays["sizes"],
        names=tuple(metadata["names"]),
        image_size=metadata["image_size"],
        checkpoint=metadata["checkpoint"],
        source=str(file),
    )


def _checked_metadata(file: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if metadata.get("format") != FORMAT:
        raise DataError(f"{file}: its format is {metadata.get('format')!r}, not {FORMAT!r}")
    try:
        names = json.loads(metadata["names"])
        image_size, checkpoint = int(metadata["image_size"]), metadata["checkpoint"]
    except (KeyError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: damaged metadata ({error}); embed the images again") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{file}: damaged metadata (names are no list of texts)")
    if image_size < 1:
        raise DataError(f"{file}: damaged metadata (image_size is {image_size})")
    return {"names": names, "image_size": image_size, "checkpoint": checkpoint}


def _check_values(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Raises `DataError` for values that no model writes, which would find nothing in silence."""
    if (arrays["sizes"] < 1).any():
        raise DataError(f"{file}: sizes of images are not positive; embed the images again")
    for name in _FIELDS:
        if count := finite.count_not_finite(arrays[name]):
            raise DataError(
                f"{file}: {count} of the {arrays[name].size} values of {name} are NaN or infinite; "
                "embed the images again"
            )


def _check_shapes(file: Path, shard: Any, num_images: int) -> None:
    """Raises `DataError` unless all arrays have the types and shapes of as many images."""
    if set(shard.keys()) != {*_FIELDS, "sizes"}:
        raise DataError(f"{file}: holds {', '.join(sorted(shard.keys()))}; embed the images again")
    found = {name: shard.get_slice(name) for name in shard.keys()}
    num_tokens, width = (found["class_embeddings"].get_shape() + [0, 0])[1:3]
    for name, array in found.items():
        shape = [num_images, num_tokens]
        if name == "sizes":
            shape = [num_images, 2]
        if name in ("boxes", "class_embeddings"):
            shape.append(4 if name == "boxes" else width)
        dtype = "I32" if name == "sizes" else "F32"
        if (array.get_dtype(), array.get_shape()) != (dtype, shape):
            raise DataError(
                f"{file}: {name} is {array.get_dtype()} {array.get_shape()}, expected {dtype} "
                f"{shape}; embed the images again"
            )
