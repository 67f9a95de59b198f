"""What distillation branches read within a training step.

Before any gradient is taken, frozen teachers look at the whole batch once (`of_batch`). The step
cuts those rows with the batch, and `branch_losses` adds what the student has made of its images.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from owl_det.config import Config
from owl_det.distillation.branch import BranchInputs, Teachers
from owl_det.distillation.branches import distill_losses
from owl_det.modeling.build import BRANCHES, call, make_detector, model_params
from owl_det.scoring import unit_length
from owl_det.types import Batch, Features, Params


def of_batch(batch: Batch, teachers: Teachers) -> BranchInputs:
    """What the branches know of a batch before the student sees it; teachers run here."""
    return BranchInputs(
        is_example=batch.is_example,
        tile_boxes=batch.tile_boxes,
        is_tile=batch.tile_image_id >= 0,
        region_boxes=batch.region_boxes,
        is_region=batch.is_region,
        caption_tokens=batch.caption_tokens,
        is_caption=batch.is_caption,
        signals=jax.lax.stop_gradient(teachers.signals(teachers.arrays, batch)),
    )


def shuffle_targets(inputs: BranchInputs, batch: Batch) -> BranchInputs:
    """Each image with the teacher's outputs, and the captions, of the one before it in the batch.

    The control of `distill.shuffle_targets`: batches are in random order. Where the other image has
    fewer regions, objects or tiles, its own come again; where it has none, fillers.
    """
    signals, caption_tokens, is_caption = jax.tree.map(
        lambda x: jnp.roll(x, 1, axis=0),
        (inputs.signals, inputs.caption_tokens, inputs.is_caption),
    )
    counts = {"tiles": inputs.is_tile.sum(1), "instances": batch.is_instance.sum(1)}
    if inputs.is_region is not None:
        counts |= dict.fromkeys(("regions", "dense_regions"), inputs.is_region.sum(1))
    again = {
        name: _repeated(signals[name], jnp.roll(count, 1))
        for name, count in counts.items()
        if name in signals
    }
    return dataclasses.replace(
        inputs, signals=signals | again, caption_tokens=caption_tokens, is_caption=is_caption
    )


def _repeated(rows: Float[Array, "b n e"], count: Int[Array, " b"]) -> Float[Array, "b n e"]:
    """The first `count` rows of each, again and again."""
    number = rows.shape[1]
    index = jnp.arange(number)[None] % jnp.clip(count, 1, number)[:, None]
    return jnp.take_along_axis(rows, index[..., None], axis=1)


def of_step(params: Params, teachers: Teachers, config: Config) -> Teachers:
    """What of the teachers the loss itself reads, with the student's own texts of their names."""
    read = {"names", "image"} if teachers.embed_boxes else {"names"}
    arrays = {name: value for name, value in teachers.arrays.items() if name in read}
    if teachers.name_tokens is not None:
        arrays["student_names"] = student_names(params, teachers, config)
    return dataclasses.replace(teachers, arrays=arrays, name_tokens=None)


def student_names(params: Params, teachers: Teachers, config: Config) -> Float[Array, "c e"]:
    """The student's texts of the names as they are now; no gradient goes to them."""
    tokens = jnp.asarray(teachers.name_tokens)
    names = call(make_detector(config).encode_text, model_params(params), tokens)
    return jax.lax.stop_gradient(unit_length(names))


def branch_losses(
    params: Params,
    inputs: BranchInputs,
    teachers: Teachers,
    features: Features,
    *,
    images: UInt8[Array, "b h w 3"],
    keys: Key[Array, " b"],
    config: Config,
    instances: dict[str, Any],
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """Weighted sum of the active branches, and each of them.

    `teachers` are those of `of_step`; `instances` are the fields of `BranchInputs` that only a
    detector has.
    """
    embed, arrays = teachers.embed_boxes, teachers.arrays
    inputs = dataclasses.replace(
        inputs,
        features=_of_unit_length(features),
        keys=keys,
        names=arrays.get("student_names"),
        teacher_names=arrays.get("names"),
        embed_boxes=embed and (lambda boxes: embed(arrays, images, boxes)),
        **instances,
    )
    return distill_losses(config.distill, params.get(BRANCHES, {}), inputs)


def _of_unit_length(features: Features) -> Features:
    levels = features.levels
    return Features(
        levels=tuple(dataclasses.replace(x, tokens=unit_length(x.tokens)) for x in levels)
    )
