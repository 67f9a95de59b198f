"""Detection metrics by the protocols of COCO and LVIS, and LVIS's "fixed" AP.

`CocoEvaluator` takes one image after the other and keeps its boxes as rows in files (`rows`);
`compute` hands them to `faster_coco_eval`, some categories at a time. So memory depends on neither
the number of images nor that of detections (categories are independent of each other).
"""

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, overload

import numpy as np
from absl import logging
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as coco_mask
from jaxtyping import Bool, Float, Float32, Int, Int32, Shaped

from data_pipelines.features import Category
from owl_det import files
from owl_det.config import Protocol
from owl_det.errors import DataError
from owl_det.evaluation.rows import RowFile

# Boxes are in pixels of the raw image.
GroundTruth: TypeAlias = tuple[
    Float[np.ndarray, "m 4"], Int[np.ndarray, " m"], Bool[np.ndarray, " m"]
]  # boxes_xyxy, category ids, is_crowd
Detections: TypeAlias = tuple[
    Float[np.ndarray, "p 4"], Float[np.ndarray, " p"], Int[np.ndarray, " p"]
]  # boxes_xyxy, scores, category ids

# What faster_coco_eval is given at once. It makes a dictionary of every box and a table of every
# (image, category) pair: some hundred bytes each.
_ROWS_AT_ONCE = 100_000
_PAIRS_AT_ONCE = 200_000
_MAX_AREA = 1e10  # pixels; the library's largest

_TRUE = np.dtype(
    [
        ("image_id", "i8"),
        ("category", "i4"),
        ("box_xyxy", "f4", 4),
        ("area", "f4"),
        ("is_crowd", "?"),
    ]
)
_FOUND = np.dtype(
    [
        ("image_id", "i8"),
        ("category", "i4"),
        ("box_xyxy", "f4", 4),
        ("score", "f4"),
        ("is_evaluated", "?"),
        ("is_exempt", "?"),
    ]
)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageResult:
    """What the evaluator keeps of one image."""

    image_id: int
    size: tuple[int, int]  # height, width
    true_boxes_xyxy: Float32[np.ndarray, "m 4"]
    true_categories: Int32[np.ndarray, " m"]
    true_areas: Float32[np.ndarray, " m"]  # pixels
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
    """Results in [0, 1]. Groups, sizes and categories without ground truth are left out."""

    AP: float  # mean over the IoU thresholds 0.50, 0.55 … 0.95
    AP50: float
    AP75: float
    AP_by_size: dict[str, float]  # small, medium, large: areas to 32², to 96², beyond (pixels)
    groups: dict[str, GroupMetrics]
    AP_by_category: dict[str, float]
    AP50_by_category: dict[str, float]
    instances_by_category: dict[str, int]  # crowd regions are none
    recall: Float[np.ndarray, " r"]
    precision: Float[np.ndarray, " r"]  # mean over categories at IoU 0.5, for `recall`
    num_images: int
    num_instances: int  # crowd regions are none

    def scalars(self) -> dict[str, float]:
        """The numbers to log: `AP, AP50, AP75`, `AP_<size>`, `AP_<group>`, `AP50_<group>`, counts.

        LVIS's APs, APm, APl are `AP_small` …, its APr, APc, APf `AP_rare`, `AP_common`,
        `AP_frequent`.
        """
        values: dict[str, float] = {"AP": self.AP, "AP50": self.AP50, "AP75": self.AP75}
        values |= {f"AP_{name}": value for name, value in self.AP_by_size.items()}
        for name, group in self.groups.items():
            values[f"AP_{name}"] = group.AP
            values[f"AP50_{name}"] = group.AP50
        return values | {"num_images": self.num_images, "num_instances": self.num_instances}


