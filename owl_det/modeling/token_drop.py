"""OWLv2's token dropping: train on the patches of an image that hold the most variance.

Source: Minderer et al. 2023 (arXiv 2306.09683), section 3.2 and appendix A.5. The criterion is the
variance of the *input pixels* of each patch, after a little uniform noise that breaks ties between
empty (padded) patches at random.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def num_kept(num_patches: int, rate: float) -> int:
    """Patches that stay; at least one."""
    return max(1, round(num_patches * (1 - rate)))


def choose_patches(
    patches: Float[Array, "b n p"], row_keys: Key[Array, " b"], *, rate: float, noise: float
) -> Int[Array, "b kept"]:
    """Indices, ascending, of the patches to keep in each image.

    `patches` are pixels in [0, 1], flattened per patch; `noise` is the upper end of U(0, noise).
    """
    noisy = patches + jax.vmap(
        lambda key: jax.random.uniform(key, patches.shape[1:], maxval=noise)
    )(row_keys)
    variance = jnp.var(noisy, axis=-1)
    _, index = jax.lax.top_k(variance, num_kept(patches.shape[1], rate))
    return jnp.sort(index, axis=-1)


def gather_tokens(x: Float[Array, "b n d"], index: Int[Array, "b k"]) -> Float[Array, "b k d"]:
    """The tokens at `index` of each image."""
    return jnp.take_along_axis(x, index[..., None], axis=1)
