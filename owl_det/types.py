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
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32, PyTree, UInt8

from owl_det.config import ModelConfig, PreprocessConfig

Params: TypeAlias = dict[str, Any]  # nested: parameter trees as Flax makes them

# Of `Assignment.instance`.
BACKGROUND = -1
IGNORED = -2

_STATIC: dict[str, Any] = {"static": True}  # part of a program, not an argument of it


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
class FeatureLevel:
    """Features of one grid over the square, in grid order of the tokens that were kept."""

    tokens: Float[Array, "*b n d"]
    token_index: Int[Array, "*b n"]  # position in the full grid, row by row
    grid: tuple[int, int] = dataclasses.field(metadata=_STATIC)  # rows, columns
    stride: int = dataclasses.field(metadata=_STATIC)  # pixels from a token to the next

    @property
    def centres(self) -> Float[Array, "*b n 2"]:
        """Of each token, (x, y) relative to the square."""
        h, w = self.grid
        place = jnp.stack([self.token_index % w, self.token_index // w], axis=-1)
        size = jnp.array([w, h], jnp.float32)
        return (place + 0.5) / size.reshape((1,) * self.token_index.ndim + (2,))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """What an image tower makes of images: one level, or a pyramid of them, finest first."""

    levels: tuple[FeatureLevel, ...]

    @property
    def tokens(self) -> Float[Array, "*b n d"]:
        """The tokens of all levels, one level after the other."""
        return _joined([level.tokens for level in self.levels])

    @property
    def centres(self) -> Float[Array, "*b n 2"]:
        """Of the same tokens, (x, y) relative to the square."""
        return _joined([level.centres for level in self.levels])

    @property
    def only_level(self) -> FeatureLevel:
        """The level, where there is one. Raises `ValueError` for a pyramid."""
        if len(self.levels) != 1:
            raise ValueError(f"a pyramid of {len(self.levels)} levels, where one is needed")
        return self.levels[0]


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-2)


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
    """Which instance each prediction stands for, as an assigner of `config.loss` decides."""

    # Index; `BACKGROUND` for none. `IGNORED`: neither class nor box loss looks at the prediction.
    instance: Int[Array, "*b k"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictionTargets:
    """What each prediction should be: `Targets` seen from the predictions."""

    labels: Bool[Array, "*b k q"]  # multi-hot over the real queries; none set = background
    boxes: Float[Array, "*b k 4"]  # cxcywh; of no meaning where `weight` is 0
    weight: Float[Array, "*b k"]  # of the box losses: 1 where the prediction has an instance
    is_counted: Bool[Array, "*b k"]  # False = neither class nor box loss looks at it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """All that inference needs, or the towers that a training starts from, or a teacher."""

    # "towers": a contrastive model without heads; with an image tower of kind "resnet" it is
    # `modeling.resnet.ClipResNet`, a teacher.
    kind: Literal["detector", "towers"] = "detector"
    params: Params
    config: ModelConfig
    preprocess: PreprocessConfig
    eval_prompts: str
    step: int
    tokenizer: str = ""  # file; empty = CLIP's vocabulary, built in
    names: tuple[str, ...] = ()  # of the categories it was trained to find, if they are known

    @property
    def is_resnet(self) -> bool:
        """Whether the image tower is CLIP's ResNet, which only teaches."""
        return self.config.image.kind == "resnet"
