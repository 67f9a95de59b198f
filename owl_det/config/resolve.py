"""From what a config file says to a checked `Config`: unknown keys, types, ranges, contradictions.

A typo fails here, before any data is read; every message names the key to change. What a section
asks of its own keys stands beside them, as its `check`; `between_sections` holds the other rules.
"""

import dataclasses
import difflib
import re
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from owl_det import files
from owl_det.config import Config, ModelConfig, PreprocessConfig, SourceConfig
from owl_det.config.checks import Checked, require
from owl_det.errors import ConfigError, UserError

T = TypeVar("T")

_MAX_INTEGER = 2**32 - 1  # more than any key can mean, and all that arrays and seeds hold
_MAX_FLOAT = (2 - 2**-23) * 2.0**127  # of 32 bits


def resolve(tree: Mapping[str, Any]) -> Config:
    """Builds a checked `Config` from a nested mapping.

    Missing keys take their defaults. Raises `ConfigError`, naming the key, on an unknown key, a
    wrong type, a value out of range, or values that contradict each other.
    """
    # Imported here: what a checkpoint holds is a section or two, with no rules between them.
    from owl_det.config.between_sections import check_between_sections

    config = section(Config, tree, "config")
    check_between_sections(config)
    return config


def typed(tree: Mapping[str, Any]) -> Config:
    """As `resolve`, but what concerns several keys or a range is not checked yet."""
    return _build(Config, tree, "config")


def section(schema: type[T], tree: Mapping[str, Any], where: str) -> T:
    """One section of the schema alone, built and checked.

    `where` is its name in messages. Raises `ConfigError` as `resolve`, but knows no other section.
    """
    made = _build(schema, tree, where)
    _check_section(made, where)
    return made


def data_source(tree: Mapping[str, Any], where: str) -> SourceConfig:
    """A data source of any kind, built and checked. Raises `ConfigError` as `section`."""
    made = _build(SourceConfig, tree, where)
    _check_section(made, where)
    return made


def resolve_model(
    model: Mapping[str, Any], preprocess: Mapping[str, Any]
) -> tuple[ModelConfig, PreprocessConfig]:
    """The two sections that travel with every checkpoint and export. Raises as `section`."""
    return (
        section(ModelConfig, without_former_keys(model), "config.model"),
        section(PreprocessConfig, preprocess, "config.preprocess"),
    )


def without_former_keys(model: Any) -> Any:
    """The settings of a model in a written file, without the keys that version 0.1 had beside.

    It described a ResNet next to the image tower, of which only a teacher made use. What is not a
    group of keys stays as it is: the schema refuses it.
    """
    if not isinstance(model, Mapping):
        return model
    return {key: value for key, value in model.items() if key != "resnet"}


def _build(schema: Any, value: Any, path: str) -> Any:
    """Converts `value` to `schema`, a type annotation of the schema."""
    origin, args = typing.get_origin(schema), typing.get_args(schema)
    if dataclasses.is_dataclass(schema):
        return _build_dataclass(schema, value, path)
    if origin in (typing.Union, types.UnionType):
        return _build_by_kind(args, value, path)
    if origin is Literal:
        if type(value) not in map(type, args) or value not in args:
            raise ConfigError(f"{path}: {value!r} is not one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}: expected a list, got {_describe(value)}")
        return tuple(_build(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected a mapping, got {_describe(value)}")
        return {
            _name(key, path): _build(args[1], item, f"{path}.{key}") for key, item in value.items()
        }
    return _build_leaf(schema, value, path)


def _build_leaf(schema: type, value: Any, path: str) -> Any:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if is_integer and abs(value) > _MAX_INTEGER and schema in (int, float):
        raise ConfigError(f"{path}: must be at most {_MAX_INTEGER}")
    if schema is float and is_integer:
        return float(value)
    if type(value) is not schema:
        raise ConfigError(f"{path}: expected {schema.__name__}, got {_describe(value)}")
    if schema is float and not abs(value) <= _MAX_FLOAT:
        raise ConfigError(f"{path}: expected a finite number of 32 bits, got {value}")
    return _build_text(value, path) if isinstance(value, str) else value


def _build_text(value: str, path: str) -> str:
    """A text as it is, but for `~/`, the home folder; no shell replaces that after a `=`."""
    if "\0" in value or not _is_unicode(value):
        raise ConfigError(f"{path}: {value!r} holds characters that no text or path has")
    try:
        local = files.local(value, path)
    except UserError as error:
        raise ConfigError(str(error)) from None
    return str(local) if value.startswith("~/") else value


def _is_unicode(value: str) -> bool:
    """False for half of a surrogate pair, as JSON can hold it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _name(key: Any, path: str) -> str:
    """The name of a source or branch; files of the workdir carry it."""
    if not isinstance(key, str) or not re.fullmatch(r"[^\s./\\][^./\\\0]*", key):
        raise ConfigError(
            f"{path}: {key!r} is no name; give one without '.', '/' and '\\', as files carry it"
        )
    return key


def _build_dataclass(schema: Any, value: Any, path: str, known: str = "known") -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: expected a group of keys, got {_describe(value)}")
    hints = typing.get_type_hints(schema)
    for key in value:
        if not isinstance(key, str) or key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"; did you mean {path}.{near[0]}?" if near else f"; {known}: {', '.join(hints)}"
            raise ConfigError(f"{path}.{key}: no such key{hint}")
    usual = {
        field.name: getattr(field.default_factory, "kind", None)
        for field in dataclasses.fields(schema)
    }
    made = {}
    for key, item in value.items():
        if usual[key] is not None and isinstance(item, Mapping) and "kind" not in item:
            item = {"kind": usual[key], **item}
        made[key] = _build(hints[key], item, f"{path}.{key}")
    return schema(**made)


def _build_by_kind(schemas: tuple[Any, ...], value: Any, path: str) -> Any:
    by_kind = {schema.kind: schema for schema in schemas}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: expected a group of keys, got {_describe(value)}")
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in by_kind:
        raise ConfigError(f"{path}.kind: {kind!r} is not one of {', '.join(by_kind)}")
    return _build_dataclass(by_kind[kind], value, path, f"known of kind {kind}")


def _describe(value: Any) -> str:
    text = textwrap.shorten(repr(value), 100, placeholder=" …")
    return f"{type(value).__name__} {text}"


# --- checks --------------------------------------------------------------------------------------


def _check_section(section: Any, where: str) -> None:
    """The rules of a section and of those within it, innermost first."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        entries = value.items() if isinstance(value, dict) else [("", value)]
        for name, entry in entries:
            if dataclasses.is_dataclass(entry):
                _check_section(entry, ".".join(filter(None, (where, field.name, name))))
    if isinstance(section, Checked):
        section.check(where)


def check_attention(model: ModelConfig, platform: str) -> None:
    """Raises `ConfigError` where the devices cannot compute `model.attention`.

    Not part of `resolve`: checkpoints of other machines have a config too.
    """
    if model.attention != "cudnn":
        return
    require(platform == "gpu", "config.model.attention: cudnn needs an NVIDIA GPU; use xla")
    require(
        model.dtype == "bfloat16",
        "config.model.attention: cudnn computes in bfloat16; set config.model.dtype to it, or xla",
    )
