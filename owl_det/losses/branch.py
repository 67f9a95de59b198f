"""What a distillation branch is, and what it may look at."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def masked_mean(
    values: Float[Array, "*b r"], is_counted: Bool[Array, "*b r"]
) -> Float[Array, "*b"]:
    """The mean of the counted values of each example; 0 where none is, with a gradient of 0."""
    total = jnp.where(is_counted, values, 0.0).sum(-1)
    return total / jnp.maximum(is_counted.sum(-1), 1)
