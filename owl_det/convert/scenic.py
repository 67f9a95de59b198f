"""Detectors of the authors' published code (Scenic): OWL-ViT and OWLv2 checkpoints in msgpack.

Parameters lie below `params` (saved with Optax) or `optimizer/target` (before it). Two spellings of
the layers are known, `resblocks.3` and `resblocks_3`, and two numberings of their norms, from 1 and
from 0. The architecture is told from the shapes; what the code fixes is written here.
"""

import math
import re

from owl_det.config import ModelConfig, PreprocessConfig
from owl_det.convert import models
from owl_det.convert.rules import ALL, LAYER, Ignored, Index, Rule, Table
from owl_det.convert.weights import Weights, open_weights
from owl_det.errors import CheckpointError
from owl_det.types import LoadedModel

_VISUAL, _TEXT = "backbone/clip/visual", "backbone/clip/text"
# What contrastive training has left; files may lack it.
_SCALE, _PROJECTION = "backbone/clip/logit_scale", f"{_VISUAL}/proj/kernel"


def read(source: str) -> LoadedModel:
    """A detector from a checkpoint file.

    Raises `CheckpointError`, naming the tensor, if one is missing, unknown or misshapen.
    """
    weights = _parameters(open_weights(source))
    has_objectness = any(name.startswith("objectness_head/") for name in weights.shapes)
    is_contrastive = _SCALE in weights.shapes and _PROJECTION in weights.shapes
    model = _model_config(weights, has_objectness, is_contrastive)
    return models.read(table(has_objectness, is_contrastive), weights, model, _PREPROCESS)


# The authors' evaluator: bilinear, then zeros at the bottom and right. It does not antialias; like
# their notebook and Hugging Face's conversion, we do.
_PREPROCESS = PreprocessConfig(geometry="pad", resize="bilinear", pad_value=0.0)


def table(has_objectness: bool, is_contrastive: bool = False) -> Table:
    """Where each tensor goes, in the newer spelling.

    `is_contrastive`: with the scale and the projection that only contrastive training uses.
    """
    heads = {"obj_box_head": "box_head", "objectness_head": "objectness_head"}
    entries: list[Rule] = [
        Rule(f"{_VISUAL}/class_embedding", "image/class_embedding"),
        Rule(f"{_VISUAL}/positional_embedding", "image/position_embedding"),
        Rule(f"{_VISUAL}/conv1/kernel", "image/patch_kernel"),
        *_norm(f"{_VISUAL}/ln_pre", "image/norm_pre"),
        *_blocks(_VISUAL, "image"),
        *_norm(f"{_VISUAL}/ln_post", "image/norm_post"),
        Rule(f"{_TEXT}/token_embedding/embedding", "text/token_embedding"),
        Rule(f"{_TEXT}/positional_embedding", "text/position_embedding"),
        *_blocks(_TEXT, "text"),
        *_norm(f"{_TEXT}/ln_final", "text/norm_final"),
        Rule(f"{_TEXT}/text_projection/kernel", "text/projection/kernel"),
        *_norm("backbone/merged_class_token", "merge_norm"),
        *_dense("class_head/Dense_0", "class_head/embedding"),
        *_dense("class_head/logit_shift", "class_head/logit_shift"),
        *_dense("class_head/logit_scale", "class_head/logit_scale"),
    ]
    for theirs, ours in heads.items():
        if theirs == "obj_box_head" or has_objectness:
            for i in range(3):
                entries += _dense(f"{theirs}/Dense_{i}", f"{ours}/dense_{i}")
    if is_contrastive:
        entries += [
            Rule(_SCALE, "logit_scale"),
            Rule(_PROJECTION, "image/visual_projection/kernel"),
        ]
    return Table(
        rules=tuple(entries),
        ignored=(
            Ignored(r"obj_mask_head/.*", "the mask head; masks are not predicted here"),
            Ignored(r"class_head/padding(_bias)?", "unused by the authors' code too"),
            Ignored(
                f"{_SCALE}|{_PROJECTION}", "for contrastive training, of no use without the other"
            ),
        ),
    )


def _norm(theirs: str, ours: str, index: Index = ()) -> list[Rule]:
    return [Rule(f"{theirs}/{x}", f"{ours}/norm/{x}", index) for x in ("scale", "bias")]


def _dense(theirs: str, ours: str, index: Index = ()) -> list[Rule]:
    return [Rule(f"{theirs}/{x}", f"{ours}/{x}", index) for x in ("kernel", "bias")]


