"""The frozen models of a training: placed on the mesh, and what they say of a batch.

A teacher's image and text vectors come from one checkpoint, whose id, a hash of its parameters,
goes wherever its vectors go. Teachers run once for a whole batch, outside the gradient; only HierKD
with predicted boxes runs one inside the loss, where those boxes are made.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from data_pipelines import teacher_cache
from owl_det import sharding
from owl_det.checkpoints.identity import parameter_hash
from owl_det.config import Config
from owl_det.distillation import branches, crops
from owl_det.distillation.branch import Signals, Teachers
from owl_det.distillation.branches import OF_DENSE_TEACHER, OF_TEACHER
from owl_det.distillation.select import take_rows
from owl_det.distillation.teacher import (
    Teacher,
    dense_side,
    embed_names,
    open_dense_teacher,
    open_teacher,
    student_name_tokens,
    teacher_id,
    text_id,
)
from owl_det.errors import ConfigError, DataError
from owl_det.scoring import unit_length
from owl_det.types import Batch, LoadedModel, Params


def check_same_text(teachers: Teachers, params: Params | None, config: Config) -> None:
    """Checks that the student's space is the teacher's, where a branch takes it for granted.

    `params` are those that the student starts from, None for fresh ones.

    Raises `ConfigError` where vectors differ in width, or the student's text tower does not start
    as the teacher's (unless `distill.require_same_text` is False).
    """
    for name, (branch, _) in branches.active(config.distill).items():
        if not branch.shares_space:
            continue
        if teachers.teacher_dim != config.model.embedding_dim:
            raise ConfigError(
                f"config.model.embedding_dim: {config.model.embedding_dim}, but distill.{name} "
                f"sets tokens beside the teacher's vectors of {teachers.teacher_dim}"
            )
        is_same = params is not None and text_id(params) == teachers.text_id
        if config.distill.require_same_text and not is_same:
            raise ConfigError(
                f"config.distill.{name}: the student's text tower is not the teacher's; start from "
                "the same checkpoint (config.checkpoint.init_from), or set "
                "config.distill.require_same_text to False"
            )


def open_teachers(config: Config, mesh: Mesh) -> Teachers | None:
    """The teachers that the active branches need, placed as `sharding` places parameters.

    None without branches. Raises `UserError` where a checkpoint is missing or does not fit.
    """
    branches.check(config)
    if not config.distill.active():
        return None
    wanted = branches.needs(config.distill)
    if config.distill.cache:
        return _open_cache(config, wanted, mesh)
    image = open_teacher(config) if wanted & OF_TEACHER else None
    dense = open_dense_teacher(config, image) if wanted & OF_DENSE_TEACHER else None
    if image is not None and "captions" in wanted:
        _check_captions(config, image.loaded)
    if (
        image is not None
        and "pad" == image.loaded.preprocess.geometry != config.preprocess.geometry
    ):
        logging.warning(
            "config.preprocess.geometry: %s; crops that %s gets have the aspect ratio of the "
            "stretched image, not the picture's",
            *(config.preprocess.geometry, config.distill.teacher),
        )
    arrays = place(image, dense, config, mesh, with_text="captions" in wanted)
    teacher_ids = (_id_of(image), _id_of(dense))
    of_texts = text_id(image.loaded.params) if image else ""
    # The step reads what was placed; a second copy would stay on the first device.
    image, dense = (teacher and teacher.without_params() for teacher in (image, dense))
    return Teachers(
        arrays=arrays,
        signals=partial(signals_of, config=config, wanted=wanted, image=image, dense=dense),
        embed_boxes=partial(_embed_boxes, image) if image and "embed_boxes" in wanted else None,
        name_tokens=student_name_tokens(config) if "names" in wanted else None,
        teacher_dim=image.loaded.config.embedding_dim if image else 0,
        teacher_ids=teacher_ids,
        text_id=of_texts,
    )


def _id_of(teacher: Teacher | None) -> str:
    return parameter_hash(teacher.loaded.params) if teacher else ""


def _open_cache(config: Config, wanted: frozenset[str], mesh: Mesh) -> Teachers:
    """Outputs of teachers that batches bring along.

    Raises `UserError` where the cache lacks one, or is of another teacher than the config names.
    """
    folder = Path(config.distill.cache)
    manifest = teacher_cache.read_manifest(folder)
    held = {"names", *manifest["signals"]}
    if wanted - held:
        raise DataError(
            f"{folder}: holds no {', '.join(sorted(wanted - held))}; run owl-det cache-teacher "
            "with this config into a new folder"
        )
    distill = config.distill
    named = {"teacher": distill.teacher, "dense_teacher": distill.dense_teacher or distill.teacher}
    ids: dict[str, str] = {}
    for key, path in named.items():
        made_with = manifest[f"{key}_id"]  # "" where no branch needed one
        if not path or not made_with:
            continue
        if path not in ids:
            ids[path] = teacher_id(config, path, key)
        if made_with != ids[path]:
            raise ConfigError(
                f"config.distill.{key}: {path} is not the checkpoint that config.distill.cache "
                f"{folder} was made with; name that one, or none"
            )
    arrays: dict[str, Any] = {}
    if "names" in wanted:
        arrays["names"] = _replicated(teacher_cache.read_names(folder, manifest), mesh)
    return Teachers(
        arrays=arrays,
        signals=partial(_cached_signals, config=config, wanted=wanted),
        embed_boxes=None,
        name_tokens=student_name_tokens(config) if "names" in wanted else None,
        teacher_dim=int(manifest["teacher_dim"]),
        # As without a cache: "" for a teacher that no active branch needs.
        teacher_ids=(
            str(manifest["teacher_id"]) if wanted & OF_TEACHER else "",
            str(manifest["dense_teacher_id"]) if wanted & OF_DENSE_TEACHER else "",
        ),
        text_id=str(manifest["text_id"]),
    )


def _cached_signals(
    arrays: PyTree, batch: Batch, *, config: Config, wanted: frozenset[str]
) -> Signals:
    """The outputs that a batch brought along; of instances those that a teacher would look at."""
    outputs = sorted(wanted - {"names"})
    if not outputs:
        return {}
    assert batch.teacher is not None
    found = {name: unit_length(batch.teacher[name], 0.0) for name in outputs}
    if "instances" in found:
        found["instances"] = take_rows(found["instances"], _chosen(batch, config)[0])
    return found


def _chosen(batch: Batch, config: Config) -> tuple[Array, float]:
    """Indices of the objects that a branch has cropped, and how large it takes them."""
    provider = branches.providing(config.distill, "instances")
    assert provider is not None
    branch, entry = provider
    assert branch.instances is not None and branch.crop_scale is not None
    return branch.instances(entry, batch.boxes, batch.is_instance), branch.crop_scale(entry)


def place(
    image: Teacher | None, dense: Teacher | None, config: Config, mesh: Mesh, *, with_text: bool
) -> dict[str, Any]:
    """Parameters and name embeddings on the mesh; a checkpoint of both is there once."""
    arrays: dict[str, Any] = {}
    if image is not None:
        arrays["image"] = _placed(image.loaded.params, mesh, with_text)
    if dense is None:
        return arrays
    if image is None or config.distill.dense_teacher not in ("", config.distill.teacher):
        arrays["dense"] = _placed(dense.loaded.params, mesh, with_text=False)
    if dense.positions is not None:
        arrays["dense_positions"] = _replicated(dense.positions, mesh)
    arrays["names"] = _replicated(embed_names(dense, config), mesh)
    return arrays


def signals_of(
    arrays: PyTree,
    batch: Batch,
    *,
    config: Config,
    wanted: frozenset[str],
    image: Teacher | None,
    dense: Teacher | None,
) -> Signals:
    """What the teachers say of a batch; crops stay inside their tile."""
    is_tile = batch.tile_image_id >= 0
    found: dict[str, Array] = {}

    def embed(boxes: Array, factor: float) -> Array:
        assert image is not None
        grown = crops.grow_in_tile(boxes, batch.tile_boxes, is_tile, factor)
        return image.embed_boxes(arrays["image"], batch.image, grown)

    if "tiles" in wanted:
        found["tiles"] = embed(batch.tile_boxes, 1.0)
    if "regions" in wanted:
        assert batch.region_boxes is not None
        found["regions"] = embed(batch.region_boxes, config.distill.regions.crop_scale)
    if "instances" in wanted:
        chosen, scale = _chosen(batch, config)
        found["instances"] = embed(take_rows(batch.boxes, chosen), scale)
    if "captions" in wanted:
        assert image is not None and batch.caption_tokens is not None
        found["captions"] = image.embed_texts(arrays["image"], batch.caption_tokens)
    if "dense_regions" in wanted:
        assert dense is not None and batch.region_boxes is not None
        found["dense_regions"] = dense.embed_regions(
            _dense_params(arrays), batch.image, batch.region_boxes, dense_side(config)
        )
    return found


def _check_captions(config: Config, teacher: LoadedModel) -> None:
    """A batch's captions are tokenised for the student; the teacher must read them alike."""
    ours, theirs = config.model.text, teacher.config.text
    if (ours.tokenizer, ours.pooling) != (theirs.tokenizer, "end_token"):
        raise ConfigError(
            "config.distill.hierkd_global: the student's captions are no input for this teacher "
            f"({theirs.tokenizer} tokens, pooled at {theirs.pooling}); set config.distill.cache"
        )
    if ours.num_positions > theirs.num_positions:
        raise ConfigError(
            f"config.model.text.num_positions: {ours.num_positions} is more than the "
            f"{theirs.num_positions} of config.distill.teacher, which reads the same captions"
        )


def _embed_boxes(image: Teacher, arrays: PyTree, pixels: Array, boxes_cxcywh: Array) -> Array:
    return image.embed_boxes(arrays["image"], pixels, boxes_cxcywh)


def _dense_params(arrays: PyTree) -> Params:
    params = arrays["dense"] if "dense" in arrays else arrays["image"]
    if "dense_positions" not in arrays:
        return params
    return _with_positions(params, arrays["dense_positions"])


def _with_positions(params: Params, positions: Array) -> Params:
    return {**params, "image": {**params["image"], "position_embedding": positions}}


def _placed(params: Params, mesh: Mesh, with_text: bool) -> Params:
    placement = sharding.parameter_shardings(params, mesh)
    kept = [name for name in params if with_text or name != "text"]
    return {
        name: jax.tree.map(
            lambda x, s: jax.device_put(np.asarray(x), s), params[name], placement[name]
        )
        for name in kept
    }


def _replicated(values: Any, mesh: Mesh) -> Array:
    return jax.device_put(np.asarray(values), sharding.replicated(mesh))
