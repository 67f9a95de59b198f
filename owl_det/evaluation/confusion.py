"""The confusion matrix of a detector: which category is taken for which."""

import numpy as np
from faster_coco_eval import mask as coco_mask
from jaxtyping import Float, Int

from owl_det.evaluation.coco import CocoEvaluator
from owl_det.evaluation.image_results import ImageResult, xyxy_to_xywh

_NONE = np.iinfo(np.int32).min  # no category id of any data set


def confusion_matrix(
    evaluator: CocoEvaluator, iou: float = 0.5, score: float = 0.3
) -> Int[np.ndarray, "c c"]:
    """Counts of true (rows) against predicted (columns) categories.

    Categories come in the order of `evaluator.categories` (by id); c is their number and one: the
    last row is background (false detections), the last column missed instances. In each
    image the detections that score at least `score` choose in that order the free instance of
    any category with the largest IoU, if it is at least `iou`; equal ones are chosen by category.
    Detections in a crowd region of their category and those that federated labels exempt do not
    count as false.
    """
    ids = np.array([category.id for category in evaluator.categories], np.int32)
    matrix = np.zeros((len(ids) + 1, len(ids) + 1), np.int64)
    for image in evaluator.images:
        pairs = _match(image, iou, score)
        np.add.at(matrix, (_position(ids, pairs[:, 0]), _position(ids, pairs[:, 1])), 1)
    return matrix


def _match(image: ImageResult, iou: float, score: float) -> Int[np.ndarray, "x 2"]:
    """(true, predicted) category ids of all matches, misses and false detections of an image."""
    order = np.argsort(-image.scores, kind="stable")
    order = order[(image.scores[order] >= score) & image.is_evaluated[order]]
    overlaps = _overlaps(image)
    is_free = ~image.is_crowd
    pairs = []
    for index in order:
        category = image.categories[index]
        candidates = np.flatnonzero(is_free & (overlaps[index] >= iou))
        if candidates.size:
            is_same = image.true_categories[candidates] == category
            best = candidates[np.lexsort((is_same, overlaps[index, candidates]))[-1]]
            is_free[best] = False
            pairs.append((image.true_categories[best], category))
            continue
        is_own_crowd = image.is_crowd & (image.true_categories == category)
        if not (image.is_exempt[index] or (overlaps[index, is_own_crowd] >= iou).any()):
            pairs.append((_NONE, category))
    pairs += [(category, _NONE) for category in image.true_categories[is_free]]
    return np.array(pairs, np.int32).reshape(-1, 2)


def _overlaps(image: ImageResult) -> Float[np.ndarray, "p m"]:
    """IoU of detections and ground truth; with a crowd region, the share that lies in it."""
    shape = len(image.boxes_xyxy), len(image.true_boxes_xyxy)
    if 0 in shape:
        return np.zeros(shape)
    found, true = xyxy_to_xywh(image.boxes_xyxy), xyxy_to_xywh(image.true_boxes_xyxy)
    return np.asarray(coco_mask.iou(found, true, image.is_crowd.astype(np.uint8).tolist()))


def _position(ids: Int[np.ndarray, " c"], values: Int[np.ndarray, " x"]) -> Int[np.ndarray, " x"]:
    return np.where(values == _NONE, len(ids), np.searchsorted(ids, values))
