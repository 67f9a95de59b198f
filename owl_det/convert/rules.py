"""Tables that map the tensors of another format to our parameters, in both directions.

A `Rule` names one of their tensors and the place of its values in ours: a path, an index into the
parameter there (our layers are stacked, and query, key and value share one parameter) and a layout
that rearranges the values. A table is an ordered list of rules. Nothing passes unseen: a tensor
that is missing, unknown or misshapen is an error that names it.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from absl import logging

from owl_det.checkpoints import finite
from owl_det.convert.weights import FLOATS, Weights
from owl_det.errors import CheckpointError

LAYER = "{i}"  # stands for the layer number in a name
ALL = slice(None)

Index: TypeAlias = tuple[Any, ...]  # numbers, slices, and LAYER

# How the values of their tensor become ours ("theirs → ours"):
#   same        as they are
#   flat        reshaped: [heads · c] → [heads, c]
#   linear      PyTorch's [out, in] → [in, out], then reshaped: either may be split into heads
#   conv        PyTorch's [out, in, h, w] → [h, w, in, out]
Layout = Literal["same", "flat", "linear", "conv"]


@dataclass(frozen=True)
class Rule:
    """Their tensor `theirs` holds the values of our parameter `ours` at `index`."""

    theirs: str  # may hold `{i}`, the layer
    ours: str  # path with slashes
    index: Index = ()  # () = the whole parameter; "{i}" = the layer
    layout: Layout = "same"


@dataclass(frozen=True)
class Ignored:
    """Tensors of theirs that we have no use for; `reason` is logged."""

    pattern: str  # regular expression of the whole name
    reason: str


@dataclass(frozen=True)
class Table:
    """Ordered rules, and what of theirs is left out on purpose."""

    rules: tuple[Rule, ...]
    ignored: tuple[Ignored, ...] = ()


def to_ours(
    table: Table, weights: Weights, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Reads every tensor of `weights` into float32 parameters of the given `shapes`, by path.

    All names and shapes are checked before anything is allocated. Raises `CheckpointError`, naming
    the tensor, if one that a rule wants is missing, one that no rule knows is there, a shape does
    not fit, a value is NaN or infinite, or a parameter is left without values.
    """
    _check_layers(table, weights, shapes)
    placed = list(_expand(table, shapes))
    _check_names(table, weights, placed)
    _check_covered(placed, shapes, weights.source)
    for rule in placed:
        _check_shape(rule, weights, shapes)
    parameters = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
    for rule in placed:
        read = weights.read(rule.theirs)
        finite.refuse(weights.source, f"tensor {rule.theirs}", read)
        values = _rearranged(read, rule.layout)
        slot = parameters[rule.ours][rule.index].shape
        parameters[rule.ours][rule.index] = values.reshape(slot)
    return parameters


