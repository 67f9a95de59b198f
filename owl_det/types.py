"""The containers that travel between modules, and the letters their axes go by.

    b  images (or mosaics) of a batch      n  tokens of an image, or predictions made from them
    m  instances of an image (padded)      k  tokens kept for heads and losses (k = n when all are)
    q  queries of one image (padded)       d  features
    u  distinct queries of a batch         h w  patch grid, rows and columns
    t  tiles of a mosaic                   l  text tokens
    r  regions that a teacher teaches      c  names that a teacher knows

Boxes are `boxes_cxcywh` (centre, size) or `boxes_xyxy` (corners), relative to the padded square
unless a name says pixels. Masks are `is_*`, True = real.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, Key, PyTree, UInt8

from owl_det.config import ModelConfig, PreprocessConfig

Params: TypeAlias = dict[str, Any]  # nested: parameter trees as Flax makes them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch; the keys of `data_pipelines.features`, with static shapes."""

    image: UInt8[Array, "b H W 3"]  # padded bottom/right to a square
    is_example: Bool[Array, " b"]  # False = filler of a last, incomplete batch
    image_id: Int32[Array, " b"]
    original_size: Int32[Array, "b 2"]  # height, width of the (single) source image
    boxes: Float[Array, "b m 4"]  # cxcywh
    is_instance: Bool[Array, "b m"]
    is_crowd: Bool[Array, "b m"]
    instance_labels: Bool[Array, "b m q"]  # multi-hot over this image's queries
    instance_scores: Float[Array, "b m"]  # 1 for human boxes
    query_table: Int32[Array, "u l"]  # each distinct query once per data shard
    query_index: Int32[Array, "b q"]  # into the rows of the image's own data shard
    is_query: Bool[Array, "b q"]
    tile_boxes: Float[Array, "b t 4"]  # cxcywh
    tile_of_instance: Int32[Array, "b m"]
    tile_image_id: Int32[Array, "b t"]  # -1 = no tile
    # Only with `config.data.with_captions`; one caption a tile.
    caption_tokens: Int32[Array, "b t l"] | None = None
    is_caption: Bool[Array, "b t"] | None = None
    # Only where a distillation branch asks for regions.
    region_boxes: Float[Array, "b r 4"] | None = None  # cxcywh
    is_region: Bool[Array, "b r"] | None = None
    # Only with `config.distill.cache`: the arrays of `TeacherSignals`, by name.
    teacher: dict[str, Float[Array, "b ..."]] | None = None


