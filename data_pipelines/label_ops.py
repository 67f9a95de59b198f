"""What augmentation does to labels: merge, crop, drop. NumPy only; boxes are xyxy in pixels."""

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64

from data_pipelines.features import Names


class Instances(NamedTuple):
    """The labels of one image, one entry an instance. Fields as in `features.Record`."""

    boxes_xyxy: Float32[np.ndarray, "m 4"]
    names: tuple[Names, ...]
    scores: Float32[np.ndarray, " m"]
    is_crowd: Bool[np.ndarray, " m"]

    def select(self, keep: Bool[np.ndarray, " m"]) -> "Instances":
        """The instances where `keep` is True, in order."""
        if keep.all():
            return self
        names = self.names_where(keep)
        return Instances(self.boxes_xyxy[keep], names, self.scores[keep], self.is_crowd[keep])

    def names_where(self, keep: Bool[np.ndarray, " m"]) -> tuple[Names, ...]:
        """The names of the instances where `keep` is True, in order."""
        return tuple(itertools.compress(self.names, keep.tolist()))


def clip_boxes(
    boxes_xyxy: Float[np.ndarray, "m 4"], height: float, width: float
) -> Float32[np.ndarray, "m 4"]:
    """Moves corners outside the image to its edge."""
    return np.clip(boxes_xyxy, 0, [width, height, width, height]).astype(np.float32)


def drop_degenerate(
    boxes_xyxy: Float[np.ndarray, "m 4"], height: float, width: float
) -> Bool[np.ndarray, " m"]:
    """Which boxes to keep: finite, and wider and higher than 0 once clipped to the image."""
    clipped = clip_boxes(boxes_xyxy, height, width)
    is_wide, is_high = (clipped[:, 2:] > clipped[:, :2]).T
    return is_wide & is_high & np.isfinite(boxes_xyxy).all(axis=1)


def merge_instances(
    boxes_xyxy: Float32[np.ndarray, "m 4"],
    names: tuple[Names, ...],
    scores: Float32[np.ndarray, " m"],
    is_crowd: Bool[np.ndarray, " m"],
    iou: float,
    rng: np.random.Generator,
) -> Instances:
    """Merges instances that overlap: data sets box one object once for each of its names.

    Instances are visited in random order; one that is still there takes in all others whose boxes
    overlap its own at IoU >= `iou` (in (0, 1]). Its box and its place in the order stay, names are
    unioned in the order of the input, and the highest score counts. Crowd regions take no part.
    """
    overlaps = pairwise_iou(boxes_xyxy, boxes_xyxy) >= iou
    # An instance goes with itself whatever its box, or it would vanish.
    overlaps |= np.eye(len(boxes_xyxy), dtype=bool)
    is_left = ~np.asarray(is_crowd, bool)
    keep, merged, scores = np.asarray(is_crowd, bool).copy(), list(names), scores.copy()
    for index in rng.permutation(len(boxes_xyxy)):
        if not is_left[index]:
            continue
        group = np.flatnonzero(overlaps[index] & is_left)
        is_left[group] = False
        keep[index] = True
        merged[index] = tuple(dict.fromkeys(name for i in group for name in names[i]))
        scores[index] = scores[group].max()
    return Instances(boxes_xyxy, tuple(merged), scores, is_crowd).select(keep)


def crop_instances(
    instances: Instances, crop_xyxy: tuple[int, int, int, int], keep: float
) -> tuple[Instances, Names]:
    """Labels of a crop, with boxes clipped to it and relative to its top left corner.

    An instance stays if at least `keep` (0 to 1) of its box's area is inside. A crowd region stays
    wherever it is visible, because it only says what not to judge. Also returned: the names of
    instances that were dropped though a part of them is visible; they are neither labelled nor
    absent.
    """
    x0, y0, x1, y1 = crop_xyxy
    shifted = instances.boxes_xyxy - np.array([x0, y0, x0, y0], np.float32)
    clipped = clip_boxes(shifted, y1 - y0, x1 - x0)
    visible = _area(clipped)
    is_kept = visible >= keep * _area(instances.boxes_xyxy)
    is_kept = (is_kept | instances.is_crowd) & (visible > 0)
    hidden = instances.names_where((visible > 0) & ~is_kept)
    cropped = instances._replace(boxes_xyxy=clipped).select(is_kept)
    return cropped, tuple(dict.fromkeys(name for names in hidden for name in names))


def flip_boxes(boxes_xyxy: Float32[np.ndarray, "m 4"], width: int) -> Float32[np.ndarray, "m 4"]:
    """Boxes after the image, `width` pixels wide, is mirrored left to right."""
    x0, y0, x1, y1 = boxes_xyxy.T
    return np.stack([width - x1, y0, width - x0, y1], axis=1).astype(np.float32)


def pairwise_iou(
    a_xyxy: Float32[np.ndarray, "p 4"], b_xyxy: Float32[np.ndarray, "m 4"]
) -> Float64[np.ndarray, "p m"]:
    """Intersection over union of every pair; 0 where both boxes are empty."""
    a, b = a_xyxy.astype(np.float64), b_xyxy.astype(np.float64)
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = (high - low).clip(0).prod(axis=-1)
    union = _area(a)[:, None] + _area(b)[None, :] - intersection
    return intersection / np.maximum(union, np.finfo(np.float64).tiny)


def _area(boxes_xyxy: np.ndarray) -> np.ndarray:
    size = boxes_xyxy[:, 2:].astype(np.float64) - boxes_xyxy[:, :2]
    return size.clip(0).prod(axis=1)
