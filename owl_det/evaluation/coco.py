"""Detection metrics by the protocols of COCO and LVIS, and LVIS's "fixed" AP.

`CocoEvaluator` takes one image after the other and keeps its boxes as rows in files (`rows`);
`compute` hands them to `faster_coco_eval`, some categories at a time. So memory depends on neither
the number of images nor that of detections (categories are independent of each other).
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from data_pipelines.features import Category
from owl_det import files
from owl_det.config import Protocol
from owl_det.errors import DataError
from owl_det.evaluation.average_precision import LIMITS, precision_of
from owl_det.evaluation.image_results import (
    FOUND_ROW,
    TRUE_ROW,
    ImageResults,
    xyxy_to_xywh,
)
from owl_det.evaluation.metrics import Metrics, metrics_of

# Boxes are in pixels of the raw image. The arrays of a tuple have one length, which `add` checks.
TrueBoxes: TypeAlias = tuple[
    Float[np.ndarray, "_ 4"], Int[np.ndarray, " _"], Bool[np.ndarray, " _"]
]  # boxes_xyxy, category ids, is_crowd
DetectedBoxes: TypeAlias = tuple[
    Float[np.ndarray, "_ 4"], Float[np.ndarray, " _"], Int[np.ndarray, " _"]
]  # boxes_xyxy, scores, category ids

# What faster_coco_eval is given at once. It makes a dictionary of every box and a table of every
# (image, category) pair: some hundred bytes each.
_ROWS_AT_ONCE = 100_000
_PAIRS_AT_ONCE = 200_000
_MAX_AREA = 1e10  # pixels; the library's largest


class CocoEvaluator:
    """Collects ground truth and detections image by image and measures them.

    `categories` are those evaluated, each with its groups; `protocol` says how many detections
    count (`LIMITS`). Labels may be federated in every protocol (see `add`). Raises `DataError` if
    ids or names repeat.
    """

    def __init__(self, categories: Sequence[Category], protocol: Protocol = "coco") -> None:
        self.categories = tuple(sorted(categories, key=lambda category: category.id))
        self.limits = LIMITS[protocol]
        self.images = ImageResults()
        self._image_ids: set[int] = set()
        # Of data sets whose own ids are texts or large; results name those.
        self._given_image_ids: dict[int, int | float | str] = {}
        self._given_category_ids = {
            category.id: category.given_id
            for category in self.categories
            if category.given_id is not None
        }
        self._category_ids = np.array([category.id for category in self.categories], np.int32)
        _check_unique("id", [category.id for category in self.categories])
        _check_unique("name", [category.name for category in self.categories])

    def add(
        self,
        image_id: int,
        size: tuple[int, int],
        ground_truth: TrueBoxes,
        detections: DetectedBoxes,
        *,
        negatives: Sequence[int] | None = None,
        not_exhaustive: Sequence[int] | None = None,
        true_areas: Float[np.ndarray, " m"] | None = None,
        given_id: int | float | str | None = None,
    ) -> None:
        """Adds one image.

        `size` is (height, width) in pixels, `ground_truth` (boxes_xyxy, category ids, is_crowd) and
        `detections` (boxes_xyxy, scores, category ids), boxes in pixels of that size. An image
        for which `negatives` or `not_exhaustive` (category ids) are given, be they empty, is
        federated: detections of categories that are neither in its ground truth nor negative are
        dropped, and unmatched detections of its `not_exhaustive` categories are no errors.
        `true_areas` are those of the instances' masks, in pixels; None = those of the boxes.
        `given_id` is what results call the image; None = by `image_id`.
        Detections beyond the protocol's limit for an image are forgotten.

        Raises `DataError` on an image id that was added before, a category id that is not
        evaluated, arrays of unequal length, or values that are not finite.
        """
        image_id = int(image_id)
        if image_id in self._image_ids:
            raise DataError(f"image {image_id}: added twice; image ids must differ within a source")
        true = self._true_rows(image_id, ground_truth, true_areas)
        found = self._found_rows(image_id, detections)
        if negatives is not None or not_exhaustive is not None:
            known = np.concatenate([true["category"], _ids(negatives)])
            found["is_evaluated"] = np.isin(found["category"], known)
        found["is_exempt"] = np.isin(found["category"], _ids(not_exhaustive))
        self.images.append(image_id, size, true, found)
        self._image_ids.add(image_id)
        if given_id is not None:
            self._given_image_ids[image_id] = given_id

    def compute(self) -> Metrics:
        """Measures all images added so far.

        Per category, group and overall, AP is the mean of the interpolated precision at 101 recall
        values over IoU thresholds and categories. Raises `DataError` without any ground truth.
        """
        true = self.images.true.grouped("category", self._category_ids)
        found = self.images.found.grouped("category", self._category_ids)
        num_instances = np.array(
            [np.count_nonzero(~true.of([i])["is_crowd"]) for i in range(len(self.categories))]
        )
        evaluated = np.flatnonzero(num_instances)
        if not evaluated.size:
            raise DataError(
                f"evaluation: no ground truth of the {len(self.categories)} categories in "
                f"{len(self.images)} images; check the data set's annotations and its split"
            )
        precision = np.concatenate(
            [
                precision_of(
                    true.of(chunk), found.of(chunk), self._category_ids[chunk], self.limits
                )
                for chunk in self._chunks(evaluated, true.counts + found.counts)
            ],
            axis=2,
        )
        counts = {self.categories[i]: int(num_instances[i]) for i in evaluated}
        return metrics_of(precision, counts, len(self.images))

    def results(self) -> list[dict[str, Any]]:
        """All detections in COCO's results format, `bbox` as left, top, width, height in pixels.

        Boxes are rounded to 2 digits and scores to 5, so metrics of the list may differ from
        `compute` in the last digits. Federated images are complete: LVIS's tool drops by itself.
        """
        return list(self._iterate_results())

    def write_results(self, path: str | os.PathLike[str]) -> None:
        """Writes `results` as JSON, one detection a line; the file appears once it is complete."""
        with files.atomic(path) as partial, files.open_write(partial) as file:
            file.write(b"[")
            for index, row in enumerate(self._iterate_results()):
                file.write(b",\n" if index else b"\n")
                file.write(json.dumps(row).encode())
            file.write(b"\n]\n")

    def _iterate_results(self) -> Iterator[dict[str, Any]]:
        for image in self.images:
            boxes_xywh = xyxy_to_xywh(image.boxes_xyxy)
            for index, category in enumerate(image.categories):
                yield {
                    "image_id": self._given_image_ids.get(image.image_id, image.image_id),
                    "category_id": self._given_category_ids.get(int(category), int(category)),
                    "bbox": [round(value, 2) for value in boxes_xywh[index].tolist()],
                    "score": round(float(image.scores[index]), 5),
                }

    def _true_rows(
        self, image_id: int, ground_truth: TrueBoxes, mask_areas: Float[np.ndarray, " m"] | None
    ) -> Shaped[np.ndarray, " m"]:
        boxes, categories, is_crowd = ground_truth
        box_areas = np.prod(xyxy_to_xywh(np.reshape(boxes, (-1, 4)))[:, 2:], axis=1)
        areas = np.asarray(box_areas if mask_areas is None else mask_areas)
        self._check(f"image {image_id}, ground truth", boxes, categories, is_crowd)
        self._check(f"image {image_id}, areas", boxes, categories, areas)
        rows = np.zeros(len(categories), TRUE_ROW)
        rows["image_id"], rows["category"] = image_id, categories
        rows["box_xyxy"] = np.reshape(boxes, (-1, 4))
        rows["area"], rows["is_crowd"] = np.minimum(areas, _MAX_AREA), is_crowd
        return rows

    def _found_rows(self, image_id: int, detections: DetectedBoxes) -> Shaped[np.ndarray, " k"]:
        """The best detections, as many as count in one image, in their order."""
        boxes, scores, categories = detections
        self._check(f"image {image_id}, detections", boxes, categories, scores)
        best = np.argsort(-np.asarray(scores), kind="stable")[: self.limits.per_image]
        keep = np.sort(best)
        rows = np.zeros(len(keep), FOUND_ROW)
        rows["image_id"], rows["category"] = image_id, np.asarray(categories)[keep]
        rows["box_xyxy"] = np.reshape(boxes, (-1, 4))[keep]
        rows["score"] = np.asarray(scores)[keep]
        rows["is_evaluated"] = True
        return rows

    def _check(self, where: str, boxes: Any, categories: Any, values: Any) -> None:
        if np.size(boxes) != 4 * len(categories) or len(values) != len(categories):
            raise DataError(
                f"{where}: boxes {np.shape(boxes)}, category ids {np.shape(categories)} and "
                f"{np.shape(values)} do not describe the same boxes"
            )
        unknown = np.setdiff1d(categories, self._category_ids)
        if unknown.size:
            raise DataError(
                f"{where}: category id {unknown[0]} is none of the {len(self.categories)} that are "
                "evaluated; leave such boxes out or add the category"
            )
        if not (np.isfinite(boxes).all() and np.isfinite(values).all()):
            raise DataError(f"{where}: boxes and scores must be finite; find where NaN comes from")

    def _chunks(
        self, evaluated: Int[np.ndarray, " c"], counts: Int[np.ndarray, " a"]
    ) -> Iterator[list[int]]:
        """The evaluated categories (positions), in order, in lists of bounded work.

        `counts` are the boxes of every category.
        """
        chunk: list[int] = []
        rows = 0
        for index, count in zip(evaluated.tolist(), counts[evaluated].tolist(), strict=True):
            pairs = (len(chunk) + 1) * min(len(self.images), rows + count)
            if chunk and (rows + count > _ROWS_AT_ONCE or pairs > _PAIRS_AT_ONCE):
                yield chunk
                chunk, rows = [], 0
            chunk.append(index)
            rows += count
        yield chunk


def _ids(values: Sequence[int] | None) -> Int[np.ndarray, " x"]:
    return np.array([] if values is None else list(values), np.int64)


def _check_unique(key: str, values: list[Any]) -> None:
    for value, count in Counter(values).items():
        if count > 1:
            raise DataError(f"categories: {key} {value!r} occurs {count} times; merge or rename")
