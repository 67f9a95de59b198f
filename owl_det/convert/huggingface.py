"""Detectors of Hugging Face's transformers, both ways: `OwlViT…` and `Owlv2ForObjectDetection`.

A folder holds config.json, model.safetensors (or shards with an index), preprocessor_config.json
and the tokeniser's files. Nothing here imports transformers. What its code fixes (GELU with erf in
the heads, one epsilon for every norm, boxes biased to place and size) is written into the config
that is read, and checked or told when writing.
"""

import dataclasses
import json
import logging as std_logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from safetensors.numpy import save_file

from owl_det import files, path_rules
from owl_det.config import ModelConfig, PreprocessConfig
from owl_det.convert import clip_vocabulary, models, rules, settings
from owl_det.convert.rules import ALL, LAYER, Ignored, Layout, Rule, Table
from owl_det.convert.weights import Weights, open_weights, read_json
from owl_det.errors import CheckpointError
from owl_det.types import LoadedModel

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
_DEFAULTS = {
    "owlvit": {"text": _TEXT_DEFAULTS, "vision": {**_VISION_DEFAULTS, "patch_size": 32}},
    "owlv2": {"text": _TEXT_DEFAULTS, "vision": _VISION_DEFAULTS},
}
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_HEAD_ACTIVATION = "gelu"  # fixed in their code

_RESAMPLING = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_CLIP_MEAN, _CLIP_STD = PreprocessConfig().mean, PreprocessConfig().std
_LOGIT_SCALE = 2.6592  # initial value of CLIP's ln(1 / temperature)

_FILES = ["*.json", "merges.txt", "model*.safetensors"]  # of a hub repository


# --- reading -------------------------------------------------------------------------------------


def read(source: str) -> LoadedModel:
    """A detector from a folder, or from the hub if `source` is `owner/name` and no folder.

    Raises `CheckpointError`, naming file and field, for what is missing or does not fit.
    """
    folder = find_folder(source)
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type {kind!r} is not one of {', '.join(_DEFAULTS)}"
        )
    weights = open_weights(folder)
    is_contrastive = _is_contrastive(kind, weights)
    model, preprocess = models.resolve(
        {
            **_model_config(config, kind, folder / "config.json"),
            "contrastive": "softmax" if is_contrastive else "none",
        },
        _preprocess_config(folder / "preprocessor_config.json", kind),
        str(folder),
    )
    _check_side(folder / "preprocessor_config.json", model.image_size)
    loaded = models.read(table(kind, is_contrastive), weights, model, preprocess)
    return dataclasses.replace(
        loaded, tokenizer=clip_vocabulary.own_tokenizer(folder), names=_names(config)
    )


def _names(config: dict[str, Any]) -> tuple[str, ...]:
    """Those that a fine-tuned model keeps; transformers itself writes LABEL_0, LABEL_1."""
    labels = config.get("id2label")
    names = labels.values() if isinstance(labels, dict) else ()
    kept = [name for name in names if isinstance(name, str) and not name.startswith("LABEL_")]
    return tuple(kept) if len(kept) == len(names) else ()


def _is_contrastive(kind: str, weights: Weights) -> bool:
    """True if the file holds what contrastive training has left, and no stand-in of `write`."""
    scale, projection = f"{kind}.logit_scale", f"{kind}.visual_projection.weight"
    if scale not in weights.shapes or projection not in weights.shapes:
        return False
    if len(weights.shapes[projection]) != 2:
        return True  # the table's shapes say what is wrong
    stand_in = _initial(kind, weights.shapes[projection])
    return not all(np.array_equal(weights.read(name), x) for name, x in stand_in.items())


