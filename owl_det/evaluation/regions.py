"""Region accuracy: do the dense embeddings inside a true box name what is in it?

Token embeddings are pooled over the box (`modeling.region_pool`); the nearest of all names' text
embeddings is the answer. Boxes are given, so this measures recognition alone, before and during
detection training. The pointing game (Zhang et al. 2016, arXiv 1608.00507) asks the reverse: is the
token that is most similar to a name inside an object of that name? `region_evaluation` measures
masks and whole images too.
"""

import math
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32

from data_pipelines import image_ops
from data_pipelines.features import Category, Record
from owl_det.modeling.region_pool import region_embeddings


class NameAccuracy:
    """Counts right answers by category; `scalars` averages over the categories of each group.

    `texts` are embeddings of the categories, in order, in each of t prompts; their mean counts.
    """

    def __init__(
        self,
        categories: Sequence[Category],
        texts: Float[np.ndarray, "t c e"],
        prefix: str,
        top: Sequence[int] = (1, 5),
    ) -> None:
        self.categories, self.prefix, self.top = tuple(categories), prefix, tuple(top)
        unit = texts / np.linalg.norm(texts, axis=-1, keepdims=True)
        self._texts = unit.astype(np.float32).mean(axis=0)
        self._right = np.zeros((len(self.top), len(self.categories)), np.int64)
        self._count = np.zeros(len(self.categories), np.int64)
        self._index = {category.name: i for i, category in enumerate(self.categories)}
        self._texts /= np.linalg.norm(self._texts, axis=-1, keepdims=True)

    def add_named(self, embeddings: Float[np.ndarray, "m e"], names: Sequence[str]) -> None:
        """Adds embeddings with their true names; a name that is no category raises `KeyError`."""
        truth = np.array([self._index[name] for name in names], int)
        scores = embeddings @ self._texts.T
        # A tie, or a score that is no number, counts against the truth.
        rank = (~(scores < scores[np.arange(len(truth)), truth][:, None])).sum(1) - 1
        for row, top in enumerate(self.top):
            np.add.at(self._right[row], truth, rank < top)
        np.add.at(self._count, truth, 1)

    def scalars(self) -> dict[str, float]:
        """`<prefix>_top1`, `<prefix>_top5` and, for each group, `<prefix>_top1_<group>` …

        Mean over categories (mAcc), not over what was added. Groups without any are left out.
        """
        values: dict[str, float] = {}
        for suffix, is_member in self._groups().items():
            seen = is_member & (self._count > 0)
            if not seen.any():
                continue
            for row, top in enumerate(self.top):
                share = self._right[row, seen] / self._count[seen]
                values[f"{self.prefix}_top{top}{suffix}"] = float(share.mean())
        return values

    def _groups(self) -> dict[str, Bool[np.ndarray, " c"]]:
        """Which categories are in each group, by the suffix of its metrics; "" has all."""
        groups = dict.fromkeys(group for category in self.categories for group in category.groups)
        return {
            "": np.ones(len(self.categories), bool),
            **{
                f"_{group}": np.array([group in category.groups for category in self.categories])
                for group in groups
            },
        }


class RegionAccuracy(NameAccuracy):
    """Of true boxes, crowd regions and instances of several names excepted, and the pointing game.

    `scalars` has `pointing` too: the share of names of an image that hit, mean over categories, and
    `pointing_chance`, the share that a token drawn at random would hit.
    """

    def __init__(self, categories: Sequence[Category], texts: Float[np.ndarray, "t c e"]) -> None:
        super().__init__(categories, texts, "region")
        # By category: names asked of images, those hit, and those that chance would hit.
        self._asked, self._hit, self._chance = np.zeros((3, len(self.categories)))

    def add(
        self,
        embeddings: Float[np.ndarray, "b n e"],
        records: Sequence[Record | None],
        geometry: Literal["pad", "stretch"],
    ) -> None:
        """Adds images: dense embeddings of a square grid, and the true boxes (None: unreadable)."""
        side = math.isqrt(embeddings.shape[1])
        chosen = [_boxes_of(record, geometry) if record else None for record in records]
        most = max((len(boxes) for boxes, _ in filter(None, chosen)), default=0)
        # Few distinct shapes, so that little is compiled.
        boxes = np.zeros((embeddings.shape[0], -(-max(most, 1) // 8) * 8, 4), np.float32)
        for row, entry in enumerate(chosen):
            if entry:
                boxes[row, : len(entry[0])] = entry[0]
        pooled = np.asarray(_region_embeddings(embeddings, boxes, side, side))
        for row, entry in enumerate(chosen):
            if entry:
                self.add_named(pooled[row, : len(entry[1])], entry[1])
                self._point(embeddings[row], *entry, side)

    def _point(
        self,
        embeddings: Float[np.ndarray, "n e"],
        boxes_cxcywh: Float32[np.ndarray, "m 4"],
        names: Sequence[str],
        side: int,
    ) -> None:
        """Asks one image for each of its names."""
        if not names:
            return
        unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=-1, keepdims=True), 1e-12)
        middle = (np.arange(side) + 0.5) / side
        centres = np.stack([np.tile(middle, side), np.repeat(middle, side)], axis=-1)
        distance = np.abs(centres[None] - boxes_cxcywh[:, None, :2])
        is_inside = np.all(distance <= boxes_cxcywh[:, None, 2:] / 2, axis=-1)
        for name in dict.fromkeys(names):
            is_target = np.any(is_inside[[other == name for other in names]], axis=0)
            category = self._index[name]
            self._asked[category] += 1
            self._hit[category] += is_target[np.argmax(unit @ self._texts[category])]
            self._chance[category] += is_target.mean()

    def scalars(self) -> dict[str, float]:
        values = super().scalars()
        for suffix, is_member in self._groups().items():
            seen = is_member & (self._asked > 0)
            if seen.any():
                for key, count in (("pointing", self._hit), ("pointing_chance", self._chance)):
                    values[f"{key}{suffix}"] = float((count[seen] / self._asked[seen]).mean())
        return values


_region_embeddings = jax.jit(region_embeddings, static_argnums=(2, 3))


def _boxes_of(
    record: Record, geometry: Literal["pad", "stretch"]
) -> tuple[Float32[np.ndarray, "m 4"], list[str]]:
    """Boxes (cxcywh, relative to the square) and names of the instances that count."""
    rows = [i for i, names in enumerate(record.names) if len(names) == 1 and not record.is_crowd[i]]
    height, width = image_ops.image_size(record.image)
    boxes = image_ops.boxes_to_padded(record.boxes_xyxy[rows], height, width, geometry)
    return boxes, [record.names[i][0] for i in rows]
