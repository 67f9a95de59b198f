"""Conversion tables: exact both ways, and nothing passes unseen."""

import dataclasses

import numpy as np
import pytest

from owl_det.convert import rules
from owl_det.convert.rules import ALL, LAYER, Ignored, Rule, Table
from owl_det.convert.weights import Weights
from owl_det.errors import CheckpointError

SHAPES = {
    "blocks/qkv": (2, 6, 3, 2, 3),  # layers, in, query/key/value, heads, features of a head
    "blocks/bias": (2, 3, 2, 3),
    "patch": (4, 4, 3, 6),
    "out": (2, 3, 6),  # heads, features, out
    "scale": (),
}
TABLE = Table(
    rules=(
        *(
            rule
            for i, name in enumerate("qkv")
            for rule in (
                Rule(f"layers.{{i}}.{name}.w", "blocks/qkv", (LAYER, ALL, i), "linear"),
                Rule(f"layers.{{i}}.{name}.b", "blocks/bias", (LAYER, i), "flat"),
            )
        ),
        Rule("conv", "patch", layout="conv"),
        Rule("o", "out", layout="linear"),
        Rule("scale", "scale"),
    ),
    ignored=(Ignored(r"old\..*", "of no use"),),
)
THEIRS = {
    **{f"layers.{i}.{n}.w": (6, 6) for i in range(2) for n in "qkv"},
    **{f"layers.{i}.{n}.b": (6,) for i in range(2) for n in "qkv"},
    "conv": (6, 3, 4, 4),
    "o": (6, 6),
    "scale": (),
    "old.one": (1,),
}


def _weights(shapes: dict[str, tuple[int, ...]] = THEIRS, **dtypes: str) -> Weights:
    values = {
        name: np.random.default_rng(i).normal(size=shape).astype(np.float32)
        for i, (name, shape) in enumerate(shapes.items())
    }
    names = {name: dtypes.get(name, "float32") for name in shapes}
    return Weights("there", shapes, names, values.__getitem__)


def test_round_trip_is_exact() -> None:
    weights = _weights()
    ours = rules.to_ours(TABLE, weights, SHAPES)
    assert {name: value.shape for name, value in ours.items()} == SHAPES
    back = rules.to_theirs(TABLE, ours, THEIRS)
    assert set(back) == set(THEIRS) - {"old.one"}
    for name, value in back.items():
        np.testing.assert_array_equal(value, weights.read(name))
        assert value.flags.c_contiguous and value.shape == THEIRS[name]


def test_layouts_mean_what_they_say() -> None:
    weights = _weights()
    ours = rules.to_ours(TABLE, weights, SHAPES)
    x = np.random.default_rng(9).normal(size=6).astype(np.float32)
    # A linear map is the same map, its result cut into heads.
    heads = np.einsum("d,dhc->hc", x, ours["blocks/qkv"][1, :, 2])
    np.testing.assert_allclose(heads.ravel(), weights.read("layers.1.v.w") @ x, rtol=1e-5)
    joined = np.einsum("hc,hcd->d", x.reshape(2, 3), ours["out"])
    np.testing.assert_allclose(joined, weights.read("o") @ x, rtol=1e-5)
    assert ours["patch"][1, 2, 0, 5] == weights.read("conv")[5, 0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.0.q.w": None}, r"tensor layers\.0\.q\.w is missing"),
        ({"extra": (3,)}, "unknown tensor extra; nothing was converted"),
        ({"layers.2.q.w": (6, 6)}, r"unknown tensor layers\.2\.q\.w"),
        ({"conv": (6, 3, 4, 5)}, r"conv has shape \(6, 3, 4, 5\), which does not fit patch"),
        ({"o": (6, 7)}, "which does not fit out"),
        ({"o": (36,)}, "which does not fit out"),
        ({"scale": (1,)}, "which does not fit scale"),
        ({"layers.1.k.b": (7,)}, "which does not fit blocks/bias"),
    ],
)
def test_nothing_passes_unseen(change: dict[str, tuple[int, ...] | None], message: str) -> None:
    shapes = {n: s for n, s in {**THEIRS, **change}.items() if s is not None}
    with pytest.raises(CheckpointError, match=message):
        rules.to_ours(TABLE, _weights(shapes), SHAPES)


def test_dtypes_are_checked_before_anything_is_read() -> None:
    weights = dataclasses.replace(_weights(scale="I64"), read=lambda name: pytest.fail("read"))
    with pytest.raises(CheckpointError, match="scale has dtype I64"):
        rules.to_ours(TABLE, weights, SHAPES)


def test_a_table_with_gaps_is_an_error() -> None:
    half = dataclasses.replace(TABLE, rules=TABLE.rules[2:])
    weights = _weights({n: s for n, s in THEIRS.items() if ".q." not in n})
    with pytest.raises(CheckpointError, match="does not fill blocks/qkv"):
        rules.to_ours(half, weights, SHAPES)
    twice = dataclasses.replace(TABLE, rules=(*TABLE.rules, Rule("conv", "patch", layout="conv")))
    with pytest.raises(CheckpointError, match="does not fill patch"):
        rules.to_ours(twice, _weights(), SHAPES)


def test_targets_without_a_place_are_errors() -> None:
    ours = rules.to_ours(TABLE, _weights(), SHAPES)
    with pytest.raises(CheckpointError, match="conv: the target has no such tensor"):
        rules.to_theirs(TABLE, ours, {n: s for n, s in THEIRS.items() if n != "conv"})
    with pytest.raises(CheckpointError, match="o: out .* does not fit"):
        rules.to_theirs(TABLE, ours, {**THEIRS, "o": (6, 7)})
    with pytest.raises(CheckpointError, match="the model has no such parameter"):
        rules.to_ours(TABLE, _weights(), {n: s for n, s in SHAPES.items() if n != "patch"})