def batch_of(arrays: Mapping[str, Any]) -> Batch:
    """A batch of what the input pipeline makes, and of nothing else of it: fields by name, those of
    `Batch.teacher` as `teacher/<name>`."""
    fields = {f.name: arrays[f.name] for f in dataclasses.fields(Batch) if f.name in arrays}
    cached = {key[8:]: value for key, value in arrays.items() if key.startswith("teacher/")}
    return Batch(**fields, teacher=cached or None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Targets:
    """What one image should be predicted as (the part of `Batch` that losses read)."""

    boxes: Float[Array, "*b m 4"]  # cxcywh
    is_instance: Bool[Array, "*b m"]  # crowd regions are no instances
    is_crowd: Bool[Array, "*b m"]
    labels: Bool[Array, "*b m q"]
    is_query: Bool[Array, "*b q"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFeatures:
    """Per-token features after the class token is merged in, in grid order of the kept tokens."""

    tokens: Float[Array, "*b n d"]
    token_index: Int[Array, "*b n"]  # position in the full grid, row by row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictions:
    """Per-token predictions; `token_index` says which token of the full grid made each."""

    boxes: Float[Array, "*b k 4"]  # cxcywh, in (0, 1)
    class_logits: Float[Array, "*b k q"]
    class_embeddings: Float[Array, "*b k d"]  # unit length
    objectness_logits: Float[Array, "*b k"]  # 0 in a detector without an objectness head
    token_index: Int[Array, "*b k"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenEmbeddings:
    """What of each token decides its score for any query: (cos + shift) · scale, and its box."""

    boxes: Float[Array, "*b n 4"]  # cxcywh, in (0, 1)
    class_embeddings: Float[Array, "*b n e"]  # unit length
    embedding_norm: Float[Array, "*b n"]  # the length that class embeddings had
    logit_shift: Float[Array, "*b n"]
    logit_scale: Float[Array, "*b n"]
    objectness_logits: Float[Array, "*b n"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignment:
    """One-to-one matching of predictions and instances, seen from the instances."""

    prediction: Int[Array, "*b m"]  # index of the matched prediction; 0 where there is none
    is_matched: Bool[Array, "*b m"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherSignals:
    """What frozen models say of each image, unit-length vectors; None where nothing asks for it."""

    tiles: Float[Array, "*b t e"] | None = None  # image embedding of each tile (the whole image)
    regions: Float[Array, "*b r e"] | None = None  # image embeddings of the regions' crops
    # Image embeddings of the objects' crops, those that `hierkd.some_instances` names.
    instances: Float[Array, "*b k e"] | None = None
    captions: Float[Array, "*b t e"] | None = None  # text embedding of each tile's caption
    dense_regions: Float[Array, "*b r f"] | None = None  # dense teacher's tokens, pooled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """The teacher's side of the branches; no gradient comes from here."""

    signals: TeacherSignals
    names: Float[Array, "c f"] | None = None  # dense teacher's texts, unit length
    # Image embeddings of crops of boxes (cxcywh) that only the step knows; None with a cache.
    embed_boxes: Callable[[Float[Array, "b m 4"]], Float[Array, "b m e"]] | None = None


_STATIC = {"static": True}  # part of a program, not an argument of it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Teaching:
    """Frozen models as the step uses them (`teachers.open_teachers` makes it)."""

    arrays: PyTree  # parameters and text tables: an argument of the compiled step
    name_tokens: Int32[np.ndarray, "c l"] | None  # DenseVLM's names, for the student's text tower
    # Of image and text vectors; 0 if nothing needs them.
    teacher_dim: int = dataclasses.field(metadata=_STATIC)
    # Of the text tower that the vectors belong to; "" if nothing needs them.
    text_id: str = dataclasses.field(metadata=_STATIC)
    # Ids of `distill.teacher` and `distill.dense_teacher`; "" of one that nothing needs.
    teacher_ids: tuple[str, str] = dataclasses.field(metadata=_STATIC)
    # From `arrays` and a batch.
    signals: Callable[[PyTree, Batch], TeacherSignals] = dataclasses.field(metadata=_STATIC)
    # From `arrays`, images and boxes (cxcywh).
    embed_boxes: Callable[[PyTree, Array, Array], Array] | None = dataclasses.field(
        metadata=_STATIC
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student:
    """The student's side of the branches. What heads and matching make is None for towers."""

    tokens: Float[Array, "b n e"]  # unit length, in the space of the student's texts
    token_index: Int[Array, "b n"]  # position in the full grid
    grid: tuple[int, int]  # rows, columns
    keys: Key[Array, " b"]
    is_example: Bool[Array, " b"]
    tile_boxes: Float[Array, "b t 4"]
    is_tile: Bool[Array, "b t"]
    region_boxes: Float[Array, "b r 4"] | None
    is_region: Bool[Array, "b r"] | None
    caption_tokens: Int32[Array, "b t l"] | None
    is_caption: Bool[Array, "b t"] | None
    names: Float[Array, "c e"] | None = None  # the student's texts of DenseVLM's names, no gradient
    targets: Targets | None = None
    queries: Float[Array, "b q e"] | None = None
    instance_tokens: Float[Array, "b m e"] | None = None  # of the token matched to each instance
    instance_boxes: Float[Array, "b m 4"] | None = None  # that it predicts, without a gradient
    is_matched: Bool[Array, "b m"] | None = None

    @property
    def centres(self) -> Float[Array, "b n 2"]:
        """Of each token, (x, y) relative to the square."""
        h, w = self.grid
        place = jnp.stack([self.token_index % w, self.token_index // w], axis=-1)
        return (place + 0.5) / jnp.array([[[w, h]]], jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """All that inference needs, or the towers that a training starts from, or a teacher."""

    # "towers": no heads, only what `modeling.detector.TOWERS` names. "resnet": the parameters of
    # `modeling.resnet.ClipResNet`.
    kind: Literal["detector", "towers", "resnet"] = "detector"
    params: Params
    model: ModelConfig
    preprocess: PreprocessConfig
    eval_prompts: str
    step: int
    tokenizer: str = ""  # file; empty = CLIP's vocabulary, built in
    names: tuple[str, ...] = ()  # of the categories it was trained to find, if they are known
