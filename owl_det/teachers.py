"""Frozen models for distillation: loading, placement, and what they say of a batch.

A teacher's image and text vectors come from one checkpoint, whose id, a hash of its parameters,
goes wherever its vectors go. Teachers run once for a whole batch, outside the gradient; only HierKD
with predicted boxes runs one inside the loss, where those boxes are made.
"""

import dataclasses
import hashlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32, PyTree, UInt8

from data_pipelines import teacher_cache, tokenizer
from owl_det import checkpoint, crops, path_rules, sharding
from owl_det.config import Config, ModelConfig, PreprocessConfig
from owl_det.errors import CheckpointError, ConfigError, DataError
from owl_det.losses import branches, hierkd
from owl_det.losses.branches import OF_DENSE_TEACHER, OF_TEACHER
from owl_det.modeling.detector import Detector
from owl_det.modeling.region_pool import region_embeddings
from owl_det.modeling.resnet import STRIDE, ClipResNet
from owl_det.scoring import unit_length
from owl_det.types import Batch, LoadedModel, Params, TeacherSignals, Teaching

_NAME_CHUNK = 256  # texts encoded at once


# --- identity ------------------------------------------------------------------------------------


def model_id(params: PyTree) -> str:
    """Sixteen hex digits that change with any value, shape or name of the parameters."""
    content = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in sorted(leaves, key=lambda item: path_rules.path_name(item[0])):
        values = np.asarray(leaf)
        content.update(f"{path_rules.path_name(path)} {values.dtype} {values.shape}\n".encode())
        content.update(np.ascontiguousarray(values).tobytes())
    return content.hexdigest()[:16]


def text_id(params: Params) -> str:
    """The id of a text tower, without its positions: a student keeps only the first of them."""
    return model_id({k: v for k, v in params["text"].items() if k != "position_embedding"})


def check_same_text(teaching: Teaching, params: Params | None, config: Config) -> None:
    """Checks that the student's space is the teacher's, where a branch takes it for granted.

    `params` are those that the student starts from, None for fresh ones.

    Raises `ConfigError` where vectors differ in width, or the student's text tower does not start
    as the teacher's (unless `distill.require_same_text` is False).
    """
    for name, (branch, _) in branches.active(config.distill).items():
        if not branch.shares_space:
            continue
        if teaching.teacher_dim != config.model.embedding_dim:
            raise ConfigError(
                f"config.model.embedding_dim: {config.model.embedding_dim}, but distill.{name} "
                f"sets tokens beside the teacher's vectors of {teaching.teacher_dim}"
            )
        is_same = params is not None and text_id(params) == teaching.text_id
        if config.distill.require_same_text and not is_same:
            raise ConfigError(
                f"config.distill.{name}: the student's text tower is not the teacher's; start from "
                "the same checkpoint (config.checkpoint.init_from), or set "
                "config.distill.require_same_text to False"
            )


# --- forward -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tower:
    """What a frozen model computes; its parameters are arguments."""

    kind: str  # towers | resnet
    model: ModelConfig
    preprocess: PreprocessConfig

    @property
    def module(self) -> Detector | ClipResNet:
        of_kind = ClipResNet if self.kind == "resnet" else Detector
        return of_kind(self.model, self.preprocess)

    @property
    def stride(self) -> int:
        """Pixels for each token, along an axis."""
        return STRIDE if self.kind == "resnet" else self.model.image.patch_size

    def embed_boxes(
        self, params: Params, image: UInt8[Array, "b H W 3"], boxes_cxcywh: Float[Array, "b r 4"]
    ) -> Float[Array, "b r e"]:
        """Unit-length image embeddings of the boxes' crops, one box of every image at a time.

        Towers that pool by the mean take the mean of a crop's tokens without its padding.
        """
        side = self.model.image_size

        def embed(boxes: Array) -> Array:
            pixels = crops.crop_and_resize(image, boxes, side, self.preprocess)
            content, method = (), "embed_image"
            if self.kind == "towers" and self.model.image.pooling == "mean":
                size = image.shape[1], image.shape[2]
                boxes = crops.content_boxes(boxes, size, side, self.preprocess)
                content, method = (boxes[:, None],), "embed_tiles"
            found = self.module.apply({"params": params}, pixels, *content, method=method)
            return unit_length(cast(Array, found).reshape(pixels.shape[0], -1))

        found = jax.lax.map(embed, jnp.swapaxes(boxes_cxcywh, 0, 1))
        return jax.lax.stop_gradient(jnp.swapaxes(found, 0, 1))

    def embed_texts(self, params: Params, tokens: Int32[Array, "*b l"]) -> Float[Array, "*b e"]:
        """Unit-length text embeddings."""
        rows = tokens.reshape(-1, tokens.shape[-1])
        found = cast(Array, self.module.apply({"params": params}, rows, method="encode_text"))
        return jax.lax.stop_gradient(unit_length(found).reshape(*tokens.shape[:-1], -1))

    def embed_regions(
        self,
        params: Params,
        image: UInt8[Array, "b H W 3"],
        boxes_cxcywh: Float[Array, "b r 4"],
        side: int,
    ) -> Float[Array, "b r e"]:
        """Tokens in the texts' space, of the image at `side` pixels, pooled over boxes."""
        if image.shape[1] != side:
            whole = jnp.tile(jnp.array([[0.5, 0.5, 1.0, 1.0]]), (image.shape[0], 1))
            image = crops.crop_and_resize(image, whole, side, self.preprocess)
        method = "dense_features" if self.kind == "resnet" else "embed_patches"
        found = cast(Array, self.module.apply({"params": params}, image, method=method))
        size = side // self.stride
        tokens = found.reshape(image.shape[0], size * size, -1)
        return jax.lax.stop_gradient(region_embeddings(tokens, boxes_cxcywh, size, size))


