"""What a distillation branch is, and what it reads: containers alone, which every step imports."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, Key, PyTree

from owl_det.config import Config
from owl_det.types import Batch, Features, Params, Targets

# What teachers say of each image: unit-length vectors by the name of the signal.
#   tiles [b t e]          image embedding of each tile (the whole image)
#   regions [b r e]        image embeddings of the regions' crops
#   instances [b k e]      image embeddings of objects' crops, as `Branch.instances` says
#   captions [b t e]       text embedding of each tile's caption
#   dense_regions [b r f]  the dense teacher's tokens, pooled over the regions
Signals = dict[str, Float[Array, "b ..."]]

_LATER: Any = None  # what the student fills in
_STATIC = {"static": True}  # part of a program, not an argument of it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BranchInputs:
    """All that a branch reads, one row an image; no gradient goes to the teachers' part.

    The batch's and the teachers' part is there before the student looks at its images; the
    student's is filled in within the loss. What a detector's heads and matching make is None for
    towers.
    """

    # Of the batch.
    is_example: Bool[Array, " b"]
    tile_boxes: Float[Array, "b t 4"]
    is_tile: Bool[Array, "b t"]
    region_boxes: Float[Array, "b r 4"] | None = None
    is_region: Bool[Array, "b r"] | None = None
    caption_tokens: Int32[Array, "b t l"] | None = None
    is_caption: Bool[Array, "b t"] | None = None
    # Of the teachers.
    signals: Signals = dataclasses.field(default_factory=dict)
    teacher_names: Float[Array, "c f"] | None = None  # the dense teacher's texts, unit length
    # Image embeddings of crops of boxes (cxcywh) that only the step knows; None with a cache.
    embed_boxes: Callable[[Float[Array, "b m 4"]], Float[Array, "b m e"]] | None = (
        dataclasses.field(default=None, metadata=_STATIC)
    )
    # Of the student.
    features: Features = _LATER  # unit length, in the space of the student's texts
    keys: Key[Array, " b"] = _LATER
    names: Float[Array, "c e"] | None = None  # the student's texts of the same names, no gradient
    targets: Targets | None = None
    queries: Float[Array, "b q e"] | None = None
    instance_tokens: Float[Array, "b m e"] | None = None  # of the token matched to each instance
    instance_boxes: Float[Array, "b m 4"] | None = None  # that it predicts, without a gradient
    is_matched: Bool[Array, "b m"] | None = None

    @property
    def tokens(self) -> Float[Array, "b n e"]:
        """The student's tokens, of unit length, in the space of its texts."""
        return self.features.tokens

    @property
    def centres(self) -> Float[Array, "b n 2"]:
        """Of each token, (x, y) relative to the square."""
        return self.features.centres


def require(value: Any) -> Any:
    """A part of `BranchInputs` that the branch's declaration makes sure of, as not optional."""
    assert value is not None
    return value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Teachers:
    """The frozen models as the step uses them."""

    arrays: PyTree  # parameters and text tables: an argument of the compiled step
    name_tokens: Int32[np.ndarray, "c l"] | None  # the names, for the student's text tower
    # Of image and text vectors; 0 if nothing needs them.
    teacher_dim: int = dataclasses.field(metadata=_STATIC)
    # Of the text tower that the vectors belong to; "" if nothing needs them.
    text_id: str = dataclasses.field(metadata=_STATIC)
    # Ids of `distill.teacher` and `distill.dense_teacher`; "" of one that nothing needs.
    teacher_ids: tuple[str, str] = dataclasses.field(metadata=_STATIC)
    # From `arrays` and a batch.
    signals: Callable[[PyTree, Batch], Signals] = dataclasses.field(metadata=_STATIC)
    # From `arrays`, images and boxes (cxcywh).
    embed_boxes: Callable[[PyTree, Array, Array], Array] | None = dataclasses.field(
        metadata=_STATIC
    )


class Branch(NamedTuple):
    """One loss beside the detector's own, switched by the weight of its entry in `config.distill`.

    `loss(entry, params, inputs)` gives unweighted values of each example; `params` is what
    `init(entry, key, student_dim, teacher_dim)` made, {} without it. Where a field is a function,
    it is one of the entry.
    """

    loss: Callable[[Any, Params, BranchInputs], Float[Array, " b"]]
    # Names of `Signals`; "names", the texts of `name_texts`; "embed_boxes".
    needs: tuple[str, ...] | Callable[[Any], tuple[str, ...]] = ()
    init: Callable[[Any, Key[Array, ""], int, int], Params] | None = None
    needs_heads: bool = False  # targets, queries and matching: detectors only
    # Does an example's loss depend on the others of the batch?
    couples_examples: bool | Callable[[Any], bool] = False
    shares_space: bool = False  # sets tokens beside the teacher's vectors as they are
    # Raises `ConfigError` if the entry cannot run under the other keys of the config.
    check: Callable[[Any, Config], None] | None = None
    # The texts that "names" are, for both text towers.
    name_texts: Callable[[Any], Sequence[str]] | None = None
    # Of "instances": which of the objects are cropped (boxes, is_instance → indices), how large.
    instances: Callable[[Any, Array, Array], Int[Array, "b k"]] | None = None
    crop_scale: Callable[[Any], float] | None = None
    # The entry that a cache of the teacher's vectors is made with, where it is another one.
    cached: Callable[[Any], Any] | None = None

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
