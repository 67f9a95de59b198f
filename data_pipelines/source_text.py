"""A data source in one line of text: `kind=coco,path=…,annotations=…`, keys as in a config."""

import dataclasses
import typing
from typing import Any

from owl_det.config import SourceConfig
from owl_det.config.resolve import data_source
from owl_det.errors import ConfigError

_NUMBERS: dict[str, type[int] | type[float]] = {
    field.name: field.type
    for schema in typing.get_args(SourceConfig)
    for field in dataclasses.fields(schema)
    if field.type in (int, float)
}


def parse_source(text: str, where: str) -> tuple[SourceConfig, str]:
    """`kind=coco,path=…,group=rare` → (the checked source, its group of names; "" = all names).

    `where` names the source in messages. Raises `ConfigError` for text of another form, a key that
    the kind lacks, or a value of a wrong type.
    """
    keys = split_source(text)
    group = str(keys.pop("group", ""))
    return data_source(keys, where), group


def split_source(text: str) -> dict[str, Any]:
    """The keys of the text, numbers where the schema has numbers. Raises `ConfigError`."""
    keys: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or key in keys:
            raise ConfigError(f"{text!r}: expected kind=…,key=value,…,group=… with each key once")
        keys[key] = _number(key, value, text) if key in _NUMBERS else value
    return keys


def _number(key: str, value: str, text: str) -> float:
    try:
        return _NUMBERS[key](value)
    except ValueError:
        raise ConfigError(f"{text!r}: {key}: {value!r} is no {_NUMBERS[key].__name__}") from None
