"""From what a config file says to a checked `Config`: unknown keys, types, ranges, contradictions.

A typo fails here, before any data is read; every message names the key to change.
"""

import dataclasses
import difflib
import re
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from owl_det import files
from owl_det.config import (
    CocoSource,
    Config,
    DenseVlmConfig,
    ImageTextSource,
    ModelConfig,
    PreprocessConfig,
    PseudoBoxesSource,
    ShapesWorldSource,
    SourceConfig,
)
from owl_det.errors import ConfigError, UserError

_MAX_INTEGER = 2**32 - 1  # more than any key can mean, and all that arrays and seeds hold
_MAX_FLOAT = float(np.finfo(np.float32).max)


def resolve(tree: Mapping[str, Any]) -> Config:
    """Builds a checked `Config` from a nested mapping.

    Missing keys take their defaults. Raises `ConfigError`, naming the key, on an unknown key, a
    wrong type, a value out of range, or values that contradict each other.
    """
    config = typed(tree)
    _check(config)
    return config


def typed(tree: Mapping[str, Any]) -> Config:
    """As `resolve`, but what concerns several keys or a range is not checked yet."""
    return _build(Config, tree, "config")


def resolve_model(
    model: Mapping[str, Any], preprocess: Mapping[str, Any]
) -> tuple[ModelConfig, PreprocessConfig]:
    """The two sections that travel with every checkpoint and export, checked. As `resolve`."""
    # A config needs a source to be whole; none is opened.
    data = {"train": {"none": {"kind": "shapes_world"}}}
    config = resolve({"model": model, "preprocess": preprocess, "data": data})
    return config.model, config.preprocess