class CocoEvaluator:
    """Collects ground truth and detections image by image and measures them.

    `categories` are those evaluated, each with its groups; `protocol` says how many detections
    count (`LIMITS`). Labels may be federated in every protocol (see `add`). Raises `DataError` if
    ids or names repeat.
    """

    def __init__(self, categories: Sequence[Category], protocol: Protocol = "coco") -> None:
        self.categories = tuple(sorted(categories, key=lambda category: category.id))
        self.limits = LIMITS[protocol]
        self.images = _Images()
        self._image_ids: set[int] = set()
        # Of data sets whose own ids are texts or large; results name those.
        self._given_image_ids: dict[int, int | str] = {}
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
        ground_truth: GroundTruth,
        detections: Detections,
        *,
        negatives: Sequence[int] | None = None,
        not_exhaustive: Sequence[int] | None = None,
        true_areas: Float[np.ndarray, " m"] | None = None,
        given_id: int | str | None = None,
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
        true_boxes, true_categories, is_crowd = ground_truth
        of_boxes = np.prod(_xywh(np.reshape(true_boxes, (-1, 4)))[:, 2:], axis=1)
        areas = of_boxes if true_areas is None else true_areas
        self._check(f"image {image_id}, ground truth", true_boxes, true_categories, is_crowd)
        self._check(f"image {image_id}, areas", true_boxes, true_categories, areas)
        boxes, scores, categories = detections
        self._check(f"image {image_id}, detections", boxes, categories, scores)
        best = np.argsort(-np.asarray(scores), kind="stable")[: self.limits.per_image]
        keep = np.sort(best)

        true = np.zeros(len(true_categories), _TRUE)
        true["image_id"], true["category"] = image_id, true_categories
        true["box_xyxy"] = np.reshape(true_boxes, (-1, 4))
        true["area"], true["is_crowd"] = np.minimum(areas, _MAX_AREA), is_crowd
        found = np.zeros(len(keep), _FOUND)
        found["image_id"], found["category"] = image_id, np.asarray(categories)[keep]
        found["box_xyxy"] = np.reshape(boxes, (-1, 4))[keep]
        found["score"] = np.asarray(scores)[keep]
        found["is_evaluated"] = True
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
        by_size = np.concatenate(
            [
                self._precision(true.of(chunk), found.of(chunk), self._category_ids[chunk])
                for chunk in self._chunks(evaluated, true.counts + found.counts)
            ],
            axis=2,
        )  # IoU thresholds, recall values, evaluated categories, sizes
        precision = by_size[..., 0]
        categories = [self.categories[i] for i in evaluated]
        return Metrics(
            AP=float(precision.mean()),
            AP50=float(precision[0].mean()),
            AP75=float(precision[5].mean()),
            AP_by_size=_size_metrics(by_size),
            groups=_group_metrics(categories, precision),
            AP_by_category={
                category.name: float(precision[:, :, index].mean())
                for index, category in enumerate(categories)
            },
            AP50_by_category={
                category.name: float(precision[0, :, index].mean())
                for index, category in enumerate(categories)
            },
            instances_by_category={
                self.categories[i].name: int(num_instances[i]) for i in evaluated
            },
            recall=np.linspace(0, 1, precision.shape[1]),
            precision=precision[0].mean(axis=-1),
            num_images=len(self.images),
            num_instances=int(num_instances.sum()),
        )

    def results(self) -> list[dict[str, Any]]:
        """All detections in COCO's results format, `bbox` as left, top, width, height in pixels.

        Boxes are rounded to 2 digits and scores to 5, so metrics of the list may differ from
        `compute` in the last digits. Federated images are complete: LVIS's tool drops by itself.
        """
        return list(self._iterate_results())

    def write_results(self, path: str | os.PathLike[str]) -> None:
        """Writes `results` as JSON, one detection a line; the file appears once it is complete."""
        with files.atomic(path) as partial, partial.open("w", encoding="utf-8") as file:
            file.write("[")
            for index, row in enumerate(self._iterate_results()):
                file.write(",\n" if index else "\n")
                file.write(json.dumps(row))
            file.write("\n]\n")

    def _iterate_results(self) -> Iterator[dict[str, Any]]:
        for image in self.images:
            boxes_xywh = _xywh(image.boxes_xyxy)
            for index, category in enumerate(image.categories):
                yield {
                    "image_id": self._given_image_ids.get(image.image_id, image.image_id),
                    "category_id": self._given_category_ids.get(int(category), int(category)),
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

    def _precision(
        self,
        true: Shaped[np.ndarray, " x"],
        found: Shaped[np.ndarray, " y"],
        category_ids: Int32[np.ndarray, " c"],
    ) -> Float[np.ndarray, "t r c 4"]:
        """Precision at IoU thresholds, recall values, the given categories and sizes.

        The first size is all of them. -1 where there is no ground truth.
        """
        if self.limits.per_category is not None:
            # Before unjudged ones are left out: they take places too (arXiv 2102.01066, section 5).
            found = _best_of_each_category(found, self.limits.per_category)
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
        run.params.maxDets = [self.limits.per_image_and_category or max(1, len(found))]
        run.evaluate()
        run.accumulate()
        return run.eval["precision"][..., 0]


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


def _size_metrics(precision: Float[np.ndarray, "t r c 4"]) -> dict[str, float]:
    """AP of instances by their area; sizes without ground truth are left out."""
    metrics = {}
    for index, name in enumerate(("small", "medium", "large"), start=1):
        values = precision[..., index]
        if (values > -1).any():
            metrics[name] = float(values[values > -1].mean())
    return metrics


def _best_of_each_category(found: Shaped[np.ndarray, " x"], limit: int) -> Shaped[np.ndarray, " y"]:
    order = np.lexsort((-found["score"], found["category"]))
    categories = found["category"][order]
    rank = np.arange(len(found)) - np.searchsorted(categories, categories)
    return found[np.sort(order[rank < limit])]


# --- rows of all images, and what faster_coco_eval wants -----------------------------------------


class _Images(Sequence[ImageResult]):
    """The images that were added, in order; each is read from its rows when asked for."""

    def __init__(self) -> None:
        self.true, self.found = RowFile(_TRUE), RowFile(_FOUND)
        self._ids, self._heights, self._widths = array("q"), array("q"), array("q")
        self._true_ends, self._found_ends = array("q", [0]), array("q", [0])

    def append(
        self,
        image_id: int,
        size: tuple[int, int],
        true: Shaped[np.ndarray, " m"],
        found: Shaped[np.ndarray, " p"],
    ) -> None:
        self.true.append(true)
        self.found.append(found)
        self._ids.append(image_id)
        self._heights.append(size[0])
        self._widths.append(size[1])
        self._true_ends.append(len(self.true))
        self._found_ends.append(len(self.found))

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> ImageResult: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageResult]: ...
    def __getitem__(self, index: int | slice) -> ImageResult | list[ImageResult]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        true = self.true.read(self._true_ends[i], self._true_ends[i + 1])
        found = self.found.read(self._found_ends[i], self._found_ends[i + 1])
        return ImageResult(
            image_id=self._ids[i],
            size=(self._heights[i], self._widths[i]),
            true_boxes_xyxy=true["box_xyxy"],
            true_categories=true["category"],
            true_areas=true["area"],
            is_crowd=true["is_crowd"],
            boxes_xyxy=found["box_xyxy"],
            scores=found["score"],
            categories=found["category"],
            is_evaluated=found["is_evaluated"],
            is_exempt=found["is_exempt"],
        )


def _dataset(
    image_ids: Sequence[int],
    category_ids: Int32[np.ndarray, " c"],
    rows: Shaped[np.ndarray, " x"],
    columns: dict[str, np.ndarray],
) -> COCO:
    boxes_xywh = _xywh(rows["box_xyxy"])
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


def _xywh(boxes_xyxy: Float32[np.ndarray, "x 4"]) -> Float[np.ndarray, "x 4"]:
    boxes = boxes_xyxy.astype(np.float64)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _ids(values: Sequence[int] | None) -> Int[np.ndarray, " x"]:
    return np.array([] if values is None else list(values), np.int64)


def _check_unique(key: str, values: list[Any]) -> None:
    for value, count in Counter(values).items():
        if count > 1:
            raise DataError(f"categories: {key} {value!r} occurs {count} times; merge or rename")