# --- what a step uses ----------------------------------------------------------------------------


class Opened(NamedTuple):
    """A teacher: its checkpoint, and what it computes."""

    loaded: LoadedModel
    tower: Tower
    positions: Array | None = None  # of a ViT at another size than the checkpoint's


def open_teachers(config: Config, mesh: Mesh) -> Teaching | None:
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
    image, dense = (teacher and _without_params(teacher) for teacher in (image, dense))
    return Teaching(
        arrays=arrays,
        signals=partial(signals_of, config=config, wanted=wanted, image=image, dense=dense),
        embed_boxes=partial(_embed_boxes, image) if image and "embed_boxes" in wanted else None,
        name_tokens=student_name_tokens(config) if "names" in wanted else None,
        teacher_dim=image.tower.model.embedding_dim if image else 0,
        teacher_ids=teacher_ids,
        text_id=of_texts,
    )


def _id_of(teacher: Opened | None) -> str:
    return model_id(teacher.loaded.params) if teacher else ""


def _without_params(teacher: Opened) -> Opened:
    return teacher._replace(loaded=dataclasses.replace(teacher.loaded, params={}))


def _open_cache(config: Config, wanted: frozenset[str], mesh: Mesh) -> Teaching:
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
            ids[path] = model_id(_open(path, key, config).loaded.params)
        if made_with != ids[path]:
            raise ConfigError(
                f"config.distill.{key}: {path} is not the checkpoint that config.distill.cache "
                f"{folder} was made with; name that one, or none"
            )
    arrays: dict[str, Any] = {}
    if "names" in wanted:
        arrays["names"] = _replicated(teacher_cache.read_names(folder, manifest), mesh)
    return Teaching(
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
) -> TeacherSignals:
    """The outputs that a batch brought along; of instances those that a teacher would look at."""
    outputs = sorted(wanted - {"names"})
    if not outputs:
        return TeacherSignals()
    assert batch.teacher is not None
    found = {name: unit_length(batch.teacher[name], 0.0) for name in outputs}
    if "instances" in found:
        chosen = hierkd.some_instances(
            batch.boxes, batch.is_instance, config.distill.hierkd_instance.max_crops
        )
        found["instances"] = hierkd.at(found["instances"], chosen)
    return TeacherSignals(**found)


def open_teacher(config: Config) -> Opened:
    """`distill.teacher`. Raises `UserError` if it is no checkpoint of towers or a ResNet."""
    return _open(config.distill.teacher, "teacher", config)


def open_dense_teacher(config: Config, image: Opened | None) -> Opened:
    """`distill.dense_teacher`, or `image` where that is unnamed, as it embeds every token.

    A ViT's position grid is resized linearly to `distill.dense_image_size`. Raises `UserError` if
    its patches do not divide that side, or if its tokens cannot be compared with texts.
    """
    distill, side = config.distill, dense_side(config)
    if distill.dense_teacher and distill.dense_teacher != distill.teacher:
        opened = _open(distill.dense_teacher, "dense_teacher", config)
    else:
        opened = image or open_teacher(config)
    loaded, tower, _ = opened
    if tower.kind == "resnet":
        if side % STRIDE:
            raise ConfigError(
                f"config.distill.dense_image_size: {side} is no multiple of the {STRIDE} pixels of "
                "a ResNet's tokens"
            )
        return opened  # takes any size; its tokens are its values already
    if tower.model.image.pooling == "map":
        raise ConfigError(
            f"config.distill.dense_teacher: {distill.dense_teacher or distill.teacher} pools by "
            "attention, so its tokens lie in no space of texts; take a CLIP, or towers that "
            "CLIPSelf has taught"
        )
    if side % tower.model.image.patch_size:
        raise ConfigError(
            f"config.distill.dense_image_size: {side} is no multiple of the dense teacher's "
            f"patches of {tower.model.image.patch_size} pixels"
        )
    image_tower = dataclasses.replace(tower.model.image, last_block=distill.dense_last_block)
    model = dataclasses.replace(tower.model, image_size=side, image=image_tower)
    resized = checkpoint.resized(loaded, side)
    positions = None if resized is loaded else resized.params["image"]["position_embedding"]
    return Opened(loaded, dataclasses.replace(tower, model=model), positions)