def table(kind: str, is_contrastive: bool = False) -> Table:
    """Where each tensor of "owlvit" or "owlv2" goes.

    `is_contrastive`: with the scale and the projection that only contrastive training uses.
    """
    vision, text = f"{kind}.vision_model", f"{kind}.text_model"
    entries: list[Rule] = [
        Rule(f"{vision}.embeddings.class_embedding", "image/class_embedding"),
        Rule(f"{vision}.embeddings.patch_embedding.weight", "image/patch_kernel", layout="conv"),
        Rule(f"{vision}.embeddings.position_embedding.weight", "image/position_embedding"),
        *_norm(f"{vision}.pre_layernorm", "image/norm_pre"),
        *_blocks(vision, "image"),
        *_norm(f"{vision}.post_layernorm", "image/norm_post"),
        Rule(f"{text}.embeddings.token_embedding.weight", "text/token_embedding"),
        Rule(f"{text}.embeddings.position_embedding.weight", "text/position_embedding"),
        *_blocks(text, "text"),
        *_norm(f"{text}.final_layer_norm", "text/norm_final"),
        Rule(f"{kind}.text_projection.weight", "text/projection/kernel", layout="linear"),
        *_norm("layer_norm", "merge_norm"),
        *_linear("class_head.dense0", "class_head/embedding"),
        *_linear("class_head.logit_shift", "class_head/logit_shift"),
        *_linear("class_head.logit_scale", "class_head/logit_scale"),
    ]
    heads = ("box_head", "objectness_head") if kind == "owlv2" else ("box_head",)
    for head in heads:
        for i in range(3):
            entries += _linear(f"{head}.dense{i}", f"{head}/dense_{i}")
    if is_contrastive:
        projection = f"{kind}.visual_projection.weight"
        entries += [
            Rule(projection, "image/visual_projection/kernel", layout="linear"),
            Rule(f"{kind}.logit_scale", "logit_scale"),
        ]
    return Table(
        rules=tuple(entries),
        ignored=(
            Ignored(
                rf"{kind}\.(visual_projection\.weight|logit_scale)",
                "for contrastive training, and incomplete or never trained",
            ),
            Ignored(r".*\.position_ids|box_bias", "constants that older versions saved"),
        ),
    )


def _norm(theirs: str, ours: str, index: rules.Index = ()) -> list[Rule]:
    return [
        Rule(f"{theirs}.weight", f"{ours}/norm/scale", index),
        Rule(f"{theirs}.bias", f"{ours}/norm/bias", index),
    ]


def _linear(theirs: str, ours: str, index: rules.Index = ()) -> list[Rule]:
    return [
        Rule(f"{theirs}.weight", f"{ours}/kernel", index, "linear"),
        Rule(f"{theirs}.bias", f"{ours}/bias", index),
    ]


def _blocks(theirs: str, ours: str) -> list[Rule]:
    layer, blocks = f"{theirs}.encoder.layers.{LAYER}", f"{ours}/transformer/blocks"
    entries: list[Rule] = []
    for i, name in enumerate("qkv"):
        attention: list[tuple[str, str, rules.Index, Layout]] = [
            ("weight", "kernel", (LAYER, ALL, i), "linear"),
            ("bias", "bias", (LAYER, i), "flat"),
        ]
        entries += [
            Rule(f"{layer}.self_attn.{name}_proj.{theirs}", f"{blocks}/qkv/{ours}", index, layout)
            for theirs, ours, index, layout in attention
        ]
    return [
        *_norm(f"{layer}.layer_norm1", f"{blocks}/norm_1", (LAYER,)),
        *entries,
        *_linear(f"{layer}.self_attn.out_proj", f"{blocks}/out", (LAYER,)),
        *_norm(f"{layer}.layer_norm2", f"{blocks}/norm_2", (LAYER,)),
        *_linear(f"{layer}.mlp.fc1", f"{blocks}/mlp_in", (LAYER,)),
        *_linear(f"{layer}.mlp.fc2", f"{blocks}/mlp_out", (LAYER,)),
    ]


def _model_config(config: Mapping[str, Any], kind: str, file: Path) -> dict[str, Any]:
    """The `model` section of our config, unchecked but for what it cannot express."""
    text = _section(config, "text_config", _DEFAULTS[kind]["text"], file)
    vision = _section(config, "vision_config", _DEFAULTS[kind]["vision"], file)
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
        "head_activation": _HEAD_ACTIVATION,
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


