"""What the converters of contrastive models share: sizes from shapes, rules of a layer, loading."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from owl_det import path_rules
from owl_det.checkpoints.load import parameter_shapes
from owl_det.convert import models, settings
from owl_det.convert.rules import ALL, LAYER, Index, Rule, Table, to_ours
from owl_det.convert.weights import Weights
from owl_det.errors import CheckpointError
from owl_det.types import LoadedModel

# What Hugging Face's configs call them → `ModelConfig.activation`.
ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
RESAMPLING = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def load(
    weights: Weights,
    table: Table,
    *,
    kind: str,
    model: Mapping[str, Any],
    preprocess: Mapping[str, Any],
    tokenizer: str,
) -> LoadedModel:
    """Reads `weights` by `table`; `model` and `preprocess` are those sections of a config.

    Raises `CheckpointError`, naming what does not fit.
    """
    checked, pixels = models.resolve(dict(model), dict(preprocess), weights.source)
    described = LoadedModel(
        kind=kind,  # pyright: ignore[reportArgumentType]
        params={},
        config=checked,
        preprocess=pixels,
        eval_prompts=models.EVAL_PROMPTS,
        step=0,
        tokenizer=tokenizer,
    )
    leaves = jax.tree_util.tree_leaves_with_path(parameter_shapes(described))
    shapes = {path_rules.path_name(path): leaf.shape for path, leaf in leaves}
    params = path_rules.unflatten(to_ours(table, weights, shapes))
    return dataclasses.replace(described, params=params)


def find_tokenizer(folder: Path, *names: str) -> str:
    """The first of these files that is in the folder; empty if none is."""
    return next((str(folder / name) for name in names if (folder / name).is_file()), "")


def shape_of(weights: Weights, name: str, num_axes: int) -> tuple[int, ...]:
    """Raises `CheckpointError` if the tensor is missing or has another number of axes."""
    if name not in weights.shapes:
        raise CheckpointError(f"{weights.source}: tensor {name} is missing")
    shape = weights.shapes[name]
    if len(shape) != num_axes or 0 in shape:
        raise CheckpointError(f"{weights.source}: tensor {name} has shape {shape}")
    return shape


def num_layers(weights: Weights, name: str) -> int:
    """How many tensors are called `name` with a number for `{i}`; at least 1."""
    pattern = re.escape(name).replace(re.escape(LAYER), r"\d+")
    count = sum(re.fullmatch(pattern, other) is not None for other in weights.shapes)
    if not count:
        raise CheckpointError(f"{weights.source}: tensor {name.replace(LAYER, '0')} is missing")
    return count


def grid_side(weights: Weights, num_positions: int, num_class_tokens: int) -> int:
    """Side of the square grid that so many image positions make."""
    side = math.isqrt(max(num_positions - num_class_tokens, 0))
    if side == 0 or side * side + num_class_tokens != num_positions:
        raise CheckpointError(f"{weights.source}: {num_positions} image positions are no square")
    return side


def shared(source: str, key: str, image: Any, text: Any) -> Any:
    """The value that both towers must have."""
    if image != text:
        raise CheckpointError(
            f"{source}: {key} is {image!r} in the image tower and {text!r} in the text tower; "
            "only one value for both is supported"
        )
    return image


def preprocess_of(
    source: str, processor: Mapping[str, Any], default: Mapping[str, Any]
) -> dict[str, Any]:
    """The section `preprocess` from a preprocessor_config.json; `default` where it is silent."""
    where = f"{source}: preprocessor_config.json: "
    return {
        "resize": settings.choice(where, processor, "resample", RESAMPLING, default["resize"]),
        "mean": settings.three_numbers(where, processor, "image_mean", default["mean"]),
        "std": settings.three_numbers(where, processor, "image_std", default["std"]),
    }


# --- Hugging Face --------------------------------------------------------------------------------


def huggingface_model(
    weights: Weights,
    config: Mapping[str, Any],
    *,
    num_class_tokens: int,
    activation: str,
    epsilon: float,
    text_heads: int,
) -> dict[str, Any]:
    """The section `model` of a CLIP or SigLIP model; the last three are the library's defaults.

    Sizes come from the tensors. Raises `CheckpointError`, naming the tensor or the key.
    """
    source = weights.source
    where = f"{source}: config.json: "

    def value(tower: str, key: str, default: Any) -> Any:
        section = settings.section(where, config, f"{tower}_config")
        return settings.setting(f"{where}{tower}_config.", section, key, default)

    def both(key: str, default: Any) -> Any:
        return shared(source, key, *(value(tower, key, default) for tower in ("vision", "text")))

    embeddings = "vision_model.embeddings"
    width, _, patch, _ = shape_of(weights, f"{embeddings}.patch_embedding.weight", 4)
    positions = shape_of(weights, f"{embeddings}.position_embedding.weight", 2)[0]
    act = both("hidden_act", activation)
    if act not in ACTIVATIONS:
        raise CheckpointError(f"{source}: hidden_act {act!r} is not one of {list(ACTIVATIONS)}")
    return {
        "image_size": grid_side(weights, positions, num_class_tokens) * patch,
        "activation": ACTIVATIONS[act],
        "norm_epsilon": both("layer_norm_eps", epsilon),
        "image": {
            "patch_size": patch,
            "width": width,
            "num_heads": value("vision", "num_attention_heads", 12),
            **_depth(weights, "vision_model"),
        },
        "text": {
            **_text_sizes(weights),
            "num_heads": value("text", "num_attention_heads", text_heads),
            **_depth(weights, "text_model"),
        },
    }


def _text_sizes(weights: Weights) -> dict[str, int]:
    embeddings = "text_model.embeddings"
    vocabulary, width = shape_of(weights, f"{embeddings}.token_embedding.weight", 2)
    num_positions = shape_of(weights, f"{embeddings}.position_embedding.weight", 2)[0]
    return {"vocabulary_size": vocabulary, "num_positions": num_positions, "width": width}


def _depth(weights: Weights, tower: str) -> dict[str, int]:
    fc1 = f"{tower}.encoder.layers.{LAYER}.mlp.fc1.weight"
    return {
        "num_layers": num_layers(weights, fc1),
        "mlp_width": shape_of(weights, fc1.replace(LAYER, "0"), 2)[0],
    }


def huggingface_layers(theirs: str, ours: str) -> list[Rule]:
    """The layers of a CLIP or SigLIP tower, for instance `vision_model.encoder.layers`."""
    theirs, blocks = f"{theirs}.{LAYER}", f"{ours}/transformer/blocks"
    found = []
    for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
        attention = f"{theirs}.self_attn.{name}"
        found += [
            Rule(f"{attention}.weight", f"{blocks}/qkv/kernel", (LAYER, ALL, number), "linear"),
            Rule(f"{attention}.bias", f"{blocks}/qkv/bias", (LAYER, number), "flat"),
        ]
    for name, layer in (
        ("self_attn.out_proj", "out"),
        ("mlp.fc1", "mlp_in"),
        ("mlp.fc2", "mlp_out"),
    ):
        found += linear(f"{theirs}.{name}", f"{blocks}/{layer}", (LAYER,))
    for name, layer in (("layer_norm1", "norm_1"), ("layer_norm2", "norm_2")):
        found += norm(f"{theirs}.{name}", f"{blocks}/{layer}", (LAYER,))
    return found


def linear(theirs: str, ours: str, index: Index = ()) -> list[Rule]:
    return [
        Rule(f"{theirs}.weight", f"{ours}/kernel", index, "linear"),
        Rule(f"{theirs}.bias", f"{ours}/bias", index),
    ]


def norm(theirs: str, ours: str, index: Index = ()) -> list[Rule]:
    return [
        Rule(f"{theirs}.weight", f"{ours}/norm/scale", index),
        Rule(f"{theirs}.bias", f"{ours}/norm/bias", index),
    ]