def dense_side(config: Config) -> int:
    """Pixels of the dense teacher's input, along an axis."""
    return config.distill.dense_image_size or config.model.image_size


def place(
    image: Opened | None, dense: Opened | None, config: Config, mesh: Mesh, *, with_text: bool
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
    image: Opened | None,
    dense: Opened | None,
) -> TeacherSignals:
    """What the teachers say of a batch; crops stay inside their tile."""
    is_tile = batch.tile_image_id >= 0
    found: dict[str, Array] = {}

    def embed(boxes: Array, factor: float) -> Array:
        assert image is not None
        grown = crops.grow_in_tile(boxes, batch.tile_boxes, is_tile, factor)
        return image.tower.embed_boxes(arrays["image"], batch.image, grown)

    if "tiles" in wanted:
        found["tiles"] = embed(batch.tile_boxes, 1.0)
    if "regions" in wanted:
        assert batch.region_boxes is not None
        found["regions"] = embed(batch.region_boxes, config.distill.regions.crop_scale)
    if "instances" in wanted:
        entry = config.distill.hierkd_instance
        chosen = hierkd.some_instances(batch.boxes, batch.is_instance, entry.max_crops)
        found["instances"] = embed(hierkd.at(batch.boxes, chosen), entry.crop_scale)
    if "captions" in wanted:
        assert image is not None and batch.caption_tokens is not None
        found["captions"] = image.tower.embed_texts(arrays["image"], batch.caption_tokens)
    if "dense_regions" in wanted:
        assert dense is not None and batch.region_boxes is not None
        found["dense_regions"] = dense.tower.embed_regions(
            _dense_params(arrays), batch.image, batch.region_boxes, dense_side(config)
        )
    return TeacherSignals(**found)


def embed_names(dense: Opened, config: Config) -> Float[np.ndarray, "c f"]:
    """The dense teacher's texts of DenseVLM's names, unit length, things first."""
    loaded, tower, _ = dense
    tokens = tokenizer.build(tower.model.text, loaded.tokenizer).encode_all(name_texts(config))
    embed = jax.jit(tower.embed_texts)
    chunks = [
        embed(loaded.params, jnp.asarray(tokens[start : start + _NAME_CHUNK]))
        for start in range(0, len(tokens), _NAME_CHUNK)
    ]
    return np.concatenate([np.asarray(chunk) for chunk in chunks])


def name_texts(config: Config) -> list[str]:
    """DenseVLM's names in their template, things first."""
    densevlm = config.distill.densevlm
    return [densevlm.template.format(name) for name in (*densevlm.things, *densevlm.stuff)]


def student_name_tokens(config: Config) -> Int32[np.ndarray, "c l"]:
    """The same texts for the student's text tower."""
    student = tokenizer.build(config.model.text, config.data.tokenizer)
    return student.encode_all(name_texts(config))


def _open(path: str, key: str, config: Config) -> Opened:
    where = f"config.distill.{key}"
    if not path:
        raise ConfigError(f"{where}: the active branches need a checkpoint of towers or a ResNet")
    loaded = checkpoint.load_model(path)
    if loaded.kind == "detector":
        raise CheckpointError(
            f"{path} ({where}): a detector embeds no images; a teacher is a checkpoint of kind "
            "towers or resnet"
        )
    # Precision and kernels are the training's.
    model = dataclasses.replace(
        loaded.model, dtype=config.model.dtype, attention=config.model.attention, remat="none"
    )
    return Opened(loaded, Tower(loaded.kind, model, loaded.preprocess))


def _check_captions(config: Config, teacher: LoadedModel) -> None:
    """A batch's captions are tokenised for the student; the teacher must read them alike."""
    ours, theirs = config.model.text, teacher.model.text
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


def _embed_boxes(image: Opened, arrays: PyTree, pixels: Array, boxes_cxcywh: Array) -> Array:
    return image.tower.embed_boxes(arrays["image"], pixels, boxes_cxcywh)


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
