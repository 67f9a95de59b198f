"""GridCLIP: tokens match texts, and the image as a whole matches a frozen image tower.

Source: Lin & Gong 2023 (arXiv 2303.09252, sections 3.2 and 3.3). Two gaps of the paper are
filled here: a bare cosine under a sigmoid cannot come near 0 or 1, so it gets a learned scale and
bias; and a last layer with ReLU cannot reach signed targets, so the last one has none.
"""

import math
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from owl_det.config import GridClipGridConfig, GridClipImageConfig
from owl_det.distillation.branch import Branch, BranchInputs, masked_mean, require
from owl_det.losses.focal import focal_terms
from owl_det.modeling.region_pool import kept_region_embeddings
from owl_det.scoring import unit_length
from owl_det.types import Params, Targets

HIDDEN_WIDTH = 256  # of the adapter; section 4.1
INITIAL_SCALE = 10.0
INITIAL_SCORE = 0.01  # of every name, at cosine 0


def assign_tokens(
    centres: Float[Array, "*b n 2"], targets: Targets
) -> tuple[Int[Array, "*b n"], Bool[Array, "*b n"]]:
    """The instance that each token stands for, and whether there is one.

    As in FCOS (arXiv 1904.01355, section 3.1): the smallest box that the token's centre lies in.
    """
    half = targets.boxes[..., None, :, 2:] / 2
    is_inside = (jnp.abs(centres[..., :, None, :] - targets.boxes[..., None, :, :2]) < half).all(-1)
    is_inside &= targets.is_instance[..., None, :]
    area = jnp.prod(targets.boxes[..., 2:], axis=-1)[..., None, :]
    instance = jnp.argmin(jnp.where(is_inside, area, jnp.inf), axis=-1)
    return instance, is_inside.any(-1)


def grid_loss(
    tokens: Float[Array, "*b n e"],
    queries: Float[Array, "*b q e"],
    centres: Float[Array, "*b n 2"],
    targets: Targets,
    log_scale: Float[Array, ""],
    bias: Float[Array, ""],
    *,
    alpha: float,
    gamma: float,
) -> Float[Array, "*b"]:
    """Focal loss of σ(exp(log_scale) · cos + bias) for every token and query / positive tokens.

    Equation 3, with scale and bias; tokens as `assign_tokens` says, those of a crowd region are not
    held against its names.
    """
    cosine = jnp.einsum("...ne,...qe->...nq", unit_length(tokens), unit_length(queries))
    positive, negative = focal_terms(jnp.exp(log_scale) * cosine + bias, alpha, gamma)
    instance, is_positive = assign_tokens(centres, targets)
    is_name = targets.labels & targets.is_query[..., None, :]  # a name may have been left out
    labels = jnp.take_along_axis(is_name, instance[..., None], axis=-2)
    labels &= is_positive[..., None]
    is_counted = targets.is_query[..., None, :] & ~_in_crowd(centres, targets) | labels
    loss = jnp.where(is_counted, jnp.where(labels, positive, negative), 0.0).sum((-2, -1))
    return loss / jnp.maximum(is_positive.sum(-1), 1)


def _in_crowd(centres: Float[Array, "*b n 2"], targets: Targets) -> Bool[Array, "*b n q"]:
    """Tokens whose centre lies in a crowd region of a query's name."""
    half = targets.boxes[..., None, :, 2:] / 2
    is_inside = (jnp.abs(centres[..., :, None, :] - targets.boxes[..., None, :, :2]) < half).all(-1)
    is_inside &= targets.is_crowd[..., None, :]
    return (
        jnp.einsum(
            "...nm,...mq->...nq", *(x.astype(jnp.float32) for x in (is_inside, targets.labels))
        )
        > 0
    )


def image_loss(
    adapted: Float[Array, "*b t e"], teacher: Float[Array, "*b t e"], is_tile: Bool[Array, "*b t"]
) -> Float[Array, "*b"]:
    """mean over an image's tiles of |z̄′ − z̄_CLIP|₁ / e, both of unit length (section 3.3).

    A single image is one tile. The paper does not say how L1 is reduced or whether vectors are
    normalised.
    """
    distance = jnp.abs(unit_length(adapted, 0.0) - unit_length(teacher, 0.0)).mean(-1)
    return masked_mean(distance, is_tile)


def init_adapter(key: Key[Array, ""], student_dim: int, teacher_dim: int) -> Params:
    """Parameters of `adapt`."""
    widths = (student_dim, HIDDEN_WIDTH, HIDDEN_WIDTH, teacher_dim)
    initializer = jax.nn.initializers.he_normal()
    return {
        f"dense_{i}": {
            "kernel": initializer(layer_key, widths[i : i + 2], jnp.float32),
            "bias": jnp.zeros(widths[i + 1]),
        }
        for i, layer_key in enumerate(jax.random.split(key, 3))
    }


def adapt(params: Params, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
    """Three linear layers with ReLU between them."""
    for i in range(3):
        layer = params[f"dense_{i}"]
        x = jnp.einsum("...d,de->...e", x, layer["kernel"])
        x = x + layer["bias"].reshape((1,) * (x.ndim - 1) + (-1,))
        x = jax.nn.relu(x) if i < 2 else x
    return cast(Array, x)


def _grid(entry: GridClipGridConfig, params: Params, inputs: BranchInputs) -> Float[Array, " b"]:
    assert inputs.targets is not None
    return grid_loss(
        inputs.tokens,
        require(inputs.queries),
        inputs.centres,
        inputs.targets,
        params["log_scale"],
        params["bias"],
        alpha=entry.focal_alpha,
        gamma=entry.focal_gamma,
    )


def _init_grid(
    entry: GridClipGridConfig, key: Key[Array, ""], student_dim: int, teacher_dim: int
) -> Params:
    bias = math.log(INITIAL_SCORE / (1 - INITIAL_SCORE))
    return {"log_scale": jnp.log(INITIAL_SCALE), "bias": jnp.asarray(bias)}


def _image(entry: GridClipImageConfig, params: Params, inputs: BranchInputs) -> Float[Array, " b"]:
    pooled, is_seen = kept_region_embeddings(inputs.features.only_level, inputs.tile_boxes)
    return image_loss(adapt(params, pooled), inputs.signals["tiles"], inputs.is_tile & is_seen)


def _init_image(
    entry: GridClipImageConfig, key: Key[Array, ""], student_dim: int, teacher_dim: int
) -> Params:
    return init_adapter(key, student_dim, teacher_dim)


GRID_BRANCH = Branch(loss=_grid, init=_init_grid, needs_heads=True)
IMAGE_BRANCH = Branch(loss=_image, needs=("tiles",), init=_init_image)
