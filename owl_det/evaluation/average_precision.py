"""Precision over recall by the protocols of COCO and LVIS, and LVIS's "fixed" AP.

`faster_coco_eval` matches detections with ground truth; which detections count is decided here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from absl import logging
from faster_coco_eval import COCO, COCOeval_faster
from jaxtyping import Float, Int32, Shaped

from owl_det.config import Protocol
from owl_det.evaluation.image_results import xyxy_to_xywh


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many of the best-scored detections count; None = all of them."""

    per_image: int | None = None  # over all categories
    per_image_and_category: int | None = None
    per_category: int | None = None  # over all images


# "lvis" is the official protocol of LVIS, "fixed" that of Dave et al. (arXiv 2102.01066), in which
# categories do not compete for the places of an image.
LIMITS: dict[Protocol, Limits] = {
    "coco": Limits(per_image_and_category=100),
    "lvis": Limits(per_image=300),
    "fixed": Limits(per_category=10_000),
}


def precision_of(
    true: Shaped[np.ndarray, " x"],
    found: Shaped[np.ndarray, " y"],
    category_ids: Int32[np.ndarray, " c"],
    limits: Limits,
) -> Float[np.ndarray, "t r c 4"]:
    """Precision at IoU thresholds, recall values, categories and sizes; all sizes come first.

    `true` and `found` are rows (`TRUE_ROW`, `FOUND_ROW`) of these categories alone. -1 where there
    is no ground truth.
    """
    if limits.per_category is not None:
        # Before unjudged ones are left out: they take places too (arXiv 2102.01066, section 5).
        found = _best_of_each_category(found, limits.per_category)
    found = found[found["is_evaluated"]]
    image_ids = np.union1d(true["image_id"], found["image_id"]).tolist()
    # `lvis_mark`: a detection that is no error where it matches nothing.
    run = COCOeval_faster(
        _dataset(
            image_ids, category_ids, true, {"area": true["area"], "iscrowd": true["is_crowd"]}
        ),
        _dataset(
            image_ids,
            category_ids,
            found,
            {"score": found["score"], "lvis_mark": found["is_exempt"]},
        ),
        "bbox",
        print_function=logging.debug,
    )
    # Beyond this no image or category has any.
    run.params.maxDets = [limits.per_image_and_category or max(1, len(found))]
    run.evaluate()
    run.accumulate()
    return run.eval["precision"][..., 0]


def _best_of_each_category(found: Shaped[np.ndarray, " x"], limit: int) -> Shaped[np.ndarray, " y"]:
    order = np.lexsort((-found["score"], found["category"]))
    categories = found["category"][order]
    rank = np.arange(len(found)) - np.searchsorted(categories, categories)
    return found[np.sort(order[rank < limit])]


def _dataset(
    image_ids: Sequence[int],
    category_ids: Int32[np.ndarray, " c"],
    rows: Shaped[np.ndarray, " x"],
    columns: dict[str, np.ndarray],
) -> COCO:
    boxes_xywh = xyxy_to_xywh(rows["box_xyxy"])
    columns = {
        # Ids start at 1: the library reads 0 as "unmatched".
        "id": np.arange(1, len(rows) + 1),
        "image_id": rows["image_id"],
        "category_id": rows["category"],
        "bbox": boxes_xywh,
        "area": np.prod(boxes_xywh[:, 2:], axis=1),
        "iscrowd": np.zeros(len(rows), int),
    } | columns
    values = [
        column.astype(int).tolist() if column.dtype == bool else column.tolist()
        for column in columns.values()
    ]
    return COCO(
        {
            "images": [{"id": image_id} for image_id in image_ids],
            "categories": [{"id": category_id} for category_id in category_ids.tolist()],
            "annotations": [
                dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)
            ],
        }
    )
