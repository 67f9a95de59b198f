"""What was found in one image, in its own pixels; from ranked pairs and tokens to that."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int32

from data_pipelines import image_ops
from data_pipelines.image_ops import Geometry
from owl_det.inference import ranking
from owl_det.types import TokenEmbeddings


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first."""

    boxes: Float32[np.ndarray, "n 4"]  # x0, y0, x1, y1 in pixels of the image, inside it
    scores: Float32[np.ndarray, " n"]  # in (0, 1)
    labels: Int32[np.ndarray, " n"]  # index into the queries
    queries: tuple[str, ...] = field(default=(), compare=False)  # all that were asked

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        """`Detections(2: cat 0.91 [10 20 110 95], dog 0.33 [0 5 40 60])`; the first ten."""
        names = self.names or tuple(f"query {label}" for label in self.labels)
        shown = [
            f"{name} {score:.2f} [{' '.join(f'{side:.0f}' for side in box)}]"
            for name, score, box in zip(names[:10], self.scores, self.boxes, strict=False)
        ]
        rest = ", …" if len(self) > len(shown) else ""
        return f"Detections({len(self)}: {', '.join(shown)}{rest})" if shown else "Detections(0)"

    @property
    def names(self) -> tuple[str, ...]:
        """The query of each detection, in words; none if `queries` is empty."""
        return tuple(self.queries[label] for label in self.labels) if self.queries else ()


@dataclass(frozen=True)
class Proposals:
    """Boxes of one image that look like objects of whatever kind, best first."""

    boxes: Float32[np.ndarray, "n 4"]  # x0, y0, x1, y1 in pixels of the image, inside it
    scores: Float32[np.ndarray, " n"]  # objectness in (0, 1)

    def __len__(self) -> int:
        return len(self.scores)


def of_pairs(
    pairs: ranking.TopPairs,
    sizes: Sequence[tuple[int, int]],
    queries: tuple[str, ...],
    is_asked: Bool[np.ndarray, " q"],
    threshold: float,
    geometry: Geometry,
) -> list[Detections]:
    """Of each image (the rows beyond are fillers) what reaches the threshold, in its pixels.

    Pairs of fillers, of queries that are not asked and of boxes in the padding (which score
    `ranking.OUTSIDE`) are left out. Raises `CheckpointError` if the model
    computes NaN.
    """
    boxes, scores, labels = (np.asarray(x)[: len(sizes)] for x in pairs)
    ranking.require_finite("detection", scores, boxes)
    keep = (scores >= threshold) & np.append(is_asked, False)[np.minimum(labels, len(queries))]
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32)
    found = [Detections(*nothing, queries)] * len(sizes)
    for row in np.flatnonzero(keep.any(axis=1)).tolist():
        here = keep[row]
        found[row] = Detections(
            ranking.pixel_boxes(boxes[row, here], *sizes[row], geometry),
            scores[row, here],
            labels[row, here].astype(np.int32),
            queries,
        )
    return found


def of_tokens(
    tokens: TokenEmbeddings,
    sizes: Sequence[tuple[int, int]],
    threshold: float,
    geometry: Geometry,
) -> list[Proposals]:
    """All boxes of each image that reach the threshold, best first, in its pixels.

    Raises `CheckpointError` if the model computes NaN.
    """
    scores = np.asarray(jax.nn.sigmoid(tokens.objectness_logits))
    boxes = np.asarray(tokens.boxes)
    ranking.require_finite("proposals", scores, boxes)
    found: list[Proposals] = []
    for row, (height, width) in enumerate(sizes):
        order = np.argsort(-scores[row], kind="stable")
        order = order[scores[row, order] >= threshold]
        pixels = image_ops.boxes_from_padded(boxes[row, order], height, width, geometry)
        kept = ranking.has_area(pixels)  # others lie in the padding
        found.append(Proposals(pixels[kept], scores[row, order][kept]))
    return found
