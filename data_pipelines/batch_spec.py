"""The fields of a training batch: the axes, the dtype and the presence of each.

`FIELDS` is the one table. The input pipeline, shapes without data, fillers and synthetic batches
are made from it; `owl_det.types.Batch` is the container that the step reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from owl_det.config import Config

Arrays = dict[str, np.ndarray]

# What was left out of an example, in the order of the batch's `counts`.
COUNTS = (
    "unreadable_images",
    "degenerate_boxes",
    "tiny_boxes",
    "dropped_queries",
    "dropped_instances",
    "cut_texts",
    "cut_captions",
    "images_without_caption",
)


@dataclass(frozen=True)
class Field:
    """One array of a batch."""

    axes: str  # letters of `owl_det.types`, or sizes
    dtype: type[np.generic]
    # always; with `config.data.with_captions`; or where a branch of `config.distill` is active
    presence: Literal["always", "captions", "regions"] = "always"

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape where each letter has the size that `sizes` says."""
        return tuple(int(axis) if axis.isdigit() else sizes[axis] for axis in self.axes.split())

    def example_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of one example's row."""
        return self.shape({"b": 1, **sizes})[1:]


FIELDS = {
    "image": Field("b H W 3", np.uint8),
    "is_example": Field("b", np.bool_),
    "image_id": Field("b", np.int32),
    "original_size": Field("b 2", np.int32),
    "boxes": Field("b m 4", np.float32),
    "is_instance": Field("b m", np.bool_),
    "is_crowd": Field("b m", np.bool_),
    "instance_labels": Field("b m q", np.bool_),
    "instance_scores": Field("b m", np.float32),
    "query_table": Field("u l", np.int32),
    "query_index": Field("b q", np.int32),
    "is_query": Field("b q", np.bool_),
    "tile_boxes": Field("b t 4", np.float32),
    "tile_of_instance": Field("b m", np.int32),
    "tile_image_id": Field("b t", np.int32),
    "caption_tokens": Field("b t l", np.int32, "captions"),
    "is_caption": Field("b t", np.bool_, "captions"),
    "region_boxes": Field("b r 4", np.float32, "regions"),
    "is_region": Field("b r", np.bool_, "regions"),
}
# What the input pipeline tells beside the batch; the step does not read it.
INPUT_FIELDS = {
    "counts": Field(f"b {len(COUNTS)}", np.int32),
    # Which of its image's captions a tile has: a teacher's cache knows them by this number.
    "caption_index": Field("b t", np.int32, "captions"),
}
# What an example has instead of `query_table` and `query_index`, which are of a whole data shard.
EXAMPLE_FIELDS = {"query_tokens": Field("b q l", np.int32)}
# Teachers' outputs with `config.distill.cache` are further arrays of the batch, `teacher/<name>`.
TEACHER_PREFIX = "teacher/"


def present(config: Config) -> dict[str, Field]:
    """The fields that batches of a config have, without a teacher's outputs."""
    has = {
        "always": True,
        "captions": config.data.with_captions,
        "regions": bool(config.distill.active()),
    }
    return {name: field for name, field in FIELDS.items() if has[field.presence]}


def axis_sizes(config: Config, num_data_shards: int = 1) -> dict[str, int]:
    """The size of each axis of a global batch."""
    data, side = config.data, config.model.image_size
    return {
        "b": config.batch_size,
        "H": side,
        "W": side,
        "m": data.max_instances,
        "q": data.max_queries,
        "u": num_table_rows(config, num_data_shards),
        "l": config.model.text.num_positions,
        "t": max(data.augment.mosaic_sizes) ** 2,
        "r": config.distill.regions.max_regions,
    }


def num_table_rows(config: Config, num_data_shards: int = 1) -> int:
    """Rows of a batch's query table: distinct texts, or as many as could be needed."""
    data = config.data
    return num_data_shards * data.max_distinct_queries or config.batch_size * data.max_queries


def zeros(fields: Mapping[str, Field], sizes: Mapping[str, int]) -> Arrays:
    """Arrays of zeros: a batch of fillers, or one to be filled in."""
    return {name: np.zeros(f.shape(sizes), f.dtype) for name, f in fields.items()}


def check(arrays: Mapping[str, Any], fields: Mapping[str, Field], sizes: Mapping[str, int]) -> None:
    """Raises `ValueError` that names the first field that is missing or of another kind.

    Arrays that are not among `fields` are not looked at.
    """
    for name, field in fields.items():
        if name not in arrays:
            raise ValueError(f"batch: has no {name}")
        found = (tuple(arrays[name].shape), np.dtype(arrays[name].dtype))
        expected = (field.shape(sizes), np.dtype(field.dtype))
        if found != expected:
            raise ValueError(
                f"batch: {name} is {found[1]}{list(found[0])}, not {expected[1]}{list(expected[0])}"
            )