def _preprocess_config(file: Path, kind: str) -> dict[str, Any]:
    """The `preprocess` section. The processor's class decides between padding and stretching."""
    values, where = read_json(file), f"{file}: "
    is_stretched = _processor_of(values, kind, where) == "owlvit"
    for key in ("do_resize", "do_rescale", "do_normalize", *(() if is_stretched else ("do_pad",))):
        if not settings.switch(where, values, key, True):
            raise CheckpointError(f"{file}: {key} must be true")
    factor = settings.setting(where, values, "rescale_factor", 1 / 255)
    if abs(factor * 255 - 1) > 1e-6:
        raise CheckpointError(f"{file}: rescale_factor {factor!r} is not 1/255")
    resize = settings.choice(where, values, "resample", _RESAMPLING, "bicubic")
    return {
        "geometry": "stretch" if is_stretched else "pad",
        # Owlv2's processor filters and interpolates with SciPy, whatever `resample` says.
        "resize": resize if is_stretched else "gaussian",
        "pad_value": 0.0,
        "mean": settings.three_numbers(where, values, "image_mean", _CLIP_MEAN),
        "std": settings.three_numbers(where, values, "image_std", _CLIP_STD),
    }


def _processor_of(values: Mapping[str, Any], kind: str, where: str) -> str:
    """ "owlvit" or "owlv2" by the class of the image processor; `kind` where none is named."""
    for key in ("image_processor_type", "feature_extractor_type"):
        name = settings.setting(where, values, key, "") if values.get(key) is not None else ""
        for known in _DEFAULTS:
            if known in name.lower():
                return known
        if name:
            raise CheckpointError(f"{where}{key}: {name!r} is not of {' or '.join(_DEFAULTS)}")
    return kind


def _check_side(file: Path, image_size: int) -> None:
    """Images must be prepared at the model's size; a crop to that size takes nothing away."""
    values = read_json(file)
    is_cropped = settings.switch(f"{file}: ", values, "do_center_crop", False)
    for key in ("size", "crop_size") if is_cropped else ("size",):
        size = values.get(key)
        if isinstance(size, dict):
            sides = [size.get("height"), size.get("width")]
        else:
            sides = size if isinstance(size, list) and size else [size]
        if size is not None and sides != [image_size] * len(sides):
            shown = str(size)[:60]
            raise CheckpointError(f"{file}: {key} {shown} is not the model's {image_size} pixels")


