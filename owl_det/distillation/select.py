"""Which objects of an image a teacher looks at, where there are more than it should crop."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped


def choose_instances(
    boxes: Float[Array, "b m 4"], is_instance: Bool[Array, "b m"], count: int
) -> Int[Array, "b k"]:
    """Indices of `count` real instances of each image (and of fillers where there are fewer).

    All slots, in their order, where `count` is no less. Else in the order of a hash of the boxes:
    no object of a file, and no tile of a mosaic, is left out for coming last, and whoever has the
    same batch makes the same choice.
    """
    num_images, num_slots = is_instance.shape
    if count >= num_slots:
        return jnp.tile(jnp.arange(num_slots), (num_images, 1))
    bits = jax.lax.bitcast_convert_type(boxes.astype(jnp.float32), jnp.uint32)
    multipliers = jnp.array([2654435761, 2246822519, 3266489917, 668265263], jnp.uint32)
    mixed = (bits * multipliers[None, None]).sum(-1, dtype=jnp.uint32)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(2246822519)
    order = jnp.where(is_instance, mixed >> 1, jnp.uint32(0xFFFFFFFF))
    return jnp.argsort(order, axis=-1, stable=True)[:, :count]


def take_rows(x: Shaped[Array, "b m *d"], index: Int[Array, "b k"]) -> Shaped[Array, "b k *d"]:
    """The entries of each image at `index`."""
    return jax.vmap(lambda row, i: row[i])(x, index)
