"""The role of each key of a model: what it decides, and what may change around a checkpoint.

architecture  what the parameters mean: a checkpoint's value goes with its parameters
training      noise, the start and the contrastive loss: the parameters mean the same
execution     precision, speed and memory: the parameters mean the same
"""

import dataclasses
from typing import Any, Literal, TypeVar, cast

Role = Literal["architecture", "training", "execution"]
T = TypeVar("T")


def architecture(default: T, *, is_compared: bool = False, part: str = "") -> T:
    """A key of the architecture, with its default, as a field of a dataclass.

    `is_compared`: no parameter's shape shows the key, so that its values are compared where
    parameters are taken over. `part` is "head" for keys of the detection heads.
    """
    return _field(default, role="architecture", is_compared=is_compared, part=part)


def training(default: T) -> T:
    """A key that concerns training only, with its default, as a field of a dataclass."""
    return _field(default, role="training")


def execution(default: T) -> T:
    """A key that says how the model is computed, with its default, as a field of a dataclass."""
    return _field(default, role="execution")


def keys_of(schema: type, *roles: Role, **marks: Any) -> tuple[str, ...]:
    """Dotted keys of a schema whose role is one of `roles`, in its order.

    `marks` narrow them down to keys marked so: `part="head"`, `is_compared=True`.
    """
    found: list[str] = []
    for field in dataclasses.fields(schema):
        nested = field.default_factory
        if isinstance(nested, type) and dataclasses.is_dataclass(nested):
            found += [f"{field.name}.{key}" for key in keys_of(nested, *roles, **marks)]
        elif field.metadata.get("role") in roles and _has(field.metadata, marks):
            found.append(field.name)
    return tuple(found)


def _has(metadata: Any, marks: dict[str, Any]) -> bool:
    return all(metadata.get(name) == value for name, value in marks.items())


def _field(default: T, **metadata: Any) -> T:
    return cast(T, dataclasses.field(default=default, metadata=metadata))
