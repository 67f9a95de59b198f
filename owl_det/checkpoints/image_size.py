"""A model for images of another size: its grid of positions is resized."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float

from owl_det.errors import CheckpointError
from owl_det.types import LoadedModel


def resized(model: LoadedModel, image_size: int) -> LoadedModel:
    """The model for squares of another side, in pixels; its position grid is resized linearly.

    Raises `CheckpointError` if the side is not a multiple of the patch size, or the model is a
    ResNet, whose attention pool is of one size.
    """
    if image_size == model.config.image_size:
        return model
    patch_size = model.config.image.stride
    if model.is_resnet:
        raise CheckpointError(f"image size {image_size}: a ResNet takes {model.config.image_size}")
    if image_size <= 0 or image_size % patch_size:
        raise CheckpointError(
            f"image size {image_size}: not a multiple of the patch size {patch_size}"
        )
    image = dict(model.params["image"])
    positions = image["position_embedding"]
    side = model.config.grid_side
    num_other = positions.shape[0] - side * side
    num_positions = num_other + (image_size // patch_size) ** 2
    image["position_embedding"] = resize_positions(positions, num_positions)
    return dataclasses.replace(
        model,
        params={**model.params, "image": image},
        config=dataclasses.replace(model.config, image_size=image_size),
    )


def resize_positions(
    positions: Float[Array | np.ndarray, "p d"], num_positions: int
) -> Float[Array | np.ndarray, "q d"]:
    """Resizes the grid; a class token's position, in front of a square number of others, stays."""
    if positions.shape[0] == num_positions:
        return positions
    old, new = math.isqrt(positions.shape[0]), math.isqrt(num_positions)
    first = positions[: positions.shape[0] - old * old]
    logging.info("Position grid resized from %d x %d to %d x %d", old, old, new, new)
    grid = positions[first.shape[0] :].reshape(old, old, -1)
    grid = jax.image.resize(grid, (new, new, grid.shape[-1]), "linear")
    return jnp.concatenate([first, grid.reshape(new * new, -1)])