def find_folder(source: str, files: Sequence[str] = _FILES) -> Path:
    """The folder of that name, or these files of a hub repository; `CheckpointError` if neither.

    `owner/name@revision` is a branch, a commit or, as `refs/pr/N`, a pull request of a repository.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    named = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)
    if folder.exists() or not named:
        raise CheckpointError(f"{source}: not a folder with config.json and model.safetensors")
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise CheckpointError(
            f"{source}: no such folder; to fetch it from the hub, pip install huggingface_hub"
        ) from None
    std_logging.getLogger("huggingface_hub").setLevel(std_logging.ERROR)
    name, revision = named.groups()
    try:
        found = Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(files))
        )
    except Exception as error:  # of many kinds: offline, no such name, no right to read
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{source}: no such folder, and the hub does not give it ({reason}); download it "
            "where there is a connection and give the folder"
        ) from None
    if not any(found.glob("model*.safetensors")):
        raise CheckpointError(
            f"{source}: the repository has no model.safetensors there, and pickles "
            "(pytorch_model.bin) are not read; where the hub has converted it, that stands under a "
            f"pull request (https://huggingface.co/{name}/discussions): {name}@refs/pr/N"
        )
    return found


# --- writing -------------------------------------------------------------------------------------


def write(target: Path, model: LoadedModel) -> None:
    """Writes a folder that transformers opens, also with its detection pipeline.

    It is OWLv2 with an objectness head and OWL-ViT without. Raises `CheckpointError` for a model
    that their code cannot be; what it computes a little differently is logged.
    """
    if model.kind != "detector":
        raise CheckpointError(
            f"a checkpoint of kind {model.kind!r} has no detection heads; only detectors can "
            "be written"
        )
    if model.tokenizer:
        raise CheckpointError(f"{model.tokenizer}: only CLIP's own vocabulary can be written")
    kind = "owlv2" if model.config.has_objectness_head else "owlvit"
    _check_expressible(model.config)
    _log_differences(model)
    parameters = {k: np.asarray(v) for k, v in path_rules.flatten(model.params).items()}
    shapes = _their_shapes(kind, model.config)
    is_contrastive = model.config.contrastive == "softmax"
    tensors = rules.to_theirs(table(kind, is_contrastive), parameters, shapes)
    if lacking := sorted(shapes.keys() - tensors.keys()):
        names = ", ".join(lacking)
        logging.warning("%s: not in our model, written as transformers starts them", names)
        tensors |= _initial(kind, shapes[f"{kind}.visual_projection.weight"])
    target.mkdir(parents=True, exist_ok=True)
    described = _their_config(kind, model.config)
    if model.names:
        described["id2label"] = dict(enumerate(model.names))
        described["label2id"] = {name: index for index, name in enumerate(model.names)}
    _write_json(target / "config.json", described)
    _write_json(target / "preprocessor_config.json", _their_preprocessing(kind, model))
    clip_vocabulary.write(target, max_length=model.config.text.num_positions)
    # The weights come last: a folder that was cut short has none.
    with files.atomic(target / "model.safetensors") as partial:
        save_file(tensors, partial, metadata={"format": "pt"})


def _check_expressible(model: ModelConfig) -> None:
    wanted = {
        "box_bias": (model.box_bias, "both"),
        "embedding_dim": (model.embedding_dim, model.text.width),
        "text.vocabulary_size": (model.text.vocabulary_size, clip_vocabulary.SIZE),
        "text.tokenizer": (model.text.tokenizer, "clip"),
        "text.pooling": (model.text.pooling, "end_token"),
        "text.is_causal": (model.text.is_causal, True),
        "text.projection_bias": (model.text.projection_bias, False),
        "image.pooling": (model.image.pooling, "class_token"),
        "image.pre_norm": (model.image.pre_norm, True),
        "image.patch_bias": (model.image.patch_bias, False),
        "image.last_block": (model.image.last_block, "full"),
    }
    if model.contrastive != "none":
        wanted["contrastive"] = (model.contrastive, "softmax")
        wanted["image.projection"] = (model.image.projection, "linear")
    for key, (value, only) in wanted.items():
        if value != only:
            raise CheckpointError(f"model.{key}: {value}; transformers can only have {only}")


def _log_differences(model: LoadedModel) -> None:
    config, preprocess = model.config, model.preprocess
    if config.head_activation != _HEAD_ACTIVATION:
        logging.warning(
            "model.head_activation: %s; transformers computes gelu (up to 5e-4 apart for each)",
            config.head_activation,
        )
    if config.merge_norm_epsilon != config.norm_epsilon:
        logging.warning(
            "model.merge_norm_epsilon: %g; transformers computes with %g",
            config.merge_norm_epsilon,
            config.norm_epsilon,
        )
    is_theirs = preprocess.geometry == "stretch" and preprocess.resize != "gaussian"
    is_theirs |= preprocess.resize == "gaussian" and preprocess.pad_value == 0
    if not is_theirs:
        logging.warning(
            "preprocess: geometry %s, resize %s, pad_value %g; transformers can do pad, gaussian "
            "and 0, or stretch with bilinear or bicubic: images of other sizes will differ",
            preprocess.geometry,
            preprocess.resize,
            preprocess.pad_value,
        )


def _their_shapes(kind: str, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that their class has."""
    image, text = model.image, model.text
    shapes: dict[str, tuple[int, ...]] = {
        f"{kind}.vision_model.embeddings.class_embedding": (image.width,),
        f"{kind}.vision_model.embeddings.patch_embedding.weight": (
            image.width,
            3,
            image.patch_size,
            image.patch_size,
        ),
        f"{kind}.vision_model.embeddings.position_embedding.weight": (
            1 + (model.image_size // image.patch_size) ** 2,
            image.width,
        ),
        f"{kind}.text_model.embeddings.token_embedding.weight": (text.vocabulary_size, text.width),
        f"{kind}.text_model.embeddings.position_embedding.weight": (text.num_positions, text.width),
        f"{kind}.text_projection.weight": (model.embedding_dim, text.width),
        f"{kind}.visual_projection.weight": (model.embedding_dim, image.width),
        f"{kind}.logit_scale": (),
    }
    vectors = {
        f"{kind}.vision_model.pre_layernorm": image.width,
        f"{kind}.vision_model.post_layernorm": image.width,
        f"{kind}.text_model.final_layer_norm": text.width,
        "layer_norm": image.width,
    }
    matrices = {
        "class_head.dense0": (model.embedding_dim, image.width),
        "class_head.logit_shift": (1, image.width),
        "class_head.logit_scale": (1, image.width),
    }
    for head, outputs in (("box_head", 4), ("objectness_head", 1)):
        if head == "box_head" or model.has_objectness_head:
            for i, rows in enumerate((image.width, image.width, outputs)):
                matrices[f"{head}.dense{i}"] = (rows, image.width)
    for name, tower in (("vision", image), ("text", text)):
        for i in range(tower.num_layers):
            layer = f"{kind}.{name}_model.encoder.layers.{i}"
            vectors |= {f"{layer}.layer_norm1": tower.width, f"{layer}.layer_norm2": tower.width}
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                matrices[f"{layer}.self_attn.{part}"] = (tower.width, tower.width)
            matrices[f"{layer}.mlp.fc1"] = (tower.mlp_width, tower.width)
            matrices[f"{layer}.mlp.fc2"] = (tower.width, tower.mlp_width)
    for name, width in vectors.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for name, (rows, columns) in matrices.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return shapes


def _initial(kind: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """What only contrastive training uses, as their class initialises it; always the same.

    `shape` is the projection's: [embedding_dim, image.width].
    """
    values = np.random.default_rng(0).normal(scale=max(shape[1], 1) ** -0.5, size=shape)
    return {
        f"{kind}.visual_projection.weight": values.astype(np.float32),
        f"{kind}.logit_scale": np.array(_LOGIT_SCALE, np.float32),
    }


def _their_config(kind: str, model: ModelConfig) -> dict[str, Any]:
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
        for name, tower in (("vision", model.image), ("text", model.text))
    }
    return {
        "architectures": ["Owlv2ForObjectDetection" if kind == "owlv2" else _OWLVIT],
        "model_type": kind,
        "projection_dim": model.embedding_dim,
        "logit_scale_init_value": _LOGIT_SCALE,
        "torch_dtype": "float32",
        "vision_config": {
            "model_type": f"{kind}_vision_model",
            "image_size": model.image_size,
            "patch_size": model.image.patch_size,
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


_OWLVIT = "OwlViTForObjectDetection"


def _their_preprocessing(kind: str, model: LoadedModel) -> dict[str, Any]:
    preprocess, side = model.preprocess, model.config.image_size
    is_stretched = preprocess.geometry == "stretch"
    name = "OwlViT" if is_stretched else "Owlv2"
    return {
        "image_processor_type": f"{name}ImageProcessor",
        "processor_class": "Owlv2Processor" if kind == "owlv2" else "OwlViTProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": {"bilinear": 2, "bicubic": 3, "gaussian": 2}[preprocess.resize],
        **({"do_center_crop": False} if is_stretched else {"do_pad": True}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


def _write_json(path: Path, value: Any) -> None:
    files.write_atomic(path, json.dumps(value, indent=2) + "\n")
