"""Values of Hugging Face's JSON files, checked for their type before they are used.

`where` begins every message: the file, and the section as in "config.json: vision_config.".
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from owl_det.errors import CheckpointError

MAX_SIZE = 2**20  # of a width, a number of layers, a vocabulary


def section(where: str, tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A JSON object; empty where it is absent or null."""
    value = tree.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where}{key}: expected an object, got {_shown(value)}")
    return value


def setting(where: str, tree: Mapping[str, Any], key: str, default: Any) -> Any:
    """A value of the type of `default`, which stands for what is left out.

    Raises `CheckpointError` for another type, a number that is not finite, and a size that is not
    positive or absurdly large.
    """
    if key not in tree:
        return default
    value = tree[key]
    if isinstance(default, float) and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not type(default):
        raise CheckpointError(
            f"{where}{key}: expected {type(default).__name__}, got {_shown(value)}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise CheckpointError(f"{where}{key}: expected a finite number, got {value}")
    if type(value) is int and value < 1:
        raise CheckpointError(f"{where}{key}: must be positive, got {value}")
    if type(value) is int and value > MAX_SIZE:
        raise CheckpointError(f"{where}{key}: {str(value)[:30]} is absurdly large")
    return value


def switch(where: str, tree: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false; `default` where it is absent or null."""
    value = tree.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"{where}{key}: expected true or false, got {_shown(value)}")
    return value


def three_numbers(
    where: str, tree: Mapping[str, Any], key: str, default: Sequence[float]
) -> list[float]:
    """A number for each channel; `default` where they are absent or null."""
    value = tree.get(key)
    if value is None:
        return list(default)
    is_list = isinstance(value, list) and len(value) == 3
    if not is_list or not all(type(x) in (int, float) and abs(x) < 1e6 for x in value):
        raise CheckpointError(f"{where}{key}: expected three numbers, got {_shown(value)}")
    return [float(x) for x in value]


def choice(
    where: str, tree: Mapping[str, Any], key: str, choices: Mapping[int, str], default: str
) -> str:
    """What a number stands for; `default` where it is absent or null."""
    value = tree.get(key)
    if value is None:
        return default
    if type(value) is not int or value not in choices:
        known = ", ".join(f"{number} ({name})" for number, name in choices.items())
        raise CheckpointError(f"{where}{key}: {_shown(value)} is not one of {known}")
    return choices[value]


def _shown(value: Any) -> str:
    """Type and value, cut short."""
    kind = {"NoneType": "null", "dict": "object"}.get(type(value).__name__, type(value).__name__)
    # Integers of thousands of digits have no text.
    text = "a huge number" if type(value) is int and abs(value) > 2**64 else repr(value)[:60]
    return kind if value is None else f"{kind} {text}"
