"""Teachers' outputs, computed once for every image of a training's sources and stored.

What is stored is what the config's branches need; `data_pipelines/teacher_cache.py` describes the
folder. Pixels and boxes go through the training's own transforms without augmentation, and vectors
through the functions that training uses online. A job that is killed goes on where it stopped, and
several processes may share one folder, each with its own shards.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from safetensors.numpy import save_file

from data_pipelines import batch_spec, teacher_cache, tokenizer, transforms
from data_pipelines.features import Example
from data_pipelines.image_ops import UnreadableImage
from data_pipelines.open_source import open_source
from data_pipelines.source import Source
from data_pipelines.teacher_regions import cells, in_tile
from owl_det import files, sharding
from owl_det.checkpoints.identity import parameter_hash
from owl_det.checkpoints.inherited_model import take_model
from owl_det.config import AugmentConfig, Config, MeshConfig
from owl_det.distillation import branches, teachers
from owl_det.distillation.cache_request import cached_settings
from owl_det.distillation.teacher import open_dense_teacher, open_teacher, text_id
from owl_det.errors import ConfigError
from owl_det.types import Batch, batch_of

_BY_BOX, _BY_CAPTION = "box_start", "caption_start"


def run(
    config: Config,
    output: str | os.PathLike[str],
    *,
    shard_size: int = 256,
    batch_size: int = 8,
    shard_index: int = 0,
    shard_step: int = 1,
) -> dict[str, int]:
    """Writes the cache that `config.distill.cache` can name; returns counts of images and shards.

    Takes the shards `shard_index`, `shard_index + shard_step` … of every source; those that are
    there already are left as they are. Raises `UserError` if the config needs no teacher, a
    teacher or a source cannot be used, or the folder was made with other settings.
    """
    if shard_size < 1 or batch_size < 1 or not 0 <= shard_index < shard_step:
        raise ConfigError(
            "cache-teacher: shard_size and batch_size must be positive, shard_index in "
            "[0, shard_step)"
        )
    config = take_model(config, output)
    wanted = frozenset(teacher_cache.SIGNALS) & branches.needs(config.distill)
    if not wanted:
        raise ConfigError("config.distill: no active branch has teacher outputs to cache")
    mesh = sharding.make_mesh(MeshConfig())
    batch_size = -(-batch_size // mesh.size) * mesh.size
    sources = {
        name: open_source(entry, config.data.path) for name, entry in config.data.train.items()
    }
    folder = Path(output)
    writer = _Writer(config, wanted, folder, mesh, shard_size)
    writer.begin(sources)
    counts = {"images": 0, "unreadable": 0, "shards": 0, "shards_there": 0}
    for name, source in sources.items():
        num_shards = -(-len(source) // shard_size)
        for shard in range(shard_index, num_shards, shard_step):
            path = teacher_cache.shard_file(folder, name, shard)
            if path.is_file():
                counts["shards_there"] += 1
                continue
            indices = range(shard * shard_size, min((shard + 1) * shard_size, len(source)))
            tensors = writer.shard(source, indices, batch_size)
            writer.write(path, tensors)
            counts["shards"] += 1
            counts["images"] += len(indices)
            counts["unreadable"] += int((~tensors["is_readable"]).sum())
            logging.info("%s: shard %d of %d", name, shard + 1, num_shards)
    return counts


class _Writer:
    """Computes and writes shards."""

    def __init__(
        self, config: Config, wanted: frozenset[str], folder: Path, mesh: Mesh, shard_size: int
    ):
        self._config, self._wanted, self._folder, self._mesh = config, wanted, folder, mesh
        self._shard_size = shard_size
        self._image = open_teacher(config) if wanted & branches.OF_TEACHER else None
        needs_dense = bool(wanted & branches.OF_DENSE_TEACHER)
        self._dense = open_dense_teacher(config, self._image) if needs_dense else None
        self._ids = {
            "teacher_id": parameter_hash(self._image.loaded.params) if self._image else "",
            "dense_teacher_id": parameter_hash(self._dense.loaded.params) if self._dense else "",
        }
        self._arrays = teachers.place(
            self._image, self._dense, config, mesh, with_text="captions" in wanted
        )
        signals = partial(
            teachers.signals_of,
            config=dataclasses.replace(config, distill=branches.for_cache(config.distill)),
            wanted=wanted,
            image=self._image,
            dense=self._dense,
        )
        self._signals = jax.jit(signals)
        of_teacher = self._image or self._dense
        assert of_teacher is not None
        # Captions as the teacher itself reads them, whatever the student's text tower is like.
        self._tokenizer = tokenizer.build(
            of_teacher.loaded.config.text, of_teacher.loaded.tokenizer
        )

    def begin(self, sources: dict[str, Source]) -> None:
        """Writes the manifest and the names, or compares them with those that are there."""
        manifest = {
            "format": teacher_cache.FORMAT,
            **self._ids,
            "text_id": text_id(self._image.loaded.params) if self._image else "",
            "teacher_dim": self._image.loaded.config.embedding_dim if self._image else 0,
            "dense_dim": self._dense.loaded.config.embedding_dim if self._dense else 0,
            "signals": sorted(self._wanted),
            "shard_size": self._shard_size,
            "settings": cached_settings(self._config),
            "sources": {
                name: teacher_cache.describe(source, self._config.data.train[name])
                for name, source in sources.items()
            },
        }
        file = self._folder / teacher_cache.MANIFEST
        if file.exists():
            found = teacher_cache.read_manifest(self._folder)
            teacher_cache.check_same(manifest, found, str(self._folder))
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._dense is not None:
            names = {"names": np.asarray(self._arrays["names"], np.float32)}
            self.write(self._folder / teacher_cache.NAMES, names)
        files.write_atomic(file, json.dumps(manifest, indent=2) + "\n")

    def write(self, path: Path, tensors: dict[str, np.ndarray]) -> None:
        """One file, complete or absent; it says whose vectors it holds."""
        with files.atomic(path) as partial:
            save_file(tensors, partial, metadata=self._ids)

    def shard(self, source: Source, indices: range, batch_size: int) -> dict[str, np.ndarray]:
        """The tensors of one shard."""
        examples = [self._example(source, index) for index in indices]
        num_boxes = [len(e.boxes_cxcywh) if e else 0 for e in examples]
        captions = [list(e.tile_captions[0]) if e else [] for e in examples]
        found: dict[str, list[np.ndarray]] = {name: [] for name in self._wanted}
        for rows, signals in self._batches(examples, num_boxes, captions, batch_size):
            for name, values in signals.items():
                for row, value in zip(rows, values, strict=False):
                    count = {"boxes": num_boxes[row], "captions": len(captions[row])}
                    found[name].append(self._cut(name, value, count))
        tensors = {name: self._joined(name, values) for name, values in found.items()}
        boxes = [self._in_tile(e) for e in examples]
        tensors["boxes"] = np.concatenate([np.zeros((0, 4), np.float32), *boxes])
        tensors[_BY_BOX] = np.cumsum([0, *num_boxes])
        tensors[_BY_CAPTION] = np.cumsum([0, *(len(c) for c in captions)])
        tensors["is_readable"] = np.array([e is not None for e in examples])
        return tensors

    def _example(self, source: Source, index: int) -> Example | None:
        """The image as training sees it without augmentation; None if it cannot be read."""
        try:
            record = source[index]
        except UnreadableImage as error:
            logging.warning("Left out an image: %s", error)
            return None
        example = transforms.train_example(
            [record],
            grid=1,
            augment=AugmentConfig(),
            image_size=self._config.model.image_size,
            preprocess=self._config.preprocess,
            rng=np.random.default_rng(0),
        )
        return example if example.tile_image_id[0] >= 0 else None

    def _batches(
        self,
        examples: list[Example | None],
        num_boxes: list[int],
        captions: list[list[str]],
        batch_size: int,
    ) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
        """Rows of the shard and the outputs for them, a fixed number at a time."""
        # Powers of two: few shapes, each compiled once.
        m, t = (_power_of_two(max(counts)) for counts in (num_boxes, [len(c) for c in captions]))
        for start in range(0, len(examples), batch_size):
            rows = list(range(start, min(start + batch_size, len(examples))))
            padded = rows + [rows[-1]] * (batch_size - len(rows))
            arrays = [self._arrays_of(examples[row], captions[row], m, t) for row in padded]
            stacked = {key: np.stack([a[key] for a in arrays]) for key in arrays[0]}
            batch = jax.device_put(_batch(stacked), sharding.batch_sharding(self._mesh))
            signals = self._signals(self._arrays, batch)
            yield rows, {n: np.asarray(signals[n]) for n in self._wanted}

    def _arrays_of(
        self, example: Example | None, captions: list[str], m: int, t: int
    ) -> dict[str, np.ndarray]:
        side = self._config.model.image_size
        boxes, tile = np.zeros((0, 4), np.float32), np.array([0.5, 0.5, 1, 1], np.float32)
        image = np.zeros((side, side, 3), np.uint8)
        if example is not None:
            image, boxes = example.image, example.boxes_cxcywh
            tile = example.tile_boxes_cxcywh[0]
        regions = _padded(boxes, m)
        if self._config.distill.regions.kind == "patches":
            grid_cells = cells(self._config.distill.regions.grids)
            regions = np.concatenate([in_tile(grid_cells, tile), tile[None]])
        texts = self._tokenizer.encode_all([*captions, *[""] * (t - len(captions))])
        return {
            "image": image,
            "boxes": _padded(boxes, m),
            "is_instance": np.arange(m) < len(boxes),
            "tile_boxes": tile[None],
            "region_boxes": regions.astype(np.float32),
            "caption_tokens": texts,
        }

    def _cut(self, name: str, value: np.ndarray, count: dict[str, int]) -> np.ndarray:
        if name == "captions":
            return value[: count["captions"]]
        return value[: count["boxes"]] if self._is_by_box(name) else value

    def _is_by_box(self, name: str) -> bool:
        is_region = name in ("regions", "dense_regions")
        return name == "instances" or (
            is_region and self._config.distill.regions.kind == "proposals"
        )

    def _joined(self, name: str, values: list[np.ndarray]) -> np.ndarray:
        is_flat = name in ("tiles", "captions") or self._is_by_box(name)
        joined = np.concatenate(values) if is_flat else np.stack(values)
        return np.ascontiguousarray(joined, np.float16)

    def _in_tile(self, example: Example | None) -> np.ndarray:
        if example is None or not len(example.boxes_cxcywh):
            return np.zeros((0, 4), np.float32)
        tile = example.tile_boxes_cxcywh[0]
        boxes = [teacher_cache.from_tile(box, tile) for box in example.boxes_cxcywh]
        return np.stack(boxes).astype(np.float32)


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 3).bit_length()


def _padded(boxes: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([boxes, np.zeros((length - len(boxes), 4), np.float32)])


def _batch(arrays: dict[str, np.ndarray]) -> Batch:
    """A batch of what teachers look at; of queries and all else it holds zeros."""
    b, m = arrays["boxes"].shape[:2]
    sizes = {"b": b, "m": m, "q": 0, "u": b, "l": 0, "t": 1}
    sizes["H"], sizes["W"] = arrays["image"].shape[1:3]
    always = {name: f for name, f in batch_spec.FIELDS.items() if f.presence == "always"}
    return batch_of(batch_spec.zeros(always, sizes) | {"is_example": np.ones(b, bool)} | arrays)
