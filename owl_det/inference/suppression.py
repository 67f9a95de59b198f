"""Non-maximum suppression: of boxes that overlap, the best one stays."""

import dataclasses
import warnings
from typing import TypeVar

import numpy as np

from owl_det.inference.detections import Detections, Proposals

_Found = TypeVar("_Found", Detections, Proposals)


def suppress(found: _Found, nms_iou: float | None, across_queries: bool) -> _Found:
    """Greedy non-maximum suppression; None keeps everything."""
    if nms_iou is None or not len(found):
        return found
    with warnings.catch_warnings():
        # OpenCV is no dependency: supervision says at import that it works with NumPy instead.
        warnings.filterwarnings("ignore", message="OpenCV", category=UserWarning)
        from supervision import box_non_max_suppression
    columns: list[np.ndarray] = [found.boxes, found.scores[:, None]]
    if isinstance(found, Detections) and not across_queries:
        columns.append(found.labels[:, None])
    keep = box_non_max_suppression(np.concatenate(columns, axis=1), nms_iou)
    if isinstance(found, Detections):
        kept = found.boxes[keep], found.scores[keep], found.labels[keep]
        return dataclasses.replace(found, boxes=kept[0], scores=kept[1], labels=kept[2])
    return dataclasses.replace(found, boxes=found.boxes[keep], scores=found.scores[keep])
