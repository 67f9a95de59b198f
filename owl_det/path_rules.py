"""Ordered tables: pattern of a parameter's path → value (optimiser group, sharding, start)."""

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
from jaxtyping import PyTree

from owl_det.errors import ConfigError

T = TypeVar("T")


def path_name(path: Sequence[Any]) -> str:
    """`image/transformer/blocks/qkv/kernel` from a key path of `jax.tree_util`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def apply_rules(
    tree: PyTree, rules: Sequence[tuple[str, T]], *, optional: Sequence[str] = ()
) -> PyTree:
    """The value of the first rule whose pattern is found in each leaf's path.

    Raises `ConfigError` for a leaf that no rule fits, and for a rule that fits no leaf (unless
    its pattern is in `optional`): a typo in a pattern must not pass in silence.
    """
    used: set[str] = set()

    def value_of(path: Sequence[Any], _: Any) -> T:
        name = path_name(path)
        fitting = [(pattern, value) for pattern, value in rules if re.search(pattern, name)]
        if not fitting:
            raise ConfigError(f"no rule fits parameter {name}; add one to the table")
        used.update(pattern for pattern, _ in fitting)
        return fitting[0][1]

    values = jax.tree_util.tree_map_with_path(value_of, tree)
    for pattern, _ in rules:
        if pattern not in used and pattern not in optional:
            names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
            raise ConfigError(f"pattern {pattern!r} fits no parameter; there are {names[:5]} …")
    return values
