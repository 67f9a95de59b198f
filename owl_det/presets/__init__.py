"""What configs share: the schema's defaults here, and recipes in the modules of this package.

A config starts from `base()`, takes the recipes that it follows, and sets what is its own:

    config = presets.base()
    detectors.use_lvis(config)
    config.num_steps = 1000

Every assignment is checked: an unknown key or a wrong type raises in the line that has it.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from owl_det.config import Config, SourceConfig


def base() -> ConfigDict:
    """All keys with their defaults. Unknown keys and wrong types raise where they are assigned."""
    return ConfigDict(dataclasses.asdict(Config())).lock()


def add_source(group: ConfigDict, name: str, source: SourceConfig) -> None:
    """Adds a data source to `config.data.train` or `config.data.eval`."""
    with group.unlocked():
        group[name] = ConfigDict(dataclasses.asdict(source)).lock()


def use_little_memory(config: Any) -> None:
    """Activations in bfloat16, which the backward pass computes again."""
    config.model.dtype = "bfloat16"
    config.model.remat = "full"


def use_no_names(config: Any) -> None:
    """The training asks for no names of objects."""
    config.data.max_instances = 1
    config.data.max_queries = 1
    config.data.min_queries = 0
    config.data.train_prompts = "none"
