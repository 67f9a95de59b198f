"""Parameters by their paths."""

from typing import Any

import numpy as np
import pytest

from owl_det import path_rules
from owl_det.errors import CheckpointError


def test_a_tree_and_its_paths_are_one() -> None:
    tree = {"b": {"kernel": np.ones(2)}, "a": {"c": {"bias": np.zeros(3)}, "scale": np.ones(1)}}
    leaves = path_rules.flatten(tree)
    assert list(leaves) == ["a/c/bias", "a/scale", "b/kernel"]
    assert leaves["b/kernel"] is tree["b"]["kernel"]
    assert path_rules.unflatten(leaves) == tree
    assert path_rules.unflatten({}) == {}


def test_two_parameters_of_one_name_are_refused() -> None:
    with pytest.raises(CheckpointError, match="^two parameters are called a/b$"):
        path_rules.flatten({"a": {"b": 1}, "a/b": 2, "c": 3})


@pytest.mark.parametrize(
    ("leaves", "named"),
    [
        ({"a": 1, "a/b": 2}, "a/b: is another one's folder, or lies in one"),
        ({"a": 1, "a/b/c": 2}, "a/b/c: is another one's folder, or lies in one"),
        ({"a/b": 1, "a": 2}, "a: is another one's folder, or lies in one"),
        ({"": 1}, "'': a part of its name is empty"),
        ({"a//b": 1}, "'a//b': a part of its name is empty"),
        ({"a/": 1}, "'a/': a part of its name is empty"),
    ],
)
def test_names_that_are_no_tree_are_refused(leaves: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        path_rules.unflatten(leaves)
    assert str(raised.value) == f"parameter {named}"
