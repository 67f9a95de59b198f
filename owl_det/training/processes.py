"""What the processes of one run must agree on."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def value_of_first_process(value: int) -> int:
    """The value that process 0 has; files may reach the others later."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.array(value, np.int32)))
