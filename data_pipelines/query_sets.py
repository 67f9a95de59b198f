"""The queries of one image, and what its instances are labelled as among them.

What is not asked is not supervised: positives first, then names known to be absent, then
pseudo-negatives, drawn in proportion to their frequency until there are `min_queries` (as the
authors do; arXiv 2205.06230, section 3.2). What does not fit is counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float64

from data_pipelines.features import Category, Names

_MANY_NAMES = 10_000  # a look at each of more, for every image, would hold up training
_ATTEMPTS = 20


@dataclass(frozen=True)
class Pool:
    """Names that pseudo-negatives are drawn from, with their probabilities."""

    names: Names
    probabilities: Float64[np.ndarray, " p"]

    @classmethod
    def of(cls, categories: Sequence[Category]) -> "Pool":
        """All names of some sources; a name that several share adds up its frequencies."""
        frequency: dict[str, float] = {}
        for category in categories:
            frequency[category.name] = frequency.get(category.name, 0.0) + category.frequency
        weights = np.maximum(np.array(list(frequency.values()), np.float64), 1e-12)
        return cls(tuple(frequency), weights / weights.sum() if len(weights) else weights)

    def draw(self, count: int, exclude: set[str], rng: np.random.Generator) -> list[str]:
        """Up to `count` distinct names that are not in `exclude`."""
        if len(self.names) > _MANY_NAMES:
            few = self._draw_few(count, exclude, rng)
            if len(few) == count:
                return few
        is_free = np.array([name not in exclude for name in self.names], bool)
        count = min(count, int(is_free.sum()))
        if count <= 0:
            return []
        weights = np.where(is_free, self.probabilities, 0.0)
        chosen = rng.choice(len(self.names), count, replace=False, p=weights / weights.sum())
        return [self.names[i] for i in chosen]

    def _draw_few(self, count: int, exclude: set[str], rng: np.random.Generator) -> list[str]:
        """The same without a look at every name: draws again what is excluded or drawn already.

        Fewer than `count` where that takes too long, as what is left is improbable.
        """
        drawn: dict[str, None] = {}
        for _ in range(_ATTEMPTS):
            places = np.searchsorted(self._cumulative, rng.random(count), side="right")
            for place in np.minimum(places, len(self.names) - 1):
                name = self.names[place]
                if len(drawn) < count and name not in exclude:
                    drawn[name] = None
            if len(drawn) == count:
                break
        return list(drawn)

    @cached_property
    def _cumulative(self) -> Float64[np.ndarray, " p"]:
        return np.cumsum(self.probabilities)


@dataclass(frozen=True)
class QuerySet:
    names: Names  # of the queries asked
    labels: Bool[np.ndarray, "m q"]  # multi-hot; an instance without one is not supervised
    num_dropped: int  # positives that did not fit


def make(
    instance_names: Sequence[Names],
    negatives: Names,
    pool: Pool,
    *,
    excluded: Names = (),
    max_queries: int,
    min_queries: int,
    rng: np.random.Generator,
) -> QuerySet:
    """Chooses up to `max_queries` names to ask and labels the instances with them.

    `excluded` names are in the picture without (all) their boxes: never drawn as pseudo-negatives.
    """
    positives = list(dict.fromkeys(name for names in instance_names for name in names))
    asked = positives
    if len(positives) > max_queries:
        # A random choice, so that no tile of a mosaic loses its labels for coming last.
        keep = np.sort(rng.permutation(len(positives))[:max_queries])
        asked = [positives[i] for i in keep]
    known = [name for name in dict.fromkeys(negatives) if name not in set(positives)]
    if len(known) > max_queries - len(asked):
        keep = np.sort(rng.permutation(len(known))[: max_queries - len(asked)])
        known = [known[i] for i in keep]
    asked = [*asked, *known]
    if len(asked) < min_queries:
        asked += pool.draw(min_queries - len(asked), {*asked, *positives, *excluded}, rng)
    column = {name: i for i, name in enumerate(asked)}
    labels = np.zeros((len(instance_names), len(asked)), bool)
    for row, names in enumerate(instance_names):
        for name in names:
            if name in column:
                labels[row, column[name]] = True
    return QuerySet(tuple(asked), labels, max(0, len(positives) - max_queries))
