"""Reads COCO-like JSON; whatever is not as it should be is named with its place in the file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipelines.readers import folder
from owl_det.errors import DataError


def load(file: Path, key: str = "annotations") -> dict[str, Any]:
    """The JSON object of the file that `key` of a source names; `DataError` if there is none."""
    try:
        content = json.loads(folder.read_file(file, key))
    except ValueError as error:  # malformed JSON, or not UTF-8
        raise DataError(f"{file}: is not valid JSON: {error}; download it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected a JSON object with images, annotations, categories")
    return content


def items(content: Any, key: str, where: Path | str) -> Sequence[Any]:
    """The list under `key`. Raises `DataError`, as all below, if it is missing or none."""
    value = field(content, key, str(where))
    if not isinstance(value, list):
        raise DataError(f"{where}: {key}: expected a list, got {type(value).__name__}")
    return value


def integer(entry: Any, key: str, where: str) -> int:
    value = field(entry, key, where)
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"{where}.{key}: expected an integer, got {value!r}")
    return value


def text(entry: Any, key: str, where: str) -> str:
    value = field(entry, key, where)
    if not isinstance(value, str):
        raise DataError(f"{where}.{key}: expected text, got {value!r}")
    return value


def field(entry: Any, key: str, where: str) -> Any:
    if not isinstance(entry, dict) or key not in entry:
        raise DataError(f"{where}: the field {key} is missing")
    return entry[key]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
