"""The model settings that a training takes from the checkpoint it starts from."""

import dataclasses
import operator
import os
import re
from typing import Any

from owl_det.checkpoints import run_file, step_folders
from owl_det.config import Config, ModelConfig
from owl_det.config.resolve import resolve
from owl_det.config.roles import keys_of
from owl_det.errors import CheckpointError, ConfigError
from owl_det.types import LoadedModel


def take_model(config: Config, workdir: str | os.PathLike[str]) -> Config:
    """The config with architecture, preprocessing and tokeniser of the checkpoint it starts from.

    Returns `config` itself unless `checkpoint.model_from_init` is set. A run that goes on takes
    them from its own latest checkpoint. What concerns training only stays as it is, and so do
    `model.image.last_block` where it is "values", `model.has_objectness_head` where
    `checkpoint.fresh` names that head, and the heads' settings where the checkpoint has towers
    only; such towers keep at most as many text positions as `model.text.num_positions` says if they
    pool at the end token. Raises `CheckpointError` if there is no checkpoint and
    `ConfigError` if the result does not fit.
    """
    if not config.checkpoint.model_from_init:
        return config
    if not config.checkpoint.init_from:
        raise ConfigError("config.checkpoint.init_from: model_from_init needs a checkpoint")
    is_resumed = step_folders.has_checkpoint(workdir)
    source = run_file.describe(
        step_folders.find(workdir if is_resumed else config.checkpoint.init_from)
    )
    if source.kind == "resnet":
        raise CheckpointError(f"{config.checkpoint.init_from}: a ResNet is a teacher, no start")
    tree = dataclasses.asdict(config)
    tree["model"] = _inherited(source, config)
    tree["preprocess"] = dataclasses.asdict(source.preprocess)
    tree["data"]["tokenizer"] = config.data.tokenizer or source.tokenizer
    return resolve(tree)


def _inherited(source: LoadedModel, config: Config) -> dict[str, Any]:
    """The settings of the checkpoint's model, with those that stay as the config says."""
    model, ours = dataclasses.asdict(source.config), config.model
    kept = list(keys_of(ModelConfig, "training", "execution"))
    if source.kind == "towers":
        kept += keys_of(ModelConfig, "architecture", part="head")
    if ours.image.last_block == "values":  # asked for; the parameters serve both
        kept.append("image.last_block")
    if any(re.match(pattern, "objectness_head/") for pattern in config.checkpoint.fresh):
        kept.append("has_objectness_head")
    for key in kept:
        tower, _, name = key.rpartition(".")
        (model[tower] if tower else model)[name] = operator.attrgetter(key)(ours)
    if source.kind == "towers" and source.config.text.pooling == "end_token":
        model["text"]["num_positions"] = min(
            source.config.text.num_positions, ours.text.num_positions
        )
    if config.checkpoint.image_size:
        model["image_size"] = config.checkpoint.image_size
    return model
