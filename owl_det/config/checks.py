"""Checks of a section's own keys. Each raises `ConfigError` naming the key to change.

`where` is the dotted name of the section, as `config.model.image`.
"""

import re
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from owl_det.errors import ConfigError


@runtime_checkable
class Checked(Protocol):
    """A section of the schema that has rules for its own keys."""

    def check(self, where: str) -> None: ...


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError` with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def positive(section: Any, where: str, *keys: str) -> None:
    for key in keys:
        require(getattr(section, key) > 0, f"{where}.{key}: must be positive")


def not_negative(section: Any, where: str, *keys: str) -> None:
    for key in keys:
        value = getattr(section, key)
        require(value >= 0, f"{where}.{key}: must not be negative, got {value}")


def in_range(section: Any, where: str, *keys: str) -> None:
    """Rates: from 0 to below 1."""
    for key in keys:
        value = getattr(section, key)
        require(0 <= value < 1, f"{where}.{key}: must be in [0, 1), got {value}")


def patterns(values: Iterable[str], key: str) -> None:
    """Each value must be a regular expression."""
    for value in values:
        try:
            re.compile(value)
        except re.error as error:
            raise ConfigError(f"{key}: {value!r} is no regular expression ({error})") from None