def to_theirs(
    table: Table, parameters: Mapping[str, np.ndarray], their_shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """The inverse: one float32 tensor for every rule, bit by bit the values of `parameters`.

    `their_shapes` are those that the other program expects. Raises `CheckpointError` where a shape
    does not fit or the other program has no tensor of a rule's name.
    """
    shapes = {path: value.shape for path, value in parameters.items()}
    tensors = {}
    for rule in _expand(table, shapes):
        if rule.theirs not in their_shapes:
            raise CheckpointError(f"{rule.theirs}: the target has no such tensor ({rule.ours})")
        shape = their_shapes[rule.theirs]
        values = np.asarray(parameters[rule.ours])[rule.index]
        if values.size != np.prod(shape, dtype=np.int64):
            raise CheckpointError(f"{rule.theirs}: {rule.ours} {values.shape} does not fit {shape}")
        tensors[rule.theirs] = np.array(
            _restored(values, rule.layout, shape), np.float32, order="C"
        )
    return tensors


def _expand(table: Table, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Rule]:
    """Every rule, once for each layer; the index has numbers and slices only."""
    for rule in table.rules:
        if rule.ours not in shapes:
            raise CheckpointError(f"{rule.ours}: the model has no such parameter ({rule.theirs})")
        if LAYER not in rule.theirs:
            yield rule
            continue
        axis = rule.index.index(LAYER)
        for layer in range(shapes[rule.ours][axis]):
            index = tuple(layer if item == LAYER else item for item in rule.index)
            yield dataclasses.replace(
                rule, theirs=rule.theirs.replace(LAYER, str(layer)), index=index
            )


def _check_layers(table: Table, weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A number of layers that the file cannot hold is found before rules are made for each."""
    for rule in table.rules:
        if LAYER in rule.theirs and rule.ours in shapes:
            num_layers = shapes[rule.ours][rule.index.index(LAYER)]
            if num_layers > len(weights.shapes):
                raise CheckpointError(
                    f"{weights.source}: {num_layers} layers are described, but the file has only "
                    f"{len(weights.shapes)} tensors"
                )


def _check_names(table: Table, weights: Weights, placed: Sequence[Rule]) -> None:
    wanted = {rule.theirs for rule in placed}
    for rule in placed:
        if rule.theirs not in weights.shapes:
            raise CheckpointError(f"{weights.source}: tensor {rule.theirs} is missing")
    left_out: dict[str, int] = {}
    for name in weights.shapes:
        if name in wanted:
            continue
        reason = next((i.reason for i in table.ignored if re.fullmatch(i.pattern, name)), None)
        if reason is None:
            raise CheckpointError(f"{weights.source}: unknown tensor {name}; nothing was converted")
        left_out[reason] = left_out.get(reason, 0) + 1
    for reason, count in left_out.items():
        logging.warning("%s: %d tensors left out: %s", weights.source, count, reason)


def _check_covered(
    placed: Sequence[Rule], shapes: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Every value of every parameter is written once."""
    for path, shape in shapes.items():
        written = np.zeros([n if _is_indexed(placed, path, a) else 1 for a, n in enumerate(shape)])
        for rule in placed:
            if rule.ours == path:
                written[rule.index] += 1
        if not (written == 1).all():
            raise CheckpointError(f"{source}: the table does not fill {path} {shape} exactly once")


def _is_indexed(placed: Sequence[Rule], path: str, axis: int) -> bool:
    return any(
        rule.ours == path and axis < len(rule.index) and isinstance(rule.index[axis], int)
        for rule in placed
    )


def _check_shape(rule: Rule, weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> None:
    theirs, shape = weights.shapes[rule.theirs], shapes[rule.ours]
    if weights.dtypes[rule.theirs] not in FLOATS:
        raise CheckpointError(
            f"{weights.source}: tensor {rule.theirs} has dtype {weights.dtypes[rule.theirs]}; "
            f"weights are {', '.join(FLOATS)}"
        )
    # A view of one value, so that the shape of the slot costs no memory.
    slot = np.broadcast_to(np.float32(0), shape)[rule.index].shape
    if not _fits(theirs, slot, rule.layout):
        raise CheckpointError(
            f"{weights.source}: tensor {rule.theirs} has shape {theirs}, which does not fit "
            f"{rule.ours} {slot}"
        )


def _fits(theirs: tuple[int, ...], slot: tuple[int, ...], layout: Layout) -> bool:
    if layout == "same":
        return theirs == slot
    if layout == "conv":
        return len(theirs) == 4 and (theirs[2], theirs[3], theirs[1], theirs[0]) == slot
    if layout == "flat":
        return len(theirs) == 1 and theirs[0] == np.prod(slot, dtype=np.int64)
    if len(theirs) != 2 or len(slot) < 2:
        return False
    # [out, in]: one of the two may be split into heads on our side.
    splits = {(int(np.prod(slot[k:])), int(np.prod(slot[:k]))) for k in range(1, len(slot))}
    return theirs in splits


def _rearranged(values: np.ndarray, layout: Layout) -> np.ndarray:
    if layout == "linear":
        return values.T
    if layout == "conv":
        return values.transpose(2, 3, 1, 0)
    return values


def _restored(values: np.ndarray, layout: Layout, shape: tuple[int, ...]) -> np.ndarray:
    if layout == "linear":
        return values.reshape(shape[::-1]).T
    if layout == "conv":
        return values.transpose(3, 2, 0, 1)
    return values.reshape(shape)
