"""The start of every config: the schema's defaults as a locked ConfigDict."""

import dataclasses

from ml_collections import ConfigDict

from owl_det import config as schema


def default() -> ConfigDict:
    """All keys with their defaults. Unknown keys and wrong types raise where they are assigned."""
    return ConfigDict(dataclasses.asdict(schema.Config())).lock()


def add_source(group: ConfigDict, name: str, source: schema.SourceConfig) -> None:
    """Adds a data source to `config.data.train` or `config.data.eval`."""
    with group.unlocked():
        group[name] = ConfigDict(dataclasses.asdict(source)).lock()
