"""The shipped configs, mutated: every key given is in the config that results, or is refused."""

import dataclasses
import importlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from owl_det.config.resolve import resolve
from tests.mutations import harness, trees
from tests.mutations.harness import Case

_NAMES = ("quickstart", "owlv2_b16", "densevlm_b16", "hierkd_b16", "selftrain_bccd", "bccd")
_NAMES += ("finetune", "pretrain_siglip_b16", "pretrain_clip_b16", "clipself_b16", "gridclip_b16")
# What only Python can put into a config.
_OBJECTS = (b"bytes", (1, 2), {1, 2}, 10**400, 1j, np.float32(0.5), np.int64(3), np.zeros(3))
_OBJECTS += (object, len, Path("x"), [[[[[[]]]]]], {1: 2}, {None: 1}, {("a",): "b"}, range(3))
_VALUES = (*trees.VALUES, *_OBJECTS)


@harness.COUNTS
def test_mutated_configs(count: int, tmp_path: Path) -> None:
    harness.check(_case, count, tmp_path / "data")


@pytest.mark.parametrize("name", _NAMES)
def test_the_unmutated_resolve_whole(name: str) -> None:
    tree = _good(name)
    _check_contained(tree, dataclasses.asdict(resolve(tree)), "config")


def _reproduce(seed: int) -> Any:
    return harness.reproduce(_case, seed)


def _case(rng: np.random.Generator, folder: Path) -> Case:
    tree = _good(trees.pick(rng, _NAMES))
    for _ in range(rng.integers(1, 4)):
        section = trees.pick(rng, [k for k, v in tree.items() if isinstance(v, dict) and v])
        if rng.random() < 0.8:  # the large sections would get nearly all
            tree[section] = trees.mutated(tree[section], rng, _VALUES)
        else:
            tree = trees.mutated(tree, rng, _VALUES)

    def verify(config: Any, lines: list[str]) -> None:
        _check_contained(tree, dataclasses.asdict(config), "config")

    return Case(read=lambda: resolve(tree), verify=verify, names=["config"])


def _good(name: str) -> dict[str, Any]:
    tree = importlib.import_module(f"configs.{name}").get_config().to_dict()
    return json.loads(json.dumps(tree))  # lists in place of tuples: mutations know those


def _check_contained(given: Any, resolved: Any, path: str) -> None:
    """Every value given is there; whole numbers may have become floats, lists tuples."""
    if isinstance(given, Mapping):
        for key, value in given.items():
            assert key in resolved, f"{path}.{key} is lost"
            _check_contained(value, resolved[key], f"{path}.{key}")
    elif isinstance(given, (list, tuple)):
        assert len(given) == len(resolved), f"{path}: {given} became {resolved}"
        for i, (a, b) in enumerate(zip(given, resolved, strict=True)):
            _check_contained(a, b, f"{path}[{i}]")
    else:
        is_same = type(given) is type(resolved) or (type(given), type(resolved)) == (int, float)
        is_equal = given == resolved or math.isclose(given, resolved, rel_tol=1e-12)
        assert is_same and is_equal, f"{path}: {given!r} became {resolved!r}"
