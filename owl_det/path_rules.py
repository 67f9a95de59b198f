"""Parameters by their paths, and ordered tables: pattern of a path → value (group, sharding)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
from jaxtyping import PyTree

from owl_det.errors import CheckpointError, ConfigError

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


def flatten(tree: PyTree) -> dict[str, Any]:
    """The leaves by `path_name`, in the tree's order. Inverse of `unflatten`.

    Raises `CheckpointError` if two leaves have one name, as where a key holds a slash.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    by_name = {path_name(path): leaf for path, leaf in leaves}
    if len(by_name) < len(leaves):
        names = [path_name(path) for path, _ in leaves]
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"two parameters are called {twice}")
    return by_name


def unflatten(leaves: Mapping[str, T]) -> dict[str, Any]:
    """Nested dicts of leaves whose names are paths, such as `image/transformer/blocks/qkv/kernel`.

    Raises `CheckpointError` for a name with an empty part, and for one that goes on below a leaf.
    """
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        if not all((*folders, last)):
            raise CheckpointError(f"parameter {name!r}: a part of its name is empty")
        node: Any = tree
        for folder in folders:
            node = node.setdefault(folder, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last in node:
            raise CheckpointError(f"parameter {name}: is another one's folder, or lies in one")
        node[last] = leaf
    return tree
