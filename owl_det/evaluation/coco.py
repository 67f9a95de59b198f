"""Detection metrics by the COCO protocol, and by LVIS's rules where labels are federated.

`CocoEvaluator` takes one image after the other and keeps them as small arrays; `compute` hands them
to `faster_coco_eval`, some categories at a time, which bounds the memory (categories are
independent of each other).
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as coco_mask
from jaxtyping import Bool, Float, Float32, Int, Int32

from data_pipelines.features import Category
from owl_det.errors import DataError

# Boxes are in pixels of the raw image.
GroundTruth: TypeAlias = tuple[
    Float[np.ndarray, "m 4"], Int[np.ndarray, " m"], Bool[np.ndarray, " m"]
]  # boxes_xyxy, category ids, is_crowd
Detections: TypeAlias = tuple[
    Float[np.ndarray, "p 4"], Float[np.ndarray, " p"], Int[np.ndarray, " p"]
]  # boxes_xyxy, scores, category ids

_ROWS_AT_ONCE = 250_000  # boxes that faster_coco_eval is given as dictionaries: below 1 GB


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageResult:
    """What the evaluator keeps of one image."""

    image_id: int
    size: tuple[int, int]  # height, width
    true_boxes_xyxy: Float32[np.ndarray, "m 4"]
    true_categories: Int32[np.ndarray, " m"]
    is_crowd: Bool[np.ndarray, " m"]
    boxes_xyxy: Float32[np.ndarray, "p 4"]
    scores: Float32[np.ndarray, " p"]
    categories: Int32[np.ndarray, " p"]
    is_evaluated: Bool[np.ndarray, " p"]  # False: nobody knows whether the category is present
    is_exempt: Bool[np.ndarray, " p"]  # no false positive: not every instance is annotated


@dataclass(frozen=True, kw_only=True)
class GroupMetrics:
    """Means over the categories of a group that have ground truth."""

    AP: float
    AP50: float
    precision: Float[np.ndarray, " r"]  # at IoU 0.5, for `Metrics.recall`


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Results in [0, 1]. Groups and categories without ground truth are left out."""

    AP: float  # mean over the IoU thresholds 0.50, 0.55 … 0.95
    AP50: float
    AP75: float
    groups: dict[str, GroupMetrics]
    AP50_by_category: dict[str, float]
    recall: Float[np.ndarray, " r"]
    precision: Float[np.ndarray, " r"]  # mean over categories at IoU 0.5, for `recall`
    num_images: int
    num_instances: int  # crowd regions are none

    def scalars(self) -> dict[str, float]:
        """The numbers to log: `AP, AP50, AP75`, `AP_<group>`, `AP50_<group>` and the counts."""
        values: dict[str, float] = {"AP": self.AP, "AP50": self.AP50, "AP75": self.AP75}
        for name, group in self.groups.items():
            values[f"AP_{name}"] = group.AP
            values[f"AP50_{name}"] = group.AP50
        return values | {"num_images": self.num_images, "num_instances": self.num_instances}


