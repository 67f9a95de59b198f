"""What `owl-det evaluate-regions` does: dense features named region by region, and whole images.

Protocol of CLIPSelf (arXiv 2310.01403, section 4.2): token embeddings are pooled over true boxes of
things and over true masks of things and stuff (`modeling.region_pool`), and the nearest of all
names, things and stuff together, is the answer. Accuracies are means over names. For whole images
it is the category recall of GridCLIP (arXiv 2303.09252, section 4.4): the share of the names in an
image that are among its k nearest, averaged over images.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32

from data_pipelines import image_ops
from data_pipelines.named_regions import BoxRegions, NamedRegions, RegionSource, region_tokens
from data_pipelines.open_source import open_source
from owl_det import config as config_lib
from owl_det import sharding
from owl_det.config import MeshConfig, VitConfig
from owl_det.errors import UserError, in_flags
from owl_det.evaluation import data_check
from owl_det.evaluation.benchmark import columns
from owl_det.evaluation.loader import Loader
from owl_det.evaluation.regions import NameAccuracy
from owl_det.inference.dense_features import EmbeddingFunctions, embedding_functions
from owl_det.inference.text_encoder import TextEncoder, mean_of_prompts
from owl_det.modeling.region_pool import mask_embeddings, region_embeddings
from owl_det.types import LoadedModel, Params

KINDS = ("coco_panoptic", "lvis", "coco", "shapes_world")
RECALL_RANKS = (1, 3, 5, 10, 30, 100, 300)
_REGION_BUCKET = 8  # numbers of regions are rounded up to a multiple: fewer compilations
_METRICS = ("boxes", "thing_masks", "stuff_masks")


class CategoryRecall:
    """Share of the names in an image among its k nearest, averaged over images."""

    def __init__(self, texts: Float32[np.ndarray, "c e"], names: Sequence[str]) -> None:
        """`texts` have unit length. Ranks beyond the number of names are left out."""
        self._texts = texts
        self._index = {name: i for i, name in enumerate(names)}
        self._ranks = [k for k in RECALL_RANKS if k < len(names)]
        self._shares: list[list[float]] = []

    def add(self, whole: Float[np.ndarray, " e"], present: Sequence[str]) -> None:
        """Adds one image; one without names counts nowhere."""
        if not present:
            return
        truth = np.array([self._index[name] for name in present])
        scores = self._texts @ np.asarray(whole, np.float32)
        # A tie, or a score that is no number, counts against the name.
        rank = (~(scores[None] < scores[truth][:, None])).sum(1) - 1
        self._shares.append([float((rank < k).mean()) for k in self._ranks])

    def scalars(self) -> dict[str, float]:
        """`recall_at_1` …; nothing without images."""
        if not self._shares:
            return {}
        means = np.mean(self._shares, axis=0)
        return {f"recall_at_{k}": float(mean) for k, mean in zip(self._ranks, means, strict=True)}


class RegionEvaluator:
    """Measures one model on one source of regions, with as many parameters as there are."""

    def __init__(
        self,
        model: LoadedModel,
        source: RegionSource,
        mesh: Mesh,
        *,
        eval_prompts: str,
        batch_size: int,
        max_images: int = 0,
        functions: EmbeddingFunctions | None = None,
    ) -> None:
        """`model` says what is computed; its parameters are given later. `max_images` 0 = all.

        `functions` take the place of the model's own.
        """
        self.source, self.model, self.eval_prompts = source, model, eval_prompts
        self.loader = Loader(
            source,
            mesh,
            image_size=model.config.image_size,
            preprocess=model.preprocess,
            batch_size=batch_size,
            max_images=max_images,
        )
        whole = sharding.replicated(mesh)
        functions = functions or embedding_functions(model)
        self._encoder = TextEncoder(
            jax.jit(functions.embed_prompts, out_shardings=whole), model.config, model.tokenizer
        )
        self._embed = jax.jit(functions.embed_image, out_shardings=whole)
        self._pool = jax.jit(_pool, out_shardings=whole)

    def __call__(self, params: Params) -> dict[str, Any]:
        """All metrics, in [0, 1], and counts. Every process computes, process 0 collects.

        Keys: `boxes_top1`, `boxes_top5` and the same of `thing_masks` and `stuff_masks`, with
        `_<group>` behind them for each group of names; `recall_at_<k>`; `num_boxes` …. What the
        model or the source does not have is left out. Raises `DataError` where masks are malformed
        and if more than 1 % of the images cannot be read.
        """
        categories = self.source.categories
        names = [category.name for category in categories]
        texts = self._encoder.embed(params, names, self.eval_prompts)
        accuracy = {name: NameAccuracy(categories, texts, name) for name in _METRICS}
        recall = CategoryRecall(mean_of_prompts(texts), names)
        counts: dict[str, int] = dict.fromkeys(_METRICS, 0)
        for batch in self.loader.batches(f"regions of {self.source.name}"):
            embedded = self._embed(params, batch.images)
            regions = [
                self.source.regions(index) if batch.is_readable[row] else None
                for row, index in enumerate(batch.indices)
            ]
            if embedded.tokens is not None:
                self._add_regions(accuracy, counts, embedded.tokens, regions)
            if embedded.whole is not None:
                _add_whole(recall, np.asarray(embedded.whole), regions)
        metrics = {key: x for part in accuracy.values() for key, x in _scalars(part).items()}
        return {
            **metrics,
            **recall.scalars(),
            "num_images": self.loader.num_images - self.loader.num_unreadable,
            **{f"num_{name}": count for name, count in counts.items()},
            "unreadable_images": self.loader.num_unreadable,
        }

    def _add_regions(
        self,
        accuracy: Mapping[str, NameAccuracy],
        counts: dict[str, int],
        tokens: Float[Array, "b n e"],
        regions: Sequence[NamedRegions | None],
    ) -> None:
        side = math.isqrt(tokens.shape[1])
        boxes, masks = self._targets(tokens.shape[0], side, regions)
        by_box, by_mask = (np.asarray(x) for x in self._pool(tokens, boxes, masks))
        for row, found in enumerate(regions):
            if found is None:
                continue
            things, stuff = np.flatnonzero(found.is_thing), np.flatnonzero(~found.is_thing)
            chosen = [("boxes", by_box, things)]
            if found.segments is not None:
                chosen += [("thing_masks", by_mask, things), ("stuff_masks", by_mask, stuff)]
            for name, pooled, which in chosen:
                accuracy[name].add_named(pooled[row, which], [found.names[i] for i in which])
                counts[name] += len(which)

    def _targets(
        self, num_rows: int, side: int, regions: Sequence[NamedRegions | None]
    ) -> tuple[Float32[np.ndarray, "b r 4"], Bool[np.ndarray, "b r n"]]:
        """Boxes (cxcywh) and the tokens inside masks; rows beyond an image's regions are empty."""
        geometry = self.model.preprocess.geometry
        most = max((len(found.names) for found in regions if found is not None), default=0)
        num_regions = -(-max(most, 1) // _REGION_BUCKET) * _REGION_BUCKET
        boxes = np.zeros((num_rows, num_regions, 4), np.float32)
        masks = np.zeros((num_rows, num_regions, side * side), bool)
        for row, found in enumerate(regions):
            if found is None or not found.names:
                continue
            count = len(found.names)
            boxes[row, :count] = image_ops.boxes_to_padded(found.boxes_xyxy, *found.size, geometry)
            if found.segments is not None:
                masks[row, :count] = region_tokens(found.segments, count, side, geometry)
        return boxes, masks


def _pool(
    tokens: Float[Array, "b n e"],
    boxes_cxcywh: Float[Array, "b r 4"],
    is_inside: Bool[Array, "b r n"],
) -> tuple[Float[Array, "b r e"], Float[Array, "b r e"]]:
    side = math.isqrt(tokens.shape[1])
    by_box = region_embeddings(tokens, boxes_cxcywh, side, side)
    return by_box, mask_embeddings(tokens, is_inside)


def _add_whole(
    recall: CategoryRecall, whole: Float[np.ndarray, "b e"], regions: Sequence[NamedRegions | None]
) -> None:
    for row, found in enumerate(regions):
        if found is not None:
            recall.add(whole[row], found.present)


def _scalars(accuracy: NameAccuracy) -> dict[str, float]:
    """Without the groups that say again what kind of region it is."""
    return {
        key: value
        for key, value in accuracy.scalars().items()
        if not key.endswith(("_thing", "_stuff"))
    }


# --- the command ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RegionDataLocation:
    """Where regions lie; what a kind does not need is empty."""

    kind: str  # of KINDS
    annotations: str = ""  # JSON file
    images: str = ""  # folder
    segments: str = ""  # coco_panoptic: folder of PNG files; empty = beside the JSON file
    split: str = ""  # shapes_world; default: panoptic_test
    shapes_size: int = 64  # shapes_world: side of its images, pixels
    num_shapes: int = 1024  # shapes_world: number of its images


@in_flags()
def open_region_source(location: RegionDataLocation) -> RegionSource:
    """Raises `UserError` naming the flag that is missing or does not apply, and `DataError`."""
    _check(location)
    if location.kind == "shapes_world":
        return _shapes_world(location)
    annotations, images = Path(location.annotations), Path(location.images)
    if location.kind == "coco_panoptic":
        from data_pipelines.readers.coco_panoptic import CocoPanopticReader

        # The published archive lies so: panoptic_val2017.json, panoptic_val2017/*.png.
        beside = annotations.with_suffix("")
        segments = Path(location.segments) if location.segments else beside
        return CocoPanopticReader(annotations, images, segments)
    entry = config_lib.CocoSource(annotations=str(annotations), images=str(images))
    boxes = open_source(entry, "")
    data_check.require_boxes(boxes)
    return BoxRegions(boxes)


def run(
    model: LoadedModel,
    source: RegionSource,
    *,
    eval_prompts: str = "",
    batch_size: int = 8,
    max_images: int = 0,
) -> dict[str, Any]:
    """Measures a model; metrics have 6 digits. `eval_prompts` "" takes those of the checkpoint.

    Raises `UserError` on numbers that are out of range, and as `RegionEvaluator` does.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("max_images", max_images, 0)):
        if value < least:
            raise UserError(f"--{name}: must be at least {least}, got {value}")
    started = time.time()
    mesh = sharding.make_mesh(MeshConfig())
    eval_prompts = eval_prompts or model.eval_prompts
    measure = RegionEvaluator(
        model,
        source,
        mesh,
        eval_prompts=eval_prompts,
        batch_size=batch_size,
        max_images=max_images,
    )
    values = measure(jax.device_put(model.params, sharding.replicated(mesh)))
    tower = model.config.image
    return {
        "kind": model.kind,
        "step": model.step,
        **{key: round(x, 6) if isinstance(x, float) else x for key, x in values.items()},
        "image_size": model.config.image_size,
        "last_block": tower.last_block if isinstance(tower, VitConfig) else "full",
        "prompts": eval_prompts,
        "num_names": len(source.categories),
        "dataset": source.version,
        "seconds": round(time.time() - started, 1),
    }


def table(content: Mapping[str, Any]) -> str:
    """The summary as text: accuracies in percent, one line a kind of region and group; recall."""
    rows: list[tuple[str, ...]] = [("mAcc in %", "top 1", "top 5", "regions")]
    for name in _METRICS:
        prefix = f"{name}_top1"
        for key in (key for key in content if key.startswith(prefix)):
            group = key.removeprefix(prefix)
            label = name.replace("_", " ") + group.replace("_", ": ", 1)
            count = "" if group else f"{content[f'num_{name}']:,}"
            values = (content[key], content[f"{name}_top5{group}"])
            rows.append((label, *(f"{100 * value:.2f}" for value in values), count))
    parts = [columns(rows)] if len(rows) > 1 else []
    ranks = [key for key in content if key.startswith("recall_at_")]
    if ranks:
        header = ("whole image", *(f"RC@{key.removeprefix('recall_at_')}" for key in ranks))
        parts.append(columns([header, ("in %", *(f"{100 * content[key]:.2f}" for key in ranks))]))
    counts = ("num_images", "num_names", "unreadable_images", "image_size", "seconds")
    parts.append(columns([(key.replace("_", " "), str(content[key])) for key in counts]))
    return "\n\n".join(parts)


def _shapes_world(location: RegionDataLocation) -> RegionSource:
    from data_pipelines.panoptic_world import SPLITS, PanopticWorld
    from data_pipelines.shapes_world import SPLITS as WITHOUT_STUFF
    from data_pipelines.shapes_world import ShapesWorld

    known = (*WITHOUT_STUFF, *SPLITS)
    split = location.split or "panoptic_test"
    if split not in known:
        raise UserError(f"--split: {split} is not one of {', '.join(known)}")
    size, count = location.shapes_size, location.num_shapes
    if split in SPLITS:
        return PanopticWorld(split=split, image_size=size, num_images=count)
    return BoxRegions(ShapesWorld(split=split, image_size=size, num_images=count))


def _check(location: RegionDataLocation) -> None:
    is_file = location.kind != "shapes_world"
    for name in ("annotations", "images"):
        if is_file and not getattr(location, name):
            raise UserError(f"--{name}: --dataset {location.kind} needs it")
        if not is_file and getattr(location, name):
            raise UserError(f"--{name}: --dataset {location.kind} has none; leave it out")
    if location.segments and location.kind != "coco_panoptic":
        raise UserError(f"--segments: is for --dataset coco_panoptic, not {location.kind}")
    if location.split and is_file:
        raise UserError(f"--split: is for --dataset shapes_world, not {location.kind}")