def _blocks(theirs: str, ours: str) -> list[Rule]:
    layer, blocks = f"{theirs}/transformer/resblocks_{LAYER}", f"{ours}/transformer/blocks"
    entries = [
        *_norm(f"{layer}/ln_0", f"{blocks}/norm_1", (LAYER,)),
        *_norm(f"{layer}/ln_1", f"{blocks}/norm_2", (LAYER,)),
    ]
    for i, name in enumerate(("query", "key", "value")):
        entries += [
            Rule(f"{layer}/attn/{name}/kernel", f"{blocks}/qkv/kernel", (LAYER, ALL, i)),
            Rule(f"{layer}/attn/{name}/bias", f"{blocks}/qkv/bias", (LAYER, i)),
        ]
    return [
        *entries,
        *_dense(f"{layer}/attn/out", f"{blocks}/out", (LAYER,)),
        *_dense(f"{layer}/mlp/c_fc", f"{blocks}/mlp_in", (LAYER,)),
        *_dense(f"{layer}/mlp/c_proj", f"{blocks}/mlp_out", (LAYER,)),
    ]


def _parameters(weights: Weights) -> Weights:
    """The detector's tensors alone, in the newer spelling.

    The norms of a layer are `ln_1` and `ln_2` in older files and `ln_0` and `ln_1` in newer ones:
    where there is an `ln_2`, numbers are one too high.
    """
    for prefix in ("params/", "optimizer/target/params/", "optimizer/target/"):
        if any(name.startswith(f"{prefix}backbone/clip/") for name in weights.shapes):
            weights = weights.below(prefix)
            break
    else:
        raise CheckpointError(
            f"{weights.source}: no params/backbone/clip nor optimizer/target/backbone/clip in it: "
            "not a CLIP detector of Scenic"
        )
    weights = weights.renamed(lambda name: re.sub(r"resblocks\.(\d+)", r"resblocks_\1", name))
    old = {name.split("/ln_2/")[0] for name in weights.shapes if "/ln_2/" in name}
    numbers = {"ln_1": "ln_0", "ln_2": "ln_1"}

    def renumbered(name: str) -> str:
        layer, *rest = re.split(r"/(ln_[12])/", name)
        return f"{layer}/{numbers[rest[0]]}/{rest[1]}" if rest and layer in old else name

    return weights.renamed(renumbered)


def _model_config(weights: Weights, has_objectness: bool, is_contrastive: bool) -> ModelConfig:
    """The architecture, from shapes; `rules` then checks every shape against it.

    The class head's width is the queries'; every attention kernel is [width, heads, features].
    """
    patch_size, _, _, width = _shape(weights, f"{_VISUAL}/conv1/kernel", 4)
    num_positions, _ = _shape(weights, f"{_VISUAL}/positional_embedding", 2)
    side = math.isqrt(max(num_positions - 1, 0))
    if side * side + 1 != num_positions or not side:
        raise CheckpointError(
            f"{weights.source}: {num_positions} positions are no square grid and a class token"
        )
    vocabulary_size, text_width = _shape(weights, f"{_TEXT}/token_embedding/embedding", 2)
    model = {
        "image_size": side * patch_size,
        "embedding_dim": _shape(weights, f"{_TEXT}/text_projection/kernel", 2)[1],
        "image": {"patch_size": patch_size, "width": width, **_tower(weights, _VISUAL)},
        "text": {
            "vocabulary_size": vocabulary_size,
            "num_positions": _shape(weights, f"{_TEXT}/positional_embedding", 2)[0],
            "width": text_width,
            **_tower(weights, _TEXT),
        },
        "activation": "quick_gelu",
        "head_activation": "gelu_tanh",
        "norm_epsilon": 1e-5,
        "merge_norm_epsilon": 1e-6,
        "box_bias": "both",
        "has_objectness_head": has_objectness,
        "contrastive": "softmax" if is_contrastive else "none",
    }
    return models.resolve(model, {}, weights.source)[0]


def _tower(weights: Weights, tower: str) -> dict[str, int]:
    pattern = re.compile(rf"{tower}/transformer/resblocks_(\d{{1,4}})/.*")
    layers = {int(found[1]) for name in weights.shapes if (found := pattern.fullmatch(name))}
    first = f"{tower}/transformer/resblocks_0"
    return {
        "num_layers": len(layers),
        "num_heads": _shape(weights, f"{first}/attn/query/kernel", 3)[1],
        "mlp_width": _shape(weights, f"{first}/mlp/c_fc/kernel", 2)[1],
    }


def _shape(weights: Weights, name: str, num_axes: int) -> tuple[int, ...]:
    shape = weights.shapes.get(name)
    if shape is None:
        raise CheckpointError(f"{weights.source}: tensor {name} is missing")
    if len(shape) != num_axes or not all(shape):
        raise CheckpointError(f"{weights.source}: tensor {name} has shape {shape}")
    return shape