class CocoEvaluator:
    """Collects ground truth and detections image by image and measures them.

    `categories` are those evaluated, each with its groups; `max_detections` is the number of
    best-scored detections that count per image and category (100 in COCO; LVIS, whose limit is 300
    an image over all categories, takes 300). Raises `DataError` if ids or names repeat.
    """

    def __init__(self, categories: Sequence[Category], *, max_detections: int = 100) -> None:
        self.categories = tuple(sorted(categories, key=lambda category: category.id))
        self.max_detections = max_detections
        self.images: list[ImageResult] = []
        self._image_ids: set[int] = set()
        self._category_ids = np.array([category.id for category in self.categories], np.int32)
        _check_unique("id", [category.id for category in self.categories])
        _check_unique("name", [category.name for category in self.categories])

    def add(
        self,
        image_id: int,
        size: tuple[int, int],
        ground_truth: GroundTruth,
        detections: Detections,
        *,
        negatives: Sequence[int] | None = None,
        not_exhaustive: Sequence[int] | None = None,
    ) -> None:
        """Adds one image.

        `size` is (height, width) in pixels, `ground_truth` (boxes_xyxy, category ids, is_crowd) and
        `detections` (boxes_xyxy, scores, category ids), boxes in pixels of that size. An image
        for which `negatives` or `not_exhaustive` (category ids) are given, be they empty, is
        federated: detections of categories that are neither in its ground truth nor negative are
        dropped, and unmatched detections of its `not_exhaustive` categories are no errors.
        Raises `DataError` on an image id that was added before, a category id that is not
        evaluated, arrays of unequal length, or values that are not finite.
        """
        image_id = int(image_id)
        if image_id in self._image_ids:
            raise DataError(f"image {image_id}: added twice; image ids must differ within a source")
        true_boxes, true_categories, is_crowd = ground_truth
        boxes, scores, categories = detections
        self._check(f"image {image_id}, ground truth", true_boxes, true_categories, is_crowd)
        self._check(f"image {image_id}, detections", boxes, categories, scores)
        is_evaluated = np.ones(len(categories), np.bool_)
        if negatives is not None or not_exhaustive is not None:
            known = np.concatenate([np.asarray(true_categories), _ids(negatives)])
            is_evaluated = np.isin(categories, known)
        self._image_ids.add(image_id)
        self.images.append(
            ImageResult(
                image_id=image_id,
                size=size,
                true_boxes_xyxy=_compact(true_boxes, np.float32, 4),
                true_categories=_compact(true_categories, np.int32),
                is_crowd=_compact(is_crowd, np.bool_),
                boxes_xyxy=_compact(boxes, np.float32, 4),
                scores=_compact(scores, np.float32),
                categories=_compact(categories, np.int32),
                is_evaluated=is_evaluated,
                is_exempt=np.isin(categories, _ids(not_exhaustive)),
            )
        )

    def compute(self) -> Metrics:
        """Measures all images added so far.

        Per category, group and overall, AP is the mean of the interpolated precision at 101 recall
        values over IoU thresholds and categories. Raises `DataError` without any ground truth.
        """
        true, found = _true_table(self.images), _found_table(self.images)
        is_instance = ~true.flag
        has_truth = np.isin(self._category_ids, true.categories[is_instance])
        if not has_truth.any():
            raise DataError(
                f"evaluation: no ground truth of the {len(self.categories)} categories in "
                f"{len(self.images)} images; check the data set's annotations and its split"
            )
        evaluated = [c for c, present in zip(self.categories, has_truth, strict=True) if present]
        precision = np.concatenate(
            [self._precision(true, found, ids) for ids in self._chunks(true, found, has_truth)],
            axis=-1,
        )  # IoU thresholds, recall values, evaluated categories
        return Metrics(
            AP=float(precision.mean()),
            AP50=float(precision[0].mean()),
            AP75=float(precision[5].mean()),
            groups=_group_metrics(evaluated, precision),
            AP50_by_category={
                category.name: float(precision[0, :, index].mean())
                for index, category in enumerate(evaluated)
            },
            recall=np.linspace(0, 1, precision.shape[1]),
            precision=precision[0].mean(axis=-1),
            num_images=len(self.images),
            num_instances=int(np.count_nonzero(is_instance)),
        )

    def results(self) -> list[dict[str, Any]]:
        """All detections in COCO's results format, `bbox` as left, top, width, height in pixels.

        Boxes are rounded to 2 digits and scores to 5, so metrics of the list may differ from
        `compute` in the last digits. Federated images are complete: LVIS's tool drops by itself.
        """
        return list(self._iterate_results())

    def write_results(self, path: str | os.PathLike[str]) -> None:
        """Writes `results` as JSON, one detection a line; the file appears once it is complete."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write("[")
            for index, row in enumerate(self._iterate_results()):
                file.write(",\n" if index else "\n")
                file.write(json.dumps(row))
            file.write("\n]\n")
        partial.replace(path)

    def _iterate_results(self) -> Iterator[dict[str, Any]]:
        for image in self.images:
            boxes_xywh = _xywh(image.boxes_xyxy)
            for index, category in enumerate(image.categories):
                yield {
                    "image_id": image.image_id,
                    "category_id": int(category),
                    "bbox": [round(value, 2) for value in boxes_xywh[index].tolist()],
                    "score": round(float(image.scores[index]), 5),
                }

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
        self, true: "_Table", found: "_Table", has_truth: Bool[np.ndarray, " c"]
    ) -> Iterator[list[int]]:
        """Category ids with ground truth, in order, in lists of few enough boxes."""
        everything = np.concatenate([true.categories, found.categories])
        counts = np.bincount(
            np.searchsorted(self._category_ids, everything), minlength=len(self._category_ids)
        )
        chunk: list[int] = []
        rows = 0
        for category_id, count in zip(
            self._category_ids[has_truth], counts[has_truth], strict=True
        ):
            if chunk and rows + count > _ROWS_AT_ONCE:
                yield chunk
                chunk, rows = [], 0
            chunk.append(int(category_id))
            rows += count
        yield chunk

    def _precision(
        self, true: "_Table", found: "_Table", category_ids: list[int]
    ) -> Float[np.ndarray, "t r c"]:
        """Precision at IoU thresholds, recall values and the given categories."""
        true, found = true.of(category_ids), found.of(category_ids)
        image_ids = np.union1d(true.image_ids, found.image_ids).tolist()
        run = COCOeval_faster(
            _dataset(image_ids, category_ids, true, "iscrowd"),
            # `lvis_mark`: a detection that is no error where it matches nothing.
            _dataset(image_ids, category_ids, found, "lvis_mark"),
            "bbox",
        )
        run.params.maxDets = [self.max_detections]
        run.params.areaRng = run.params.areaRng[:1]  # all sizes
        run.params.areaRngLbl = run.params.areaRngLbl[:1]
        run.evaluate()
        run.accumulate()
        return run.eval["precision"][:, :, :, 0, 0]


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
    ids = evaluator._category_ids
    matrix = np.zeros((len(ids) + 1, len(ids) + 1), np.int64)
    for image in evaluator.images:
        pairs = _match(image, iou, score)
        np.add.at(matrix, (_position(ids, pairs[:, 0]), _position(ids, pairs[:, 1])), 1)
    return matrix


_NONE = np.iinfo(np.int32).min  # no category id of any data set


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
    found, true = _xywh(image.boxes_xyxy), _xywh(image.true_boxes_xyxy)
    return np.asarray(coco_mask.iou(found, true, image.is_crowd.astype(np.uint8).tolist()))


def _position(ids: Int[np.ndarray, " c"], values: Int[np.ndarray, " x"]) -> Int[np.ndarray, " x"]:
    return np.where(values == _NONE, len(ids), np.searchsorted(ids, values))


def _group_metrics(
    categories: Sequence[Category], precision: Float[np.ndarray, "t r c"]
) -> dict[str, GroupMetrics]:
    names = dict.fromkeys(group for category in categories for group in category.groups)
    members = {
        name: precision[:, :, [name in category.groups for category in categories]]
        for name in names
    }
    return {
        name: GroupMetrics(
            AP=float(values.mean()),
            AP50=float(values[0].mean()),
            precision=values[0].mean(axis=-1),
        )
        for name, values in members.items()
    }


# --- tables of all images, and what faster_coco_eval wants ---------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Table:
    """Boxes of all images, in the order of the images."""

    image_ids: Int[np.ndarray, " x"]
    categories: Int32[np.ndarray, " x"]
    boxes_xyxy: Float32[np.ndarray, "x 4"]
    scores: Float32[np.ndarray, " x"]
    flag: Bool[np.ndarray, " x"]

    def of(self, category_ids: Sequence[int]) -> "_Table":
        return self.rows(np.isin(self.categories, category_ids))

    def rows(self, keep: Bool[np.ndarray, " x"]) -> "_Table":
        return _Table(
            image_ids=self.image_ids[keep],
            categories=self.categories[keep],
            boxes_xyxy=self.boxes_xyxy[keep],
            scores=self.scores[keep],
            flag=self.flag[keep],
        )


def _true_table(images: Sequence[ImageResult]) -> _Table:
    categories = _join([image.true_categories for image in images], np.int32)
    return _Table(
        image_ids=_repeat_ids(images, [len(image.true_categories) for image in images]),
        categories=categories,
        boxes_xyxy=_join([image.true_boxes_xyxy for image in images], np.float32, 4),
        scores=np.ones(len(categories), np.float32),
        flag=_join([image.is_crowd for image in images], np.bool_),
    )


def _found_table(images: Sequence[ImageResult]) -> _Table:
    table = _Table(
        image_ids=_repeat_ids(images, [len(image.categories) for image in images]),
        categories=_join([image.categories for image in images], np.int32),
        boxes_xyxy=_join([image.boxes_xyxy for image in images], np.float32, 4),
        scores=_join([image.scores for image in images], np.float32),
        flag=_join([image.is_exempt for image in images], np.bool_),
    )
    return table.rows(_join([image.is_evaluated for image in images], np.bool_))


def _dataset(
    image_ids: Sequence[int], category_ids: Sequence[int], table: _Table, flag: str
) -> COCO:
    boxes_xywh = _xywh(table.boxes_xyxy)
    columns = zip(
        table.image_ids.tolist(),
        table.categories.tolist(),
        boxes_xywh.tolist(),
        np.prod(boxes_xywh[:, 2:], axis=1).tolist(),
        table.scores.tolist(),
        table.flag.astype(int).tolist(),
        strict=True,
    )
    annotations = [
        # Ids start at 1: the library reads 0 as "unmatched".
        {
            "id": row,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": bbox,
            "area": area,
            "score": score,
            "iscrowd": 0,
        }
        | {flag: value}
        for row, (image_id, category_id, bbox, area, score, value) in enumerate(columns, start=1)
    ]
    return COCO(
        {
            "images": [{"id": image_id} for image_id in image_ids],
            "categories": [{"id": category_id} for category_id in category_ids],
            "annotations": annotations,
        }
    )


def _xywh(boxes_xyxy: Float32[np.ndarray, "x 4"]) -> Float[np.ndarray, "x 4"]:
    boxes = boxes_xyxy.astype(np.float64)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _join(arrays: Sequence[np.ndarray], dtype: Any, *tail: int) -> np.ndarray:
    return np.concatenate([np.zeros((0, *tail), dtype), *arrays])


def _repeat_ids(images: Sequence[ImageResult], counts: Sequence[int]) -> Int[np.ndarray, " x"]:
    return np.repeat(np.array([image.image_id for image in images], np.int64), counts)


def _compact(values: Any, dtype: Any, *tail: int) -> np.ndarray:
    # Always a copy: a slice would keep a whole batch of predictions alive.
    return np.array(values, dtype).reshape(-1, *tail)


def _ids(values: Sequence[int] | None) -> Int[np.ndarray, " x"]:
    return np.array([] if values is None else list(values), np.int64)


def _check_unique(key: str, values: list[Any]) -> None:
    for value, count in Counter(values).items():
        if count > 1:
            raise DataError(f"categories: {key} {value!r} occurs {count} times; merge or rename")
