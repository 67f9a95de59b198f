"""The identity of a model: a hash of its parameters."""

import hashlib

import jax
import numpy as np
from jaxtyping import PyTree

from owl_det.path_rules import path_name


def parameter_hash(params: PyTree) -> str:
    """Sixteen hex digits that change with any value, shape or name of the parameters."""
    content = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in sorted(leaves, key=lambda item: path_name(item[0])):
        values = np.asarray(leaf)
        content.update(f"{path_name(path)} {values.dtype} {values.shape}\n".encode())
        content.update(np.ascontiguousarray(values).tobytes())
    return content.hexdigest()[:16]
