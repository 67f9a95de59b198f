"""The table of a batch's fields says what the container declares and what the pipeline makes."""

import dataclasses
import typing
from typing import Any

import numpy as np
import pytest

from data_pipelines import batch_spec
from data_pipelines.input import TrainInput
from owl_det.training import step_shapes
from owl_det.types import Batch, batch_of
from tests import tiny, tiny_distillation


def _annotations() -> dict[str, Any]:
    """Field of `Batch` → its array type, without None."""
    hints = typing.get_type_hints(Batch)
    return {
        name: next((kind for kind in typing.get_args(hint) if kind is not type(None)), hint)
        for name, hint in hints.items()
    }


def test_the_container_has_the_fields_of_the_table() -> None:
    annotations = _annotations()
    del annotations["teacher"]  # by the names of the teachers' outputs
    assert annotations.keys() == batch_spec.FIELDS.keys()
    for name, field in batch_spec.FIELDS.items():
        assert annotations[name].dim_str.strip() == field.axes, name
        dtype = np.dtype(field.dtype)
        assert dtype.name in annotations[name].dtypes, name
    optional = {f.name for f in dataclasses.fields(Batch) if f.default is None} - {"teacher"}
    sometimes = {n for n, field in batch_spec.FIELDS.items() if field.presence != "always"}
    assert optional == sometimes


@pytest.mark.parametrize("kind", ["detection", "captions", "distillation", "mosaics"])
def test_batches_are_as_the_table_says(kind: str) -> None:
    if kind == "distillation":
        config = tiny_distillation.config("clipself")
    else:
        config = tiny.config(data__with_captions=kind == "captions")
    if kind == "mosaics":
        augment = dataclasses.replace(
            config.data.augment, mosaic_sizes=(2,), mosaic_probabilities=(1.0,)
        )
        data = dataclasses.replace(config.data, augment=augment, max_distinct_queries=7)
        config = dataclasses.replace(config, data=data)
    batch = next(TrainInput(config).batches(0, num_data_shards=2))
    sizes = batch_spec.axis_sizes(config, 2)
    expected = batch_spec.present(config) | {
        name: field
        for name, field in batch_spec.INPUT_FIELDS.items()
        if field.presence == "always" or config.data.with_captions
    }
    batch_spec.check(batch, expected, sizes)
    assert batch.keys() == expected.keys()
    assert ("region_boxes" in batch, "is_caption" in batch) == (
        kind == "distillation",
        kind == "captions" or config.data.with_captions,
    )
    shapes = step_shapes.batch_shapes(config, 2)
    for name in batch_spec.present(config):
        assert getattr(shapes, name).shape == batch[name].shape, name


def test_teachers_outputs_are_told_by_their_prefix() -> None:
    arrays = batch_spec.zeros(batch_spec.FIELDS, dict.fromkeys("bHWmqultr", 2))
    tiles = np.zeros((2, 2, 3), np.float32)
    batch = batch_of(arrays | {f"{batch_spec.TEACHER_PREFIX}tiles": tiles, "other": tiles})
    assert batch.teacher is not None and list(batch.teacher) == ["tiles"]


def test_a_batch_that_is_not_as_the_table_says_is_named() -> None:
    fields, sizes = batch_spec.FIELDS, dict.fromkeys("bHWmqultr", 3)
    batch = batch_spec.zeros(fields, sizes)
    batch_spec.check(batch, fields, sizes)
    with pytest.raises(ValueError, match="has no boxes"):
        batch_spec.check({n: a for n, a in batch.items() if n != "boxes"}, fields, sizes)
    with pytest.raises(ValueError, match=r"boxes is float64\[3, 3, 4\], not float32\[3, 3, 4\]"):
        batch_spec.check(batch | {"boxes": batch["boxes"].astype("f8")}, fields, sizes)
    with pytest.raises(ValueError, match=r"is_query is bool\[2, 3\], not bool\[3, 3\]"):
        batch_spec.check(batch | {"is_query": batch["is_query"][:2]}, fields, sizes)
