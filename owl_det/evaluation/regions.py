"""Region accuracy: do the dense embeddings inside a true box name what is in it?

Token embeddings are pooled over the box (`modeling.region_pool`); the nearest of all names' text embeddings is the answer. Boxes are
given, so this measures recognition alone, before and during detection training.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32, Int

from data_pipelines.features import Category
from owl_det.modeling.region_pool import region_embeddings as region_embeddings


class RegionAccuracy:
    """Counts right answers by category; `scalars` averages over the categories of each group."""

    def __init__(self, categories: Sequence[Category], top: Sequence[int] = (1, 5)) -> None:
        self.categories, self.top = tuple(categories), tuple(top)
        self._right = np.zeros((len(self.top), len(self.categories)), np.int64)
        self._count = np.zeros(len(self.categories), np.int64)
        self._index = {category.name: i for i, category in enumerate(self.categories)}

    def add(
        self,
        regions: Float32[np.ndarray, "m e"],
        names: Sequence[str],
        texts: Float32[np.ndarray, "c e"],
    ) -> None:
        """Adds regions with their true names; `texts` are those of `categories`, in order."""
        if not len(names):
            return
        truth = np.array([self._index[name] for name in names])
        scores = regions @ texts.T
        rank = (scores > scores[np.arange(len(truth)), truth][:, None]).sum(1)
        for row, top in enumerate(self.top):
            np.add.at(self._right[row], truth, rank < top)
        np.add.at(self._count, truth, 1)

    def scalars(self) -> dict[str, float]:
        """`region_top1`, `region_top5` and, for each group, `region_top1_<group>` ….

        Mean over categories (mAcc), not over regions. Groups without regions are left out.
        """
        groups = dict.fromkeys(group for category in self.categories for group in category.groups)
        members: dict[str, Bool[np.ndarray, " c"]] = {
            "": np.ones(len(self.categories), bool),
            **{
                f"_{group}": np.array([group in category.groups for category in self.categories])
                for group in groups
            },
        }
        values: dict[str, float] = {}
        for suffix, is_member in members.items():
            seen = is_member & (self._count > 0)
            if not seen.any():
                continue
            for row, top in enumerate(self.top):
                share = self._right[row, seen] / self._count[seen]
                values[f"region_top{top}{suffix}"] = float(share.mean())
        return values


def is_single_named(names: Sequence[Sequence[str]]) -> Int[np.ndarray, " r"]:
    """Indices of the instances that have exactly one name."""
    return np.flatnonzero([len(group) == 1 for group in names])
