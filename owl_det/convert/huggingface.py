"""Detectors of Hugging Face's transformers, both ways: `OwlViT…` and `Owlv2ForObjectDetection`.

A folder holds config.json, model.safetensors (or shards with an index), preprocessor_config.json
and the tokeniser's files. Nothing here imports transformers. What its code fixes (GELU with erf in
the heads, one epsilon for every norm, boxes biased to place and size) is written into the config
that is read, and checked or told when writing.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from safetensors.numpy import save_file

from owl_det import files, path_rules
from owl_det.convert import clip_vocabulary, models, rules
from owl_det.convert.hub import find_folder
from owl_det.convert.huggingface_config import (
    DEFAULTS,
    HEAD_ACTIVATION,
    check_expressible,
    config_json,
    model_section,
)
from owl_det.convert.huggingface_parameters import initial_contrastive, table, tensor_shapes
from owl_det.convert.huggingface_preprocessing import (
    check_size,
    preprocess_section,
    preprocessor_json,
)
from owl_det.convert.weights import Weights, open_weights, read_json
from owl_det.errors import CheckpointError
from owl_det.types import LoadedModel

# --- reading -------------------------------------------------------------------------------------


def read(source: str) -> LoadedModel:
    """A detector from a folder, or from the hub if `source` is `owner/name` and no folder.

    Raises `CheckpointError`, naming file and field, for what is missing or does not fit.
    """
    folder = find_folder(source)
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type {kind!r} is not one of {', '.join(DEFAULTS)}"
        )
    weights = open_weights(folder)
    is_contrastive = _is_contrastive(kind, weights)
    model, preprocess = models.resolve(
        {
            **model_section(config, kind, folder / "config.json"),
            "contrastive": "softmax" if is_contrastive else "none",
        },
        preprocess_section(folder / "preprocessor_config.json", kind),
        str(folder),
    )
    check_size(folder / "preprocessor_config.json", model.image_size)
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
    stand_in = initial_contrastive(kind, weights.shapes[projection])
    return not all(np.array_equal(weights.read(name), x) for name, x in stand_in.items())


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
    check_expressible(model.config)
    _log_differences(model)
    parameters = {k: np.asarray(v) for k, v in path_rules.flatten(model.params).items()}
    shapes = tensor_shapes(kind, model.config)
    is_contrastive = model.config.contrastive == "softmax"
    tensors = rules.to_theirs(table(kind, is_contrastive), parameters, shapes)
    if lacking := sorted(shapes.keys() - tensors.keys()):
        names = ", ".join(lacking)
        logging.warning("%s: not in our model, written as transformers starts them", names)
        tensors |= initial_contrastive(kind, shapes[f"{kind}.visual_projection.weight"])
    target.mkdir(parents=True, exist_ok=True)
    described = config_json(kind, model.config)
    if model.names:
        described["id2label"] = dict(enumerate(model.names))
        described["label2id"] = {name: index for index, name in enumerate(model.names)}
    _write_json(target / "config.json", described)
    _write_json(target / "preprocessor_config.json", preprocessor_json(kind, model))
    clip_vocabulary.write(target, max_length=model.config.text.num_positions)
    # The weights come last: a folder that was cut short has none.
    with files.atomic(target / "model.safetensors") as partial:
        save_file(tensors, partial, metadata={"format": "pt"})


def _log_differences(model: LoadedModel) -> None:
    config, preprocess = model.config, model.preprocess
    if config.head_activation != HEAD_ACTIVATION:
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


def _write_json(path: Path, value: Any) -> None:
    files.write_atomic(path, json.dumps(value, indent=2) + "\n")
