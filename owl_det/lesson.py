"""What distillation branches know of a batch, and their losses within a training step.

Before any gradient is taken, frozen teachers look at the whole batch once: a `Lesson`, one row an
image, and what is the same for all images, `Shared`. `train_step` cuts the lesson with the batch
and calls `branch_losses` with what the student has made of its images.
"""

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from owl_det.config import Config
from owl_det.losses.branches import distill_losses
from owl_det.modeling.build import BRANCHES, make_detector, model_params
from owl_det.scoring import unit_length
from owl_det.types import (
    Batch,
    ImageFeatures,
    Params,
    Student,
    Teacher,
    TeacherSignals,
    Teaching,
)


class Lesson(NamedTuple):
    """What distillation branches know of each image, beside what the student makes of it."""

    tile_boxes: Array
    is_tile: Array
    region_boxes: Array | None
    is_region: Array | None
    caption_tokens: Array | None
    is_caption: Array | None
    signals: TeacherSignals


class Shared(NamedTuple):
    """What they know that is the same for all images."""

    teaching: Teaching
    names: Array | None  # the student's texts of DenseVLM's names


def lesson_of(batch: Batch, teaching: Teaching) -> Lesson:
    """What the branches know of a batch before the student sees it; teachers run here."""
    return Lesson(
        tile_boxes=batch.tile_boxes,
        is_tile=batch.tile_image_id >= 0,
        region_boxes=batch.region_boxes,
        is_region=batch.is_region,
        caption_tokens=batch.caption_tokens,
        is_caption=batch.is_caption,
        signals=jax.lax.stop_gradient(teaching.signals(teaching.arrays, batch)),
    )


def of_another_image(lesson: Lesson, batch: Batch) -> Lesson:
    """Each image with the teacher's outputs, and the captions, of the one before it in the batch.

    The shuffled control of `distill.shuffle_targets`: batches are in random order. Where the other
    image has fewer regions, objects or tiles, its own come again; where it has none, fillers.
    """
    shifted = jax.tree.map(
        lambda x: jnp.roll(x, 1, axis=0),
        (lesson.signals, lesson.caption_tokens, lesson.is_caption),
    )
    counts = {
        "tiles": lesson.is_tile.sum(1),
        "instances": batch.is_instance.sum(1),
        **{
            name: lesson.is_region.sum(1)
            for name in ("regions", "dense_regions")
            if lesson.is_region is not None
        },
    }
    signals = shifted[0]
    again = {
        name: _repeated(value, jnp.roll(counts[name], 1))
        for name in counts
        if (value := getattr(signals, name)) is not None
    }
    signals = dataclasses.replace(signals, **again)
    return lesson._replace(signals=signals, caption_tokens=shifted[1], is_caption=shifted[2])


def _repeated(rows: Float[Array, "b n e"], count: Int[Array, " b"]) -> Float[Array, "b n e"]:
    """The first `count` rows of each, again and again."""
    number = rows.shape[1]
    index = jnp.arange(number)[None] % jnp.clip(count, 1, number)[:, None]
    return jnp.take_along_axis(rows, index[..., None], axis=1)


def shared_of(params: Params, teaching: Teaching, config: Config) -> Shared:
    """What the branches know that no image changes; of the teachers what gradients wait for."""
    read = {"names", "image"} if teaching.embed_boxes else {"names"}
    arrays = {name: value for name, value in teaching.arrays.items() if name in read}
    names = student_names(params, teaching, config)
    return Shared(dataclasses.replace(teaching, arrays=arrays, name_tokens=None), names)


def student_names(params: Params, teaching: Teaching, config: Config) -> Array | None:
    """The student's own texts of DenseVLM's names as they are now; no gradient goes to them."""
    if teaching.name_tokens is None:
        return None
    tokens = jnp.asarray(teaching.name_tokens)
    variables = {"params": model_params(params)}
    names = make_detector(config).apply(variables, tokens, method="encode_text")
    return jax.lax.stop_gradient(unit_length(cast(Array, names)))


def branch_losses(
    params: Params,
    lesson: Lesson,
    shared: Shared,
    features: ImageFeatures,
    instances: dict[str, Any],
    images: UInt8[Array, "b h w 3"],
    is_example: Bool[Array, " b"],
    keys: Key[Array, " b"],
    config: Config,
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """Weighted sum of the active branches, and each of them, from what the student made of a batch.

    `instances` are the fields of `Student` that only a detector has.
    """
    teaching = shared.teaching
    side = config.model.image_size // config.model.image.patch_size
    student = Student(
        tokens=unit_length(features.tokens),
        token_index=features.token_index,
        grid=(side, side),
        keys=keys,
        is_example=is_example,
        tile_boxes=lesson.tile_boxes,
        is_tile=lesson.is_tile,
        region_boxes=lesson.region_boxes,
        is_region=lesson.is_region,
        caption_tokens=lesson.caption_tokens,
        is_caption=lesson.is_caption,
        names=shared.names,
        **instances,
    )
    embed = teaching.embed_boxes
    teacher = Teacher(
        signals=lesson.signals,
        names=teaching.arrays.get("names"),
        embed_boxes=embed and (lambda boxes: embed(teaching.arrays, images, boxes)),
    )
    return distill_losses(config.distill, params.get(BRANCHES, {}), student, teacher)
