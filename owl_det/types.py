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
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import jax
from jaxtyping import Array, Bool, Float, Int, Int32, PyTree, UInt8

from owl_det.config import ModelConfig, PreprocessConfig

Params: TypeAlias = dict[str, Any]  # nested: parameter trees as Flax makes them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch: the fields of `data_pipelines.batch_spec`, with static shapes."""

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
    # Only with `config.distill.cache`: the arrays of `distillation.branch.Signals`.
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
    config: ModelConfig
    preprocess: PreprocessConfig
    eval_prompts: str
    step: int
    tokenizer: str = ""  # file; empty = CLIP's vocabulary, built in
    names: tuple[str, ...] = ()  # of the categories it was trained to find, if they are known
