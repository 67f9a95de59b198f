"""Teacher outputs that were computed once: the folder that `owl-det cache-teacher` writes.

    manifest.json                 ids of the teachers, and all that their outputs depend on
    names.safetensors             the dense teacher's embeddings of the names that regions get
    <source>/<shard>.safetensors  outputs for a run of the source's images, in its order

A shard is complete or absent: it is written under another name and renamed. Vectors are float16,
of unit length but for rounding. What belongs to boxes or captions is stored one image after the
other, with `box_start` and `caption_start` saying where each begins. Reading copies only the rows
that an example asks for.
"""

import dataclasses
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from data_pipelines.batch_spec import TEACHER_PREFIX, Arrays
from data_pipelines.features import Example
from data_pipelines.source import Source
from data_pipelines.teacher_regions import TeacherRegions, cells
from owl_det import files
from owl_det.config import Config, ShapesWorldSource, SourceConfig
from owl_det.errors import DataError

FORMAT = 2
SIGNALS = ("tiles", "regions", "instances", "captions", "dense_regions")
MANIFEST, NAMES = "manifest.json", "names.safetensors"
MAX_MANIFEST_BYTES = 2**24
OPEN_SHARDS = 64  # held at once; they are memory maps

# Relative to the image: a box in a mosaic's tile is moved by rounding, by up to a pixel of it.
_TOLERANCE = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheRequest:
    """What a training reads of a cache, as its distillation branches declare it."""

    signals: frozenset[str]  # those that are not cached are left out
    settings: Mapping[str, Any]  # what the outputs depend on beside the teachers' parameters


def describe(source: Source, entry: SourceConfig) -> dict[str, Any]:
    """What a cache holds of a source, so that another one is told apart."""
    found: dict[str, Any] = {"version": source.version, "num_images": len(source)}
    if isinstance(entry, ShapesWorldSource):  # whose version is that of the drawing alone
        drawn = dataclasses.asdict(entry)
        found["drawn"] = {key: drawn[key] for key in ("split", "image_size", "annotated_fraction")}
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache. Raises `DataError` if there is none or it is damaged."""
    file = folder / MANIFEST
    try:
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise DataError(f"{file}: more than {MAX_MANIFEST_BYTES} bytes")
        manifest = json.loads(files.read_text(file))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: cannot be read ({error}); make the cache with owl-det cache-teacher"
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{file}: not a teacher's cache of format {FORMAT}")
    return manifest


def check_same(ours: Mapping[str, Any], theirs: Any, where: str) -> None:
    """Raises `DataError` naming the first setting in which a cache differs from the config."""
    for key, value in json.loads(json.dumps({**ours})).items():  # tuples are lists there
        found = theirs.get(key) if isinstance(theirs, dict) else None
        if value != found:
            raise DataError(
                f"{where}: was made with another {key}: {_short(found)} there, {_short(value)} in "
                "the config; run owl-det cache-teacher into a new folder"
            )


def shard_file(folder: Path, source: str, shard: int) -> Path:
    """Where a shard lies."""
    return folder / source / f"{shard:06d}.safetensors"


def read_names(folder: Path, manifest: dict[str, Any]) -> np.ndarray:
    """The dense teacher's text embeddings. Raises `DataError` if they are not what it says."""
    with _opened(folder / NAMES, manifest) as file:
        shape = [len(manifest["settings"]["names"]), manifest["dense_dim"]]
        _check_tensor(folder / NAMES, file, "names", shape)
        return file.get_tensor("names")


