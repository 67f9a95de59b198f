"""DenseVLM: regions learn the names that a frozen model retrieves, things apart from stuff.

Source: Li et al. 2024 (arXiv 2412.06244, section 3.2). The frozen model P scores every name for a
region by its own features and its own texts, so that student and teacher need not share a space:
they meet in probabilities. A region whose best probability is not above a threshold is left out.
Things are held against thing names only, stuff against all names. (Equation 5 of the paper has the
two cases swapped; its equations 3 and 4, its table 3 and the authors' code agree on this.)
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from owl_det.config import DenseVlmConfig
from owl_det.distillation.branch import Branch, BranchInputs, masked_mean, require
from owl_det.modeling.region_pool import kept_region_embeddings
from owl_det.scoring import unit_length
from owl_det.types import Params

Contrast = Literal["decoupled", "all", "separate"]

# Far below any cosine over τ, and finite.
_EXCLUDED = -1e9


def name_logits(
    regions: Float[Array, "*b r e"], names: Float[Array, "c e"], temperature: float
) -> Float[Array, "*b r c"]:
    """cos(region, name) / τ in float32: the logits of equations 2 to 4."""
    cosine = jnp.einsum("...re,ce->...rc", unit_length(regions, 0.0), unit_length(names, 0.0))
    return cosine / temperature


def retrieve(
    teacher_logits: Float[Array, "*b r c"],
    is_thing: Bool[Array, " c"],
    is_region: Bool[Array, "*b r"],
    threshold: float,
) -> tuple[Bool[Array, "*b r"], Bool[Array, "*b r"]]:
    """Which regions pass (max p > θ), and whether the best name of each is a thing's."""
    probabilities = jax.nn.softmax(teacher_logits, axis=-1)
    passes = is_region & (probabilities.max(-1) > threshold)
    return passes, is_thing[jnp.argmax(probabilities, axis=-1)]


def alignment_loss(
    student_logits: Float[Array, "*b r c"],
    teacher_logits: Float[Array, "*b r c"],
    is_thing: Bool[Array, " c"],
    is_region: Bool[Array, "*b r"],
    *,
    threshold: float,
    contrast: Contrast,
) -> Float[Array, "*b"]:
    """mean over an image's passing regions of KL(p ‖ q); 0 where none passes.

    p and q are the teacher's and the student's softmax over the names that the region is held
    against: "decoupled", the paper's: thing names for a thing, all names for stuff; "all": all
    names for both; "separate": stuff names alone for stuff (the other rows of its table 3).
    """
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    passes, is_thing_region = retrieve(teacher_logits, is_thing, is_region, threshold)
    is_held = _names_held(is_thing_region, is_thing, contrast)
    log_p = jax.nn.log_softmax(jnp.where(is_held, teacher_logits, _EXCLUDED), axis=-1)
    log_q = jax.nn.log_softmax(jnp.where(is_held, student_logits, _EXCLUDED), axis=-1)
    divergence = jnp.sum(jnp.where(is_held, jnp.exp(log_p) * (log_p - log_q), 0.0), axis=-1)
    return masked_mean(divergence, passes)


def _names_held(
    is_thing_region: Bool[Array, "*b r"], is_thing: Bool[Array, " c"], contrast: Contrast
) -> Bool[Array, "*b r c"]:
    region = is_thing_region[..., None]
    name = is_thing.reshape((1,) * is_thing_region.ndim + is_thing.shape)
    if contrast == "all":
        return jnp.ones_like(region | name)
    return region == name if contrast == "separate" else ~region | name


def _loss(entry: DenseVlmConfig, params: Params, inputs: BranchInputs) -> Float[Array, " b"]:
    boxes, is_region = require(inputs.region_boxes), require(inputs.is_region)
    pooled, is_seen = kept_region_embeddings(inputs.features.only_level, boxes)
    return alignment_loss(
        name_logits(pooled, require(inputs.names), entry.temperature),
        name_logits(
            inputs.signals["dense_regions"], require(inputs.teacher_names), entry.temperature
        ),
        jnp.arange(len(entry.things) + len(entry.stuff)) < len(entry.things),
        is_region & is_seen,
        threshold=entry.threshold,
        contrast=entry.contrast,
    )


def _name_texts(entry: DenseVlmConfig) -> list[str]:
    """The names in their template, things first; [] where there are none."""
    return [entry.template.format(name) for name in (*entry.things, *entry.stuff)]


BRANCH = Branch(loss=_loss, needs=("dense_regions", "names"), name_texts=_name_texts)
