"""Mutations of trees of mappings, lists and values: JSON, YAML and configs."""

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import yaml

_DEEP, _DIGITS = "@deep@", "@digits@"  # what no Python tree can hold; see `as_json`

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 100, 2**31, -(2**31) - 1, 2**53 + 1, 2**63, 2**64, 10**30),
    *(0.5, -0.5, -0.0, 1e-300, 1e300, 1e308, -1e308, 3.0, float("nan"), float("inf")),
    *("", " ", "0", "1", "-1", "12.5", "nan", "inf", "1e400", "true", "false", "null", "None"),
    *("cat", "\ufeffcat", "cat\n", "e\u0301", "\u00e9", "\ud800", "a\0b", "x" * 3000, "😀", "٣"),
    *("../../x", "/etc/passwd", "C:\\a\\b", "https://host/a.jpg", "~", ".", "a/b", "%s {} {0}"),
    *([], {}, [[]], [{}], [None], [0, 0], [1, 2, 3, 4], [1, 2, 3, 4, 5], ["1", "2", "3", "4"]),
    *({"a": 1}, {"": ""}, {"id": 1}, _DEEP, _DIGITS),
)


def mutated(tree: Any, rng: np.random.Generator, values: tuple[Any, ...] = VALUES) -> Any:
    """A copy with one random change anywhere below its root; a root that is a value is replaced."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree)) if isinstance(tree, (dict, list)) else []
    if not places:
        return pick(rng, values)
    parent, key = places[rng.integers(len(places))]
    change = pick(rng, _CHANGES)
    change(parent, key, rng, values)
    return tree


def pick(rng: np.random.Generator, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def as_json(tree: Any, rng: np.random.Generator) -> str:
    """JSON text; placeholders of `VALUES` become what Python would refuse to write."""
    depth = pick(rng, (40, 1100, 100_000))
    text = json.dumps(tree, ensure_ascii=bool(rng.random() < 0.8 or _has_surrogates(tree)))
    text = text.replace(f'"{_DEEP}"', "[" * depth + "]" * depth)
    return text.replace(f'"{_DIGITS}"', "9" * int(pick(rng, (400, 5000))))


def as_yaml(tree: Any, rng: np.random.Generator) -> str:
    """YAML text, as `as_json`."""
    depth = pick(rng, (40, 1100, 100_000))
    text = yaml.safe_dump(tree, sort_keys=False, default_flow_style=pick(rng, (None, True, False)))
    text = text.replace(f"'{_DEEP}'", "[" * depth + "]" * depth)
    return text.replace(f"'{_DIGITS}'", "9" * int(pick(rng, (400, 5000))))


def _has_surrogates(tree: Any) -> bool:
    return "\\ud800" in json.dumps(tree)


def _places(tree: Any) -> Any:
    """Every (container, key) of the tree."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(pairs):
        yield tree, key
        if isinstance(value, (dict, list)) and value:
            yield from _places(value)


def _replace(parent: Any, key: Any, rng: np.random.Generator, values: tuple[Any, ...]) -> None:
    parent[key] = copy.deepcopy(pick(rng, values))


def _delete(parent: Any, key: Any, rng: np.random.Generator, values: tuple[Any, ...]) -> None:
    del parent[key]


def _double(parent: Any, key: Any, rng: np.random.Generator, values: tuple[Any, ...]) -> None:
    if isinstance(parent, list):
        parent.insert(int(rng.integers(len(parent) + 1)), copy.deepcopy(parent[key]))
    else:
        parent[f"{key}{pick(rng, ('2', ' ', '_', 's'))}"] = copy.deepcopy(parent[key])


def _rename(parent: Any, key: Any, rng: np.random.Generator, values: tuple[Any, ...]) -> None:
    if isinstance(parent, list):
        rng.shuffle(parent)
        return
    name = str(key)
    names = (name.upper(), name.title(), name[:-1], f"{name}s", name.replace("_", ""), f" {name}")
    parent[pick(rng, (*names, "", "\ufeff" + name))] = parent.pop(key)


def _retype(parent: Any, key: Any, rng: np.random.Generator, values: tuple[Any, ...]) -> None:
    value = parent[key]
    if isinstance(value, bool):
        options: tuple[Any, ...] = (int(value), str(value), str(value).lower(), [value], None)
    elif isinstance(value, (int, float)):
        options = (
            str(value),
            f" {value} ",
            -value,
            value * 1000,
            value + 0.5,
            [value],
            bool(value),
        )
    elif isinstance(value, str):
        options = (value.upper(), f" {value}", value[:-1], value + "\n", [value], {"name": value})
        options += (
            value.encode("utf-8", "replace").decode("latin-1"),
            value.replace(" ", "_"),
            "\ufeff" + value,
        )
    elif isinstance(value, list):
        options = (value[:-1], value * 2, [value], dict(enumerate(map(str, value))), None, tuple())
    elif isinstance(value, dict):
        options = (list(value.values()), list(value), [value], None, str(value)[:50])
    else:
        options = (0, "", [], {})
    parent[key] = copy.deepcopy(pick(rng, options))


def _move(parent: Any, key: Any, rng: np.random.Generator, values: tuple[Any, ...]) -> None:
    """Takes the value of a neighbour."""
    keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
    parent[key] = copy.deepcopy(parent[pick(rng, keys)])


_Change = Callable[[Any, Any, np.random.Generator, tuple[Any, ...]], None]
_CHANGES: tuple[_Change, ...] = (_replace, _replace, _delete, _double, _rename, _retype, _retype)
_CHANGES += (_move,)
