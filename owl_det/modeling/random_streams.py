"""The uses of randomness in a step; each has keys of its own, folded from an example's key."""

import enum

import jax
from jaxtyping import Array, Key


class RandomStream(enum.IntEnum):
    """Numbers are part of a run: another number is another noise."""

    BLOCKS = 0  # dropped layers and activations
    TOKEN_DROP = 1  # patches that are left out
    NEGATIVES = 2  # tokens that the class loss counts (`loss.negative_share`)
    BRANCHES = 3  # distillation


def stream_keys(keys: Key[Array, " b"], stream: RandomStream) -> Key[Array, " b"]:
    """The keys of one use of randomness, one an example."""
    return jax.vmap(lambda key: jax.random.fold_in(key, int(stream)))(keys)
