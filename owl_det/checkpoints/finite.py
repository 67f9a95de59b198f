"""Numbers that are none: NaN and infinity in parameters are refused where they enter."""

import jax
import numpy as np

from owl_det.errors import CheckpointError
from owl_det.types import Params


def count_not_finite(values: np.ndarray) -> int:
    """How many values are NaN or infinite; 0 of integers."""
    if values.dtype.kind in "biu":
        return 0
    # A sum is finite only if all values are, costs half of the exact test and needs no memory.
    with np.errstate(all="ignore"):
        if np.isfinite(np.sum(values)):
            return 0
    return values.size - int(np.count_nonzero(np.isfinite(values)))


def refuse(where: str, name: str, values: np.ndarray) -> None:
    """Raises `CheckpointError` naming the tensor `name` if a value is NaN or infinite."""
    if count := count_not_finite(values):
        raise CheckpointError(
            f"{where}: {count} of the {values.size} values of {name} are NaN or infinite, so that "
            "the model computes nothing; take a checkpoint from before its training diverged, or "
            "write the file again"
        )


def require_finite(params: Params, where: str) -> None:
    """Raises `CheckpointError` naming the first parameter with a value that is NaN or infinite.

    Every parameter lies on one device, or in NumPy.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        # A view of this very array would keep its copy from an accelerator as long as it lives.
        values = leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        refuse(where, name, np.asarray(values))