def _build(schema: Any, value: Any, path: str) -> Any:
    """Converts `value` to `schema`, a type annotation of config.py."""
    origin, args = typing.get_origin(schema), typing.get_args(schema)
    if dataclasses.is_dataclass(schema):
        return _build_dataclass(schema, value, path)
    if origin in (typing.Union, types.UnionType):
        return _build_by_kind(args, value, path)
    if origin is Literal:
        if type(value) not in map(type, args) or value not in args:
            raise ConfigError(f"{path}: {value!r} is not one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}: expected a list, got {_describe(value)}")
        return tuple(_build(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected a mapping, got {_describe(value)}")
        return {
            _name(key, path): _build(args[1], item, f"{path}.{key}") for key, item in value.items()
        }
    return _build_leaf(schema, value, path)


def _build_leaf(schema: type, value: Any, path: str) -> Any:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if is_integer and abs(value) > _MAX_INTEGER and schema in (int, float):
        raise ConfigError(f"{path}: must be at most {_MAX_INTEGER}")
    if schema is float and is_integer:
        return float(value)
    if type(value) is not schema:
        raise ConfigError(f"{path}: expected {schema.__name__}, got {_describe(value)}")
    if schema is float and not abs(value) <= _MAX_FLOAT:
        raise ConfigError(f"{path}: expected a finite number of 32 bits, got {value}")
    return _build_text(value, path) if isinstance(value, str) else value


def _build_text(value: str, path: str) -> str:
    """A text as it is, but for `~/`, the home folder; no shell replaces that after a `=`."""
    if "\0" in value or not _is_unicode(value):
        raise ConfigError(f"{path}: {value!r} holds characters that no text or path has")
    try:
        local = files.local(value, path)
    except UserError as error:
        raise ConfigError(str(error)) from None
    return str(local) if value.startswith("~/") else value


def _is_unicode(value: str) -> bool:
    """False for half of a surrogate pair, as JSON can hold it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _name(key: Any, path: str) -> str:
    """The name of a source or branch; files of the workdir carry it."""
    if not isinstance(key, str) or not re.fullmatch(r"[^\s./\\][^./\\\0]*", key):
        raise ConfigError(
            f"{path}: {key!r} is no name; give one without '.', '/' and '\\', as files carry it"
        )
    return key


def _build_dataclass(schema: Any, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: expected a group of keys, got {_describe(value)}")
    hints = typing.get_type_hints(schema)
    for key in value:
        if not isinstance(key, str) or key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"; did you mean {path}.{near[0]}?" if near else f"; known: {', '.join(hints)}"
            raise ConfigError(f"{path}.{key}: no such key{hint}")
    return schema(**{key: _build(hints[key], item, f"{path}.{key}") for key, item in value.items()})


def _build_by_kind(schemas: tuple[Any, ...], value: Any, path: str) -> Any:
    by_kind = {schema.kind: schema for schema in schemas}
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if not isinstance(kind, str) or kind not in by_kind:
        raise ConfigError(f"{path}.kind: {kind!r} is not one of {', '.join(by_kind)}")
    return _build_dataclass(by_kind[kind], value, path)


def _describe(value: Any) -> str:
    text = textwrap.shorten(repr(value), 100, placeholder=" …")
    return f"{type(value).__name__} {text}"


# --- checks across keys --------------------------------------------------------------------------


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def check_attention(model: ModelConfig, platform: str) -> None:
    """Raises `ConfigError` where the devices cannot compute `model.attention`.

    Not part of `resolve`: checkpoints of other machines have a config too.
    """
    if model.attention != "cudnn":
        return
    _require(platform == "gpu", "config.model.attention: cudnn needs an NVIDIA GPU; use xla")
    _require(
        model.dtype == "bfloat16",
        "config.model.attention: cudnn computes in bfloat16; set config.model.dtype to it, or xla",
    )


def _check_pattern(pattern: str, key: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{key}: {pattern!r} is no regular expression ({error})") from None


def _check(config: Config) -> None:
    """Checks across fields; each message names the key to change."""
    model, data, augment = config.model, config.data, config.data.augment
    for key in ("batch_size", "num_steps"):
        _require(getattr(config, key) > 0, f"config.{key}: must be positive")
    for key, value in (
        ("data.num_workers", data.num_workers),
        ("data.max_distinct_queries", data.max_distinct_queries),
        ("checkpoint.every_steps", config.checkpoint.every_steps),
        ("evaluation.num_pictures", config.evaluation.num_pictures),
        ("evaluation.max_images", config.evaluation.max_images),
        ("evaluation.top_k", config.evaluation.top_k),
    ):
        _require(value >= 0, f"config.{key}: must not be negative")
    for key, value in (
        ("seed", config.seed),
        ("optimizer.learning_rate", config.optimizer.learning_rate),
        ("optimizer.text_learning_rate", config.optimizer.text_learning_rate),
        ("optimizer.image_learning_rate", config.optimizer.image_learning_rate),
        ("schedule.warmup_steps", config.schedule.warmup_steps),
        ("schedule.cooldown_steps", config.schedule.cooldown_steps),
        ("log.every_steps", config.log.every_steps),
        ("evaluation.every_steps", config.evaluation.every_steps),
    ):
        _require(value >= 0, f"config.{key}: must not be negative, got {value}")
    _require(config.schedule.timescale > 0, "config.schedule.timescale: must be positive")
    for name, tower in (("image", model.image), ("text", model.text)):
        for key in ("dropout_rate", "droplayer_rate"):
            value = getattr(tower, key, 0.0)
            _require(0 <= value < 1, f"config.model.{name}.{key}: must be in [0, 1), got {value}")
    for key in ("crop_probability", "photometric"):
        value = getattr(augment, key)
        _require(0 <= value <= 1, f"config.data.augment.{key}: must be in [0, 1], got {value}")
    _require(
        config.checkpoint.image_size == 0 or config.checkpoint.model_from_init,
        "config.checkpoint.image_size: needs config.checkpoint.model_from_init; else set "
        "config.model.image_size",
    )
    _require(config.checkpoint.keep > 0, "config.checkpoint.keep: must be positive")
    _require(
        bool(config.checkpoint.init_from) or not config.checkpoint.class_head_from_projection,
        "config.checkpoint.class_head_from_projection: needs towers in config.checkpoint.init_from",
    )
    for pattern in config.optimizer.frozen:
        _check_pattern(pattern, "config.optimizer.frozen")
    for pattern in config.checkpoint.fresh:
        _check_pattern(pattern, "config.checkpoint.fresh")
    _require(
        bool(config.checkpoint.init_from) or not config.checkpoint.fresh,
        "config.checkpoint.fresh: needs config.checkpoint.init_from; without it all start anew",
    )
    for group, sources in (("train", data.train), ("eval", data.eval)):
        for name, source in sources.items():
            side = getattr(source, "image_size", 1)
            _require(side > 0, f"config.data.{group}.{name}.image_size: must be positive")
    for name, tower in (("image", model.image), ("text", model.text)):
        for key in ("width", "num_layers", "num_heads", "mlp_width"):
            _require(getattr(tower, key) > 0, f"config.model.{name}.{key}: must be positive")
        _require(
            tower.width % tower.num_heads == 0,
            f"config.model.{name}.num_heads: {tower.num_heads} does not divide width {tower.width}",
        )
    for name, value in (
        ("embedding_dim", model.embedding_dim),
        ("image.patch_size", model.image.patch_size),
        ("text.vocabulary_size", model.text.vocabulary_size),
        ("text.num_positions", model.text.num_positions),
    ):
        _require(value > 0, f"config.model.{name}: must be positive")
    _require(
        model.image_size > 0 and model.image_size % model.image.patch_size == 0,
        f"config.model.image_size: not a multiple of the patch size {model.image.patch_size}",
    )
    _require(0 < model.class_prior < 1, "config.model.class_prior: must be in (0, 1)")
    for key in ("class_initial_scale", "scan_unroll"):
        _require(getattr(model, key) > 0, f"config.model.{key}: must be positive")
    for key in ("norm_epsilon", "merge_norm_epsilon"):
        _require(0 <= getattr(model, key) < 1, f"config.model.{key}: must be in [0, 1)")
    _require(
        model.image.position_init != "sincos2d" or model.image.width % 4 == 0,
        "config.model.image.width: sincos2d positions need a multiple of 4",
    )
    _require(
        model.contrastive == "none"
        or model.image.projection != "none"
        or model.embedding_dim == model.image.width,
        f"config.model.embedding_dim: {model.embedding_dim} is not the image tower's width "
        f"{model.image.width}, and config.model.image.projection is none",
    )
    if config.task == "contrastive":
        _check_contrastive(config)
    _check_distill(config)
    _require(0 < config.loss.negative_share <= 1, "config.loss.negative_share: must be in (0, 1]")
    for key in ("token_drop_rate", "token_drop_noise"):
        value = getattr(config.selection, key)
        _require(0 <= value < 1, f"config.selection.{key}: must be in [0, 1), got {value}")
    _require(
        config.selection.instance_top_k >= 0,
        "config.selection.instance_top_k: must be 0 (all tokens) or positive",
    )
    _require(
        model.has_objectness_head or config.selection.instance_top_k == 0,
        "config.selection.instance_top_k: needs config.model.has_objectness_head",
    )
    for name, source in (*data.train.items(), *data.eval.items()):
        if isinstance(source, ShapesWorldSource):
            _require(
                0 < source.annotated_fraction <= 1,
                f"config.data source {name}: annotated_fraction must be in (0, 1]",
            )
        if isinstance(source, PseudoBoxesSource):
            _require(
                0 <= source.min_box_score <= (source.min_image_score or 1) <= 1,
                f"config.data source {name}: min_box_score <= min_image_score, both in [0, 1]",
            )
            _require(
                source.hard_negatives >= 0,
                f"config.data source {name}: hard_negatives must not be negative",
            )
    for key in ("data", "fsdp", "tensor"):
        value = getattr(config.mesh, key)
        _require(value == -1 or value > 0, f"config.mesh.{key}: must be positive or -1")
    _require(
        [config.mesh.data, config.mesh.fsdp, config.mesh.tensor].count(-1) <= 1,
        "config.mesh: only one axis may be -1",
    )
    _require(
        len(augment.mosaic_sizes) == len(augment.mosaic_probabilities) > 0,
        "config.data.augment.mosaic_probabilities: one number for each of mosaic_sizes",
    )
    _require(
        all(1 <= size <= 6 for size in augment.mosaic_sizes),
        "config.data.augment.mosaic_sizes: grid sides go from 1 to 6",
    )
    _require(
        all(p >= 0 for p in augment.mosaic_probabilities) and sum(augment.mosaic_probabilities) > 0,
        "config.data.augment.mosaic_probabilities: must be non-negative and not all zero",
    )
    _require(0 < augment.tile_scale_min <= 1, "config.data.augment.tile_scale_min: in (0, 1]")
    _require(0 <= augment.crop_keep <= 1, "config.data.augment.crop_keep: must be in [0, 1]")
    _require(0 < augment.crop_min_area <= 1, "config.data.augment.crop_min_area: in (0, 1]")
    _require(bool(data.train), "config.data.train: name at least one source")
    _require(
        all(s.weight > 0 for s in data.train.values()), "config.data.train: weights are positive"
    )
    _require(
        not data.with_captions or any(map(_may_have_captions, data.train.values())),
        "config.data.with_captions: no source of config.data.train has captions; of a coco source "
        "`captions` names the file that has them",
    )
    for name, source in data.train.items():
        _require(
            config.task != "detection" or not isinstance(source, ImageTextSource),
            f"config.data.train.{name}: image-text pairs have no boxes, and nobody knows which "
            "names are absent; owl-det annotate makes pseudo_boxes of them",
        )
    _require(
        data.max_queries >= data.min_queries,
        f"config.data.max_queries: {data.max_queries} is below min_queries {data.min_queries}",
    )
    _require(
        data.max_queries > data.min_queries or not data.batch_negatives,
        f"config.data.batch_negatives: min_queries {data.min_queries} leaves no room; lower it "
        "below config.data.max_queries",
    )
    for key in ("max_instances", "max_queries"):
        _require(getattr(data, key) > 0, f"config.data.{key}: must be positive")
    for key in ("norm", "microbatch"):
        value = getattr(config.optimizer.clip, key)
        _require(value > 0, f"config.optimizer.clip.{key}: must be positive, got {value}")
    for key in ("mean", "std"):
        value = getattr(config.preprocess, key)
        _require(len(value) == 3, f"config.preprocess.{key}: three numbers, got {list(value)}")
    _require(all(x > 0 for x in config.preprocess.std), "config.preprocess.std: must be positive")
    _require(0 <= config.preprocess.pad_value <= 1, "config.preprocess.pad_value: in [0, 1]")


def _check_contrastive(config: Config) -> None:
    """What contrastive pretraining asks of the other keys."""
    _require(
        config.model.contrastive != "none",
        "config.model.contrastive: contrastive training needs softmax or sigmoid",
    )
    _require(
        config.data.with_captions, "config.data.with_captions: contrastive training needs captions"
    )
    _require(
        config.data.augment.mosaic_sizes == (1,) or config.model.image.pooling == "mean",
        "config.data.augment.mosaic_sizes: only towers that pool by the mean can take the tiles of "
        f"a mosaic apart; {config.model.image.pooling} pools whole images, (1,)",
    )
    _require(
        config.optimizer.clip.scope in ("none", "global"),
        "config.optimizer.clip.scope: the contrastive loss couples the examples of a batch: none "
        f"or global, not {config.optimizer.clip.scope}",
    )
    _require(
        config.selection.token_drop_rate == 0 or config.model.image.pooling == "mean",
        "config.selection.token_drop_rate: in contrastive training only for towers that pool by "
        "the mean; set it to 0",
    )
    _require(
        config.selection.instance_top_k == 0,
        "config.selection.instance_top_k: contrastive training has no boxes; set it to 0",
    )


def _check_distill(config: Config) -> None:
    """What distillation asks of the other keys."""
    distill = config.distill
    for name, entry in distill.branches().items():
        _require(entry.weight >= 0, f"config.distill.{name}.weight: must not be negative")
    for name, entry in distill.custom.items():
        where = f"config.distill.custom.{name}"
        _require(bool(entry.module), f"{where}.module: name a module that defines BRANCH")
        _require(not hasattr(distill, name), f"{where}: there is a branch of that name already")
    active = distill.active()
    if config.task == "distill":
        _check_tower_distillation(config)
    if not active:
        return
    _require(
        config.task != "contrastive",
        "config.distill: contrastive training has no branches; set config.task to distill",
    )
    regions, augment = distill.regions, config.data.augment
    _require(regions.max_regions > 0, "config.distill.regions.max_regions: must be positive")
    _require(regions.crop_scale > 0, "config.distill.regions.crop_scale: must be positive")
    _require(
        distill.hierkd_global.grid_side > 0, "config.distill.hierkd_global.grid_side: positive"
    )
    _require(
        distill.hierkd_instance.max_crops > 0 and distill.hierkd_instance.crop_scale > 0,
        "config.distill.hierkd_instance: max_crops and crop_scale must be positive",
    )
    _require(distill.dense_image_size >= 0, "config.distill.dense_image_size: not negative")
    _require(
        "hierkd_global" not in active or config.data.with_captions,
        "config.distill.hierkd_global: needs captions; set config.data.with_captions",
    )
    _require(
        "hierkd_global" not in active
        or config.distill.hierkd_global.objective == "positive"
        or config.optimizer.clip.scope in ("none", "global"),
        "config.optimizer.clip.scope: distill.hierkd_global contrasts the examples of a batch: "
        f"none or global, not {config.optimizer.clip.scope}",
    )
    if "densevlm" in active:
        _check_densevlm(distill.densevlm)
    _require(
        not distill.shuffle_targets or config.batch_size > 1,
        "config.distill.shuffle_targets: a batch of one image has no other; raise batch_size",
    )
    _require(
        not distill.shuffle_targets or distill.hierkd_instance.boxes == "truth",
        "config.distill.shuffle_targets: the crops of predicted boxes are made in the loss, from "
        "their own image; set distill.hierkd_instance.boxes to truth",
    )
    if distill.cache:
        _require(
            augment.crop_probability == 0 and not augment.flip and augment.photometric == 0,
            "config.data.augment: config.distill.cache knows whole images as they are; set "
            "crop_probability and photometric to 0 and flip to False",
        )
        _require(
            "hierkd_instance" not in active or distill.hierkd_instance.boxes == "truth",
            "config.distill.hierkd_instance.boxes: predicted boxes cannot be cached; take truth",
        )


def _check_densevlm(densevlm: DenseVlmConfig) -> None:
    where = "config.distill.densevlm"
    names = (*densevlm.things, *densevlm.stuff)
    _require(len(names) > 1, f"{where}.things, .stuff: give at least two names")
    _require(len(set(names)) == len(names), f"{where}: a name stands twice in things and stuff")
    _require(densevlm.template.count("{}") == 1, f"{where}.template: needs one {{}} for the name")
    _require(0 <= densevlm.threshold <= 1, f"{where}.threshold: must be in [0, 1]")
    _require(densevlm.temperature > 0, f"{where}.temperature: must be positive")
    _require(
        densevlm.contrast == "all" or bool(densevlm.things and densevlm.stuff),
        f"{where}.contrast: {densevlm.contrast} needs both things and stuff",
    )


def _may_have_captions(source: SourceConfig) -> bool:
    kinds = (ShapesWorldSource, ImageTextSource, PseudoBoxesSource)
    return isinstance(source, kinds) or (isinstance(source, CocoSource) and bool(source.captions))


def _check_tower_distillation(config: Config) -> None:
    """Towers have no heads: there is neither matching nor a class head to teach."""
    _require(
        config.model.contrastive != "none",
        "config.model.contrastive: distillation of towers needs softmax or sigmoid",
    )
    active = config.distill.active()
    _require(bool(active), "config.distill: task distill needs a branch whose weight is not 0")
    for name in ("gridclip_grid", "hierkd_instance"):
        _require(
            name not in active, f"config.distill.{name}: needs a detector's heads (task detection)"
        )
    _require(
        config.optimizer.clip.scope in ("none", "global"),
        "config.optimizer.clip.scope: distillation of towers clips none or global, not "
        f"{config.optimizer.clip.scope}",
    )
    _require(
        config.selection.instance_top_k == 0,
        "config.selection.instance_top_k: towers have no objectness; set it to 0",
    )
