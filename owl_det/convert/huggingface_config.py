"""config.json of transformers' OWL classes, and the section `model` of ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from owl_det.config import ModelConfig
from owl_det.convert import clip_vocabulary, settings
from owl_det.convert.huggingface_parameters import LOGIT_SCALE
from owl_det.errors import CheckpointError

# What a config.json leaves out has these values (transformers 5; the text's are those of both).
_TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 16,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 768,
    "patch_size": 16,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
DEFAULTS = {
    "owlvit": {"text": _TEXT_DEFAULTS, "vision": {**_VISION_DEFAULTS, "patch_size": 32}},
    "owlv2": {"text": _TEXT_DEFAULTS, "vision": _VISION_DEFAULTS},
}
_ARCHITECTURES = {"owlvit": "OwlViTForObjectDetection", "owlv2": "Owlv2ForObjectDetection"}
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
HEAD_ACTIVATION = "gelu"  # fixed in their code


def model_section(config: Mapping[str, Any], kind: str, file: Path) -> dict[str, Any]:
    """The `model` section of our config, unchecked but for what it cannot express."""
    text = _section(config, "text_config", DEFAULTS[kind]["text"], file)
    vision = _section(config, "vision_config", DEFAULTS[kind]["vision"], file)
    dim = settings.setting(f"{file}: ", config, "projection_dim", 512)
    for key in ("hidden_act", "layer_norm_eps"):
        if text[key] != vision[key]:
            raise CheckpointError(
                f"{file}: {key} of text_config ({text[key]}) and vision_config ({vision[key]}) "
                "differ; both towers share one here"
            )
    if vision["num_channels"] != 3:
        raise CheckpointError(f"{file}: vision_config.num_channels is {vision['num_channels']}")
    if vision["hidden_act"] not in _ACTIVATIONS:
        raise CheckpointError(
            f"{file}: hidden_act {vision['hidden_act']!r} is not one of {', '.join(_ACTIVATIONS)}"
        )
    return {
        "image_size": vision["image_size"],
        "embedding_dim": dim,
        "image": {"patch_size": vision["patch_size"], **_tower(vision)},
        "text": {
            "vocabulary_size": text["vocab_size"],
            "num_positions": text["max_position_embeddings"],
            **_tower(text),
        },
        "activation": _ACTIVATIONS[vision["hidden_act"]],
        "head_activation": HEAD_ACTIVATION,
        "norm_epsilon": vision["layer_norm_eps"],
        "merge_norm_epsilon": vision["layer_norm_eps"],
        "box_bias": "both",
        "has_objectness_head": kind == "owlv2",
    }


def _section(
    config: Mapping[str, Any], name: str, defaults: dict[str, Any], file: Path
) -> dict[str, Any]:
    section = settings.section(f"{file}: ", config, name)
    where = f"{file}: {name}."
    return {key: settings.setting(where, section, key, x) for key, x in defaults.items()}


def _tower(section: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "width": section["hidden_size"],
        "num_layers": section["num_hidden_layers"],
        "num_heads": section["num_attention_heads"],
        "mlp_width": section["intermediate_size"],
    }


def check_expressible(model: ModelConfig) -> None:
    """Raises `CheckpointError` naming the key of a model that transformers' classes cannot be."""
    wanted = {
        "box_bias": (model.box_bias, "both"),
        "embedding_dim": (model.embedding_dim, model.text.width),
        "text.vocabulary_size": (model.text.vocabulary_size, clip_vocabulary.SIZE),
        "text.tokenizer": (model.text.tokenizer, "clip"),
        "text.pooling": (model.text.pooling, "end_token"),
        "text.is_causal": (model.text.is_causal, True),
        "text.projection_bias": (model.text.projection_bias, False),
        "image.pooling": (model.vit.pooling, "class_token"),
        "image.pre_norm": (model.vit.pre_norm, True),
        "image.patch_bias": (model.vit.patch_bias, False),
        "image.last_block": (model.vit.last_block, "full"),
    }
    if model.contrastive != "none":
        wanted["contrastive"] = (model.contrastive, "softmax")
        wanted["image.projection"] = (model.vit.projection, "linear")
    for key, (value, only) in wanted.items():
        if value != only:
            raise CheckpointError(f"model.{key}: {value}; transformers can only have {only}")


def config_json(kind: str, model: ModelConfig) -> dict[str, Any]:
    """The content of config.json."""
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    shared = {
        "hidden_act": names[model.activation],
        "layer_norm_eps": model.norm_epsilon,
        "attention_dropout": 0.0,
    }
    towers = {
        name: {
            "hidden_size": tower.width,
            "intermediate_size": tower.mlp_width,
            "num_hidden_layers": tower.num_layers,
            "num_attention_heads": tower.num_heads,
            **shared,
        }
        for name, tower in (("vision", model.vit), ("text", model.text))
    }
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "projection_dim": model.embedding_dim,
        "logit_scale_init_value": LOGIT_SCALE,
        "torch_dtype": "float32",
        "vision_config": {
            "model_type": f"{kind}_vision_model",
            "image_size": model.image_size,
            "patch_size": model.vit.patch_size,
            "num_channels": 3,
            **towers["vision"],
        },
        "text_config": {
            "model_type": f"{kind}_text_model",
            "vocab_size": model.text.vocabulary_size,
            "max_position_embeddings": model.text.num_positions,
            "pad_token_id": 0,
            "bos_token_id": clip_vocabulary.START,
            "eos_token_id": clip_vocabulary.END,
            **towers["text"],
        },
    }