class TeacherCache:
    """The cache that `config.distill.cache` names, for the sources of a training."""

    def __init__(self, config: Config, sources: dict[str, Source], request: CacheRequest):
        """Raises `DataError` if the folder lacks a source or a shard, or was made with other
        settings or from other data."""
        self._folder, self._names = Path(config.distill.cache), list(sources)
        self.manifest = read_manifest(self._folder)
        where = str(self._folder)
        check_same(request.settings, self.manifest["settings"], where)
        self._wanted = request.signals & set(self.manifest["signals"])
        if not config.data.with_captions:
            self._wanted -= {"captions"}
        self._shard_size = int(self.manifest["shard_size"])
        for name, source in sources.items():
            self._check_source(name, describe(source, config.data.train[name]), source.name)
        self._is_proposals = config.distill.regions.kind == "proposals"
        self._dims = {
            name: int(self.manifest["dense_dim" if name == "dense_regions" else "teacher_dim"])
            for name in self._wanted
        }
        self._shard = lru_cache(OPEN_SHARDS)(self._open_shard)

    def arrays(
        self, places: list[tuple[int, int]], example: Example, drawn: TeacherRegions, packed: Arrays
    ) -> Arrays:
        """`teacher/<name>` of one example, float32, with zeros for fillers.

        `places` are the (source, index) of its tiles, `packed` is what `pack_example` made of it.
        Raises `DataError` for an image or a box that the cache does not know.
        """
        rows = {
            int(tile): self._row(*places[tile])
            for tile in np.flatnonzero(example.tile_image_id >= 0)
        }
        found: Arrays = {}
        for name in sorted(self._wanted):
            if name == "tiles":
                out = np.zeros((len(packed["tile_image_id"]), self._dims[name]), np.float32)
                for tile, row in rows.items():
                    out[tile] = row.one(name)
            elif name == "captions":
                out = np.zeros((len(packed["tile_image_id"]), self._dims[name]), np.float32)
                for tile, row in rows.items():
                    if packed["is_caption"][tile]:
                        out[tile] = row.of_captions()[packed["caption_index"][tile]]
            elif name == "instances":
                is_real = packed["is_instance"] | packed["is_crowd"]
                out = self._of_boxes(
                    name, rows, packed["boxes"], packed["tile_of_instance"], is_real, example
                )
            elif self._is_proposals:
                out = self._of_boxes(
                    name, rows, drawn.boxes_cxcywh, drawn.tile, drawn.is_region, example
                )
            else:
                out = np.zeros((len(drawn.is_region), self._dims[name]), np.float32)
                for tile, row in rows.items():
                    chosen = drawn.is_region & (drawn.tile == tile)
                    # WHOLE is the last cell.
                    out[chosen] = row.one(name)[drawn.cell[chosen]]
            found[f"{TEACHER_PREFIX}{name}"] = out
        return found

    def _of_boxes(
        self,
        name: str,
        rows: "dict[int, _Row]",
        boxes: np.ndarray,
        tiles: np.ndarray,
        is_real: np.ndarray,
        example: Example,
    ) -> np.ndarray:
        out = np.zeros((len(boxes), self._dims[name]), np.float32)
        for index in np.flatnonzero(is_real):
            tile = int(tiles[index])
            wanted = from_tile(boxes[index], example.tile_boxes_cxcywh[tile])
            known, vectors = rows[tile].of_boxes(name)
            distance = np.abs(known - wanted).max(axis=1, initial=0.0)
            if not len(known) or distance.min() > _TOLERANCE:
                raise DataError(
                    f"{self._folder}: knows no box near {np.round(wanted, 3).tolist()} of "
                    f"{rows[tile].where}; the data set is not the one the cache was made from"
                )
            out[index] = vectors[int(distance.argmin())]
        return out

    def _row(self, source: int, index: int) -> "_Row":
        shard, row = divmod(index, self._shard_size)
        name = self._names[source]
        file, starts = self._shard(name, shard)
        opened = _Row(file, starts, row, f"image {index} of {name}")
        if not starts["is_readable"][row]:
            raise DataError(
                f"{self._folder}: {opened.where} could not be read when it was made; delete "
                f"{shard_file(self._folder, name, shard)} and run owl-det cache-teacher again"
            )
        return opened

    def _open_shard(self, name: str, shard: int) -> tuple[Any, Arrays]:
        path = shard_file(self._folder, name, shard)
        file = _opened(path, self.manifest)
        starts = {key: file.get_tensor(key) for key in file.keys() if key.endswith("_start")}
        starts["is_readable"] = file.get_tensor("is_readable")
        num_images = len(starts["is_readable"])
        for key in self._wanted:
            shape = list(file.get_slice(key).get_shape())
            wanted = self._shape_of(key, num_images, starts)
            if shape != wanted:
                raise DataError(f"{path}: {key} is {shape}, not {wanted}; delete it and run again")
        return file, starts

    def _shape_of(self, key: str, num_images: int, starts: Arrays) -> list[int]:
        dim = self._dims[key]
        if key == "captions":
            return [int(starts["caption_start"][-1]), dim]
        if key == "instances" or (key != "tiles" and self._is_proposals):
            return [int(starts["box_start"][-1]), dim]
        if key == "tiles":
            return [num_images, dim]
        kind = self.manifest["settings"]["regions"]["grids"]
        return [num_images, len(cells(kind)) + 1, dim]

    def _check_source(self, name: str, described: dict[str, Any], title: str) -> None:
        if self.manifest["sources"].get(name) != described:
            raise DataError(
                f"{self._folder}: was made from another data set {name} than {title} is; run "
                "owl-det cache-teacher into a new folder"
            )
        for shard in range(-(-described["num_images"] // self._shard_size)):
            path = shard_file(self._folder, name, shard)
            if not path.is_file():
                raise DataError(f"{path}: is missing; run the same owl-det cache-teacher again")


@dataclasses.dataclass(frozen=True)
class _Row:
    """One image of a shard."""

    file: Any
    starts: Arrays
    row: int
    where: str

    def one(self, name: str) -> np.ndarray:
        return self.file.get_slice(name)[self.row]

    def of_captions(self) -> np.ndarray:
        return self._ragged("captions", "caption_start")

    def of_boxes(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return self._ragged("boxes", "box_start"), self._ragged(name, "box_start")

    def _ragged(self, name: str, start: str) -> np.ndarray:
        first, end = (int(x) for x in self.starts[start][self.row : self.row + 2])
        return self.file.get_slice(name)[first:end]


def from_tile(box_cxcywh: np.ndarray, tile_cxcywh: np.ndarray) -> np.ndarray:
    """A box relative to the square → relative to the tile that it lies in."""
    corner = tile_cxcywh[:2] - tile_cxcywh[2:] / 2
    return np.concatenate(
        [(box_cxcywh[:2] - corner) / tile_cxcywh[2:], box_cxcywh[2:] / tile_cxcywh[2:]]
    )


def _opened(path: Path, manifest: dict[str, Any]) -> Any:
    """A file of the cache. Raises `DataError` if it is damaged or of other teachers."""
    try:
        file = safe_open(files.fetch(path), framework="numpy")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete it and run again") from None
    metadata = file.metadata() or {}
    for key in ("teacher_id", "dense_teacher_id"):
        if metadata.get(key) != manifest[key]:
            raise DataError(
                f"{path}: its vectors are of teacher {metadata.get(key)}, those of the folder of "
                f"{manifest[key]}; vectors of two checkpoints do not mix"
            )
    return file


def _check_tensor(path: Path, file: Any, name: str, shape: list[int]) -> None:
    if name not in file.keys() or list(file.get_slice(name).get_shape()) != shape:
        raise DataError(f"{path}: holds no {name} of shape {shape}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
