"""Reads COCO-like JSON; whatever is not as it should be is named with its place in the file."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from data_pipelines import garbage_collection
from data_pipelines.readers import folder, foreign_files
from owl_det.errors import DataError

Id: TypeAlias = int | str  # of an image or category, as the file has it
_WHOLE = re.compile(r"-?(0|[1-9]\d{0,300})")  # "007" is a text, not 7
_NUMBER = re.compile(r"[+-]?(\d{1,300}\.?\d{0,300}|\.\d{1,300})([eE][+-]?\d{1,4})?")
_FLAGS = {"": False, "0": False, "1": True, "false": False, "true": True}


def load(file: Path, key: str = "annotations") -> dict[str, Any]:
    """The JSON object of the file that `key` of a source names.

    Raises `DataError` if there is none, naming what the file is instead where that shows; and
    where an object has a key twice, because only one of the two would be read.
    """
    content = folder.read_file(file, key)
    kind = foreign_files.kind_of_bytes(content)
    if kind:
        raise DataError(f"{file}: {kind}")
    try:
        with garbage_collection.paused():
            parsed = json.loads(content, object_pairs_hook=_distinct)
    except RecursionError:
        raise DataError(f"{file}: is nested too deeply for annotations") from None
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 text ({error}); convert it to UTF-8") from None
    except ValueError as error:  # malformed JSON, or a number of thousands of digits
        raise DataError(f"{file}: is not valid JSON: {error}; download it again") from error
    kind = foreign_files.kind_of_json(parsed)
    if kind:
        raise DataError(f"{file}: expected a JSON object with images, annotations, …; {kind}")
    return parsed


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"an object has the key {twice[:60]!r} twice; remove one of them")
    return entries


def items(content: Any, key: str, where: Path | str) -> Sequence[Any]:
    """The list under `key`. Raises `DataError`, as all below, if it is missing or none."""
    value = field(content, key, str(where))
    if not isinstance(value, list):
        raise DataError(f"{where}: {key}: expected a list, got {type(value).__name__}")
    return value


def integer(entry: Any, key: str, where: str) -> int:
    """A whole number: `7`, `7.0` or `"7"`."""
    value = field(entry, key, where)
    whole = as_id(value)
    if not isinstance(whole, int):
        raise DataError(f"{where}.{key}: expected an integer, got {shown(value)}")
    return whole


def identifier(entry: Any, key: str, where: str) -> Id:
    """An id as `as_id` reads it."""
    value = field(entry, key, where)
    found = as_id(value)
    if found is None:
        raise DataError(f"{where}.{key}: expected an id (a number or text), got {shown(value)}")
    return found


def as_id(value: Any) -> Id | None:
    """What a value is as an id; None if it is none.

    Whole numbers are one id however they are written (`3`, `3.0`, `"3"`); other texts are ids as
    they stand.
    """
    if type(value) is int:  # the usual case, a million times over
        return value
    if isinstance(value, str):
        stripped = value.strip()
        return int(stripped) if _WHOLE.fullmatch(stripped) else stripped or None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return None


def number_ids(ids: Iterable[Id], smallest: int) -> dict[Id, int]:
    """A number of 31 bits for every id: its own where that is one, not below `smallest`.

    The others get numbers that are free, from 1, in their order.
    """
    ids = list(ids)
    numbers: dict[Id, int] = {}
    numbers |= {i: i for i in ids if isinstance(i, int) and smallest <= i < 2**31}
    taken = set(numbers.values())
    free = 1
    for other in ids:
        if other in numbers:
            continue
        while free in taken:
            free += 1
        numbers[other] = free
        taken.add(free)
    return numbers


def text(entry: Any, key: str, where: str) -> str:
    value = field(entry, key, where)
    if not isinstance(value, str):
        raise DataError(f"{where}.{key}: expected text, got {shown(value)}")
    if value.encode("utf-8", "replace").decode() != value:
        raise DataError(f"{where}.{key}: {value!r} holds half a character; write it anew as UTF-8")
    return value


def flag(entry: Any, key: str, where: str) -> bool:
    """0 or 1, in any spelling (`0.0`, `"1"`, `false`, `"True"`); False where missing or null."""
    value = entry.get(key)
    if isinstance(value, str) and value.strip().lower() in _FLAGS:
        return _FLAGS[value.strip().lower()]
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    if value is not None:
        raise DataError(f"{where}.{key}: expected 0 or 1, got {shown(value)}")
    return False


def number(value: Any) -> float | None:
    """A number, be it quoted; infinite where a float holds no such number; None if it is none."""
    if isinstance(value, str):
        stripped = value.strip()
        return float(stripped) if _NUMBER.fullmatch(stripped) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def numbers(values: Any) -> list[float] | None:
    """A list of what `number` reads; None if it is none."""
    if not isinstance(values, list):
        return None
    if {*map(type, values)} == {float}:  # the usual case
        return values
    read = [number(value) for value in values]
    return None if None in read else [value for value in read if value is not None]


def size(entry: Any) -> tuple[int, int] | None:
    """`height` and `width`; None where an entry does not say, or says what no image can have."""
    sides = [as_id(entry.get(key)) for key in ("height", "width")]
    height, width = (side if isinstance(side, int) and 0 < side < 2**24 else 0 for side in sides)
    return (height, width) if height and width else None


def field(entry: Any, key: str, where: str) -> Any:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected an object with {key}, got {shown(entry)}")
    if key not in entry:
        raise DataError(f"{where}: the field {key} is missing")
    return entry[key]


def shown(value: Any) -> str:
    """A value of any size, for a message."""
    if isinstance(value, int) and abs(value) >= 10**60:
        return "a number of more than 60 digits"
    try:
        said = repr(value)
    except ValueError:  # a number of thousands of digits inside
        return f"a {type(value).__name__}"
    return said if len(said) <= 100 else f"{said[:100]}…"
