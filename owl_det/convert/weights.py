"""Weight files of other programs, read without running any code from them.

Shapes and dtypes come from the header; a tensor is read when it is asked for. Pickles (`.pt`,
`.bin`, `.pkl`, object arrays in `.npz`) are refused, whatever their ending says.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

MAX_TENSOR_BYTES = 16 * 2**30  # in float32; the largest published tensor here has 1.6 GB


@dataclass(frozen=True)
class Weights:
    """Named tensors of a file or folder."""

    source: str  # for messages
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]  # float32; raises CheckpointError
