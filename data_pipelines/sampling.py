"""Which raw images make up example number i: a pure function of (seed, i).

Every example owns a fixed number of slots in an endless stream of raw images (one slot per tile of
the largest mosaic). A slot picks a source by the mixture weights, and its image from that source's
permutation of the slot's epoch. So the order does not depend on the number of processes, and a
resumed run needs nothing but the number of the next example.
"""

import threading
from collections.abc import Sequence
from functools import lru_cache

import numpy as np


class Mixture:
    """A weighted mixture of random-access sources."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        self.sizes = tuple(sizes)
        self.cumulative = np.cumsum(weights) / np.sum(weights)
        self.seed = seed
        self._permutation = lru_cache(maxsize=2 * len(self.sizes))(self._draw_permutation)
        self._lock = threading.Lock()  # input threads must not each draw the same permutation

    def locate(self, slot: int, attempt: int = 0) -> tuple[int, int]:
        """(source, index in it) of a slot; `attempt` > 0 names stand-ins for unreadable images."""
        source = 0
        if len(self.sizes) > 1:
            draw = np.random.default_rng([self.seed, 1, slot]).random()
            source = int(np.searchsorted(self.cumulative, draw, side="right"))
            source = min(source, len(self.sizes) - 1)
        size = self.sizes[source]
        epoch, position = divmod(slot, size)
        # Far from the images of this batch, and never back to the same one (both are primes).
        stride = 7919 if size % 7919 else 7907
        stand_in = (position + attempt * stride) % size
        with self._lock:
            permutation = self._permutation(source, epoch)
        return source, int(permutation[stand_in])

    def _draw_permutation(self, source: int, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, 2, source, epoch])
        return rng.permutation(self.sizes[source])


def example_rng(seed: int, example: int) -> np.random.Generator:
    """The generator that everything random about one example is drawn from."""
    return np.random.default_rng([seed, 0, example])


def negatives_rng(seed: int, example: int) -> np.random.Generator:
    """The generator that draws an example's negatives from the rest of its batch."""
    return np.random.default_rng([seed, 3, example])


def regions_rng(seed: int, example: int) -> np.random.Generator:
    """The generator that draws the regions where a teacher looks at an example."""
    return np.random.default_rng([seed, 4, example])
