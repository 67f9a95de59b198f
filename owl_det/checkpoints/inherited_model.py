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
    pool at the end token. Raises `CheckpointError` if there is no checkpoint and `ConfigError` if
    the result does not fit, or leaves out a key of `config.model` that was set.
    """
    if not config.checkpoint.model_from_init:
        return config
    if not config.checkpoint.init_from:
        raise ConfigError("config.checkpoint.init_from: model_from_init needs a checkpoint")
    is_resumed = step_folders.has_checkpoint(workdir)
    source = run_file.describe(
        step_folders.find(workdir if is_resumed else config.checkpoint.init_from)
    )
    if source.is_resnet:
        raise CheckpointError(f"{config.checkpoint.init_from}: a ResNet is a teacher, no start")
    tree = dataclasses.asdict(config)
    tree["model"] = _inherited(source, config)
    _check_nothing_set_is_dropped(config, tree["model"])
    tree["preprocess"] = dataclasses.asdict(source.preprocess)
    tree["data"]["tokenizer"] = config.data.tokenizer or source.tokenizer
    return resolve(tree)


def _inherited(source: LoadedModel, config: Config) -> dict[str, Any]:
    """The settings of the checkpoint's model, with those that stay as the config says."""
    model, ours = dataclasses.asdict(source.config), config.model
    kept = list(keys_of(ModelConfig, "training", "execution"))
    if source.kind == "towers":
        kept += keys_of(ModelConfig, "architecture", part="head")
    if ours.vit.last_block == "values":  # asked for; the parameters serve both
        kept.append("image.last_block")
    if any(re.match(pattern, "objectness_head/") for pattern in config.checkpoint.fresh):
        kept.append("has_objectness_head")
    for key in kept:
        section, name = _place(model, key)
        section[name] = operator.attrgetter(key)(ours)
    if source.kind == "towers" and source.config.text.pooling == "end_token":
        model["text"]["num_positions"] = min(
            source.config.text.num_positions, ours.text.num_positions
        )
    if config.checkpoint.image_size:
        model["image_size"] = config.checkpoint.image_size
    return model


def _check_nothing_set_is_dropped(config: Config, inherited: dict[str, Any]) -> None:
    """Raises `ConfigError` naming a key of `config.model` that was set and is not what is taken.

    A key was set if its value is not the schema's default. Two keys are upper bounds or have a
    stand-in: `text.num_positions` and, with `checkpoint.image_size`, `image_size`.
    """
    standard = ModelConfig()
    replaced = {"text.num_positions"} | ({"image_size"} if config.checkpoint.image_size else set())
    for key in keys_of(ModelConfig, "architecture"):
        section, name = _place(inherited, key)
        value, default = (operator.attrgetter(key)(model) for model in (config.model, standard))
        if key not in replaced and value not in (default, section[name]):
            is_size = key == "image_size"
            remedy = "set config.checkpoint.image_size instead" if is_size else "leave it out"
            raise ConfigError(
                f"config.model.{key}: {value!r} would have no effect, as "
                f"config.checkpoint.model_from_init takes the {section[name]!r} of the checkpoint; "
                f"{remedy}, or unset model_from_init"
            )


def _place(model: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The section that a dotted key of the model lies in, and its name there."""
    section, _, name = key.rpartition(".")
    return (model[section] if section else model), name
