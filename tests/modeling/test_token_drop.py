"""Token dropping: the patches of highest variance stay, ties are broken at random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from owl_det.modeling.token_drop import choose_patches, gather_tokens, num_kept


def _keys(seed: int, count: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize(
    ("patches", "rate", "kept"), [(16, 0.0, 16), (16, 0.5, 8), (3600, 0.5, 1800), (4, 0.99, 1)]
)
def test_number_of_patches_kept(patches: int, rate: float, kept: int) -> None:
    assert num_kept(patches, rate) == kept


def test_patches_of_highest_variance_stay_in_grid_order() -> None:
    rng = np.random.default_rng(0)
    spread = np.stack([rng.permutation(np.arange(12)) for _ in range(3)]) / 12
    patches = 0.5 + spread[..., None] * rng.choice([-0.5, 0.5], (3, 12, 48))
    index = choose_patches(jnp.asarray(patches, jnp.float32), _keys(0, 3), rate=0.5, noise=0.01)
    for row in range(3):
        np.testing.assert_array_equal(index[row], np.flatnonzero(spread[row] >= 0.5))


def test_empty_patches_are_chosen_at_random() -> None:
    patches = jnp.full((40, 16, 48), 0.5).at[:, 3].add(jnp.linspace(-0.3, 0.3, 48))
    index = np.asarray(choose_patches(patches, _keys(1, 40), rate=0.5, noise=0.01))
    assert (index == 3).any(axis=1).all()
    counts = np.bincount(index.ravel(), minlength=16)
    assert (counts > 0).all(), "without noise the first padded patches would always win"
    again = choose_patches(patches, _keys(1, 40), rate=0.5, noise=0.01)
    np.testing.assert_array_equal(index, again)


def test_rate_zero_keeps_every_patch_in_place() -> None:
    patches = jnp.asarray(np.random.default_rng(2).random((2, 9, 12)), jnp.float32)
    index = choose_patches(patches, _keys(2, 2), rate=0.0, noise=0.01)
    np.testing.assert_array_equal(index, np.tile(np.arange(9), (2, 1)))
    np.testing.assert_array_equal(gather_tokens(patches, index), patches)


def test_gather_takes_each_images_own_tokens() -> None:
    tokens = jnp.arange(24.0).reshape(2, 4, 3)
    taken = gather_tokens(tokens, jnp.array([[3, 0], [1, 1]]))
    np.testing.assert_array_equal(taken[0], [[9, 10, 11], [0, 1, 2]])
    np.testing.assert_array_equal(taken[1], [[15, 16, 17], [15, 16, 17]])
