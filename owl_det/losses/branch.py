"""What a distillation branch is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from owl_det.types import Params, Student, Teacher


class Dims(NamedTuple):
    """Widths of the embeddings."""

    student: int
    teacher: int  # 0 if no branch needs the image or text vectors of `distill.teacher`


class Branch(NamedTuple):
    """One loss beside the detector's own, switched by the weight of its entry in `config.distill`.

    `loss(entry, params, student, teacher)` gives unweighted values of each example; `params` is
    what `init(entry, key, dims)` made, {} without it. `needs` are fields of `TeacherSignals` and
    "names", or a function of the entry that gives them.
    """

    loss: Callable[[Any, Params, Student, Teacher], Float[Array, " b"]]
    needs: tuple[str, ...] | Callable[[Any], tuple[str, ...]] = ()
    init: Callable[[Any, Key[Array, ""], Dims], Params] | None = None
    needs_heads: bool = False  # targets, queries and matching: detectors only
    # Does an example's loss depend on the others of the batch? By entry where it is a function.
    couples_examples: bool | Callable[[Any], bool] = False
    shares_space: bool = False  # sets tokens beside the teacher's vectors as they are

    def needed(self, entry: Any) -> tuple[str, ...]:
        """What the branch needs with this entry."""
        return self.needs(entry) if callable(self.needs) else self.needs

    def couples(self, entry: Any) -> bool:
        """Whether `couples_examples` with this entry."""
        by_entry = self.couples_examples
        return by_entry(entry) if callable(by_entry) else by_entry


def masked_mean(
    values: Float[Array, "*b r"], is_counted: Bool[Array, "*b r"]
) -> Float[Array, "*b"]:
    """The mean of the counted values of each example; 0 where none is, with a gradient of 0."""
    total = jnp.where(is_counted, values, 0.0).sum(-1)
    return total / jnp.maximum(is_counted.sum(-1), 1)


def given(value: Array | None) -> Array:
    """A part of `Student` or `TeacherSignals` that the branch's declaration makes sure of."""
    assert value is not None
    return value
