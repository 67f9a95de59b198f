"""The evaluator against pycocotools, against LVIS's rules, and on cases with known answers."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faster_coco_eval import COCO as FasterCOCO
from faster_coco_eval import COCOeval_faster
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data_pipelines.features import Category
from owl_det.errors import DataError
from owl_det.evaluation import average_precision, coco
from owl_det.evaluation.coco import CocoEvaluator
from owl_det.evaluation.confusion import confusion_matrix

LVIS = Path(__file__).resolve().parents[2] / "../shared/data/lvis/lvis_val_100.json"
CATEGORIES = (
    Category(id=7, name="cat", groups=("novel", "rare")),
    Category(id=3, name="dog", groups=("base",)),
    Category(id=90, name="bird", groups=("novel",)),
    Category(id=12, name="fish", groups=("base",)),
    Category(id=44, name="never present", groups=("base", "empty")),
)
PRESENT = np.array([7, 3, 90, 12])
NO_BOXES = (np.zeros((0, 4), np.float32), np.zeros(0), np.zeros(0, np.int32))


def random_boxes(rng, count):
    low = rng.uniform(0, 300, (count, 2))
    return np.concatenate([low, low + rng.uniform(5, 120, (count, 2))], 1).astype(np.float32)


def random_images(seed=0, num_images=30):
    """(image id, ground truth, detections) with crowds, ties, gaps in ids and empty images."""
    rng = np.random.default_rng(seed)
    images = []
    for image_id in rng.permutation(1000)[:num_images].tolist():
        count = 0 if rng.uniform() < 0.2 else int(rng.integers(1, 12))
        true = random_boxes(rng, count)
        categories = rng.choice(PRESENT, count)
        is_crowd = rng.uniform(size=count) < 0.15
        near = np.repeat(true, 3, 0) + rng.normal(0, 3, (3 * count, 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        extra = random_boxes(rng, 250 if image_id % 7 == 0 else 5)
        boxes = np.concatenate([near, extra]).astype(np.float32)
        labels = rng.choice(PRESENT, len(boxes))
        keep_label = rng.uniform(size=3 * count) < 0.7
        labels[: 3 * count] = np.where(keep_label, np.repeat(categories, 3), labels[: 3 * count])
        labels[-1] = 44
        scores = rng.uniform(size=len(boxes))
        scores[3 * count :] *= 0.6
        scores = scores.round(1).astype(np.float32)  # many ties
        images.append((image_id, (true, categories, is_crowd), (boxes, scores, labels)))
    return images


def evaluator_of(images):
    evaluator = CocoEvaluator(CATEGORIES)
    for image_id, truth, detections in images:
        evaluator.add(image_id, (420, 420), truth, detections)
    return evaluator


def xywh(box):
    left, top, right, bottom = (float(value) for value in box)
    return [left, top, right - left, bottom - top]


def pycocotools_precision(images):
    """Precision [IoU, recall, category in the order of ids] as pycocotools computes it."""
    annotations, results = [], []
    for image_id, (boxes, categories, is_crowd), (found, scores, labels) in images:
        for box, category, crowd in zip(boxes, categories, is_crowd, strict=True):
            bbox = xywh(box)
            row = {"image_id": image_id, "category_id": int(category), "bbox": bbox}
            row |= {"id": len(annotations) + 1, "area": bbox[2] * bbox[3], "iscrowd": int(crowd)}
            annotations.append(row)
        for box, score, label in zip(found, scores, labels, strict=True):
            row = {"image_id": image_id, "category_id": int(label), "bbox": xywh(box)}
            results.append(row | {"score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):
        truth: Any = COCO()  # its stubs know only data sets read from files
        truth.dataset = {
            "images": [{"id": image_id} for image_id, *_ in images],
            "categories": [{"id": category.id} for category in CATEGORIES],
            "annotations": annotations,
        }
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(results), "bbox")
        run.evaluate()
        run.accumulate()
    return run.eval["precision"][:, :, :, 0, -1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows_at_once", [coco._ROWS_AT_ONCE, 1])
def test_equals_pycocotools(seed, rows_at_once, monkeypatch):
    monkeypatch.setattr(coco, "_ROWS_AT_ONCE", rows_at_once)  # 1: every category on its own
    images = random_images(seed)
    expected = pycocotools_precision(images)
    metrics = evaluator_of(images).compute()
    valid = expected[:, :, expected[0, 0] > -1]
    assert 0.05 < metrics.AP < 0.95
    assert metrics.AP == pytest.approx(valid.mean(), abs=1e-6)
    assert metrics.AP50 == pytest.approx(valid[0].mean(), abs=1e-6)
    assert metrics.AP75 == pytest.approx(valid[5].mean(), abs=1e-6)
    np.testing.assert_allclose(metrics.precision, valid[0].mean(-1), atol=1e-6)
    assert metrics.precision.shape == metrics.recall.shape == (101,)


def test_groups_and_categories_equal_a_manual_mean():
    images = random_images(5)
    expected = pycocotools_precision(images)
    column = {category_id: i for i, category_id in enumerate(sorted(c.id for c in CATEGORIES))}
    metrics = evaluator_of(images).compute()
    assert set(metrics.groups) == {"novel", "rare", "base"}  # "empty" has no ground truth
    for name, ids in {"novel": [7, 90], "rare": [7], "base": [3, 12]}.items():
        precision = expected[:, :, [column[i] for i in ids]]
        assert metrics.groups[name].AP == pytest.approx(precision.mean(), abs=1e-6)
        assert metrics.scalars()[f"AP50_{name}"] == pytest.approx(precision[0].mean(), abs=1e-6)
    assert set(metrics.AP50_by_category) == {"cat", "dog", "bird", "fish"}
    fish = expected[0, :, column[12]].mean()
    assert metrics.AP50_by_category["fish"] == pytest.approx(fish, abs=1e-6)


def test_perfect_detections_reach_one_and_none_reach_zero():
    images = random_images(1)
    perfect, empty = CocoEvaluator(CATEGORIES), CocoEvaluator(CATEGORIES)
    for image_id, (boxes, categories, is_crowd), _ in images:
        detections = (boxes, np.linspace(0.5, 0.9, len(boxes)), categories)
        perfect.add(image_id, (420, 420), (boxes, categories, is_crowd), detections)
        empty.add(image_id, (420, 420), (boxes, categories, is_crowd), NO_BOXES)
    assert perfect.compute().AP == pytest.approx(1, abs=1e-12)
    assert all(value == 0 for key, value in empty.compute().scalars().items() if "AP" in key)
    assert empty.compute().num_images == len(images)
    num_instances = sum(np.count_nonzero(~truth[2]) for _, truth, _ in images)
    assert empty.compute().num_instances == num_instances


def one_box(category, score=None, box=(10, 10, 50, 50)):
    boxes = np.array([box], np.float32)
    if score is None:
        return boxes, np.array([category]), np.array([False])
    return boxes, np.array([score]), np.array([category])


def test_federated_images_do_not_count_what_nobody_checked():
    def ap50_of_dog(**federated):
        evaluator = CocoEvaluator(CATEGORIES)
        evaluator.add(1, (100, 100), one_box(3), one_box(3, 0.5))
        evaluator.add(2, (100, 100), one_box(7), one_box(3, 0.9), **federated)
        return evaluator.compute().AP50_by_category["dog"]

    assert ap50_of_dog() == pytest.approx(0.5)
    assert ap50_of_dog(negatives=[3]) == pytest.approx(0.5)
    assert ap50_of_dog(negatives=[]) == pytest.approx(1)
    assert ap50_of_dog(not_exhaustive=[]) == pytest.approx(1)


def test_unjudged_detections_take_places_of_the_fixed_limit(monkeypatch):
    """As the authors' script: the best of a category are taken first, then LVIS leaves some out."""
    monkeypatch.setitem(average_precision.LIMITS, "fixed", average_precision.Limits(per_category=2))

    def ap50(protocol):
        evaluator = CocoEvaluator(CATEGORIES, protocol)
        evaluator.add(1, (100, 100), one_box(3), one_box(3, 0.5), negatives=[])
        for image_id in (2, 3):
            found = one_box(3, 0.9)
            evaluator.add(image_id, (100, 100), one_box(7), found, negatives=[])
        return evaluator.compute().AP50_by_category["dog"]

    assert ap50("lvis") == pytest.approx(1)
    assert ap50("fixed") == pytest.approx(0)


def test_not_exhaustive_categories_have_no_false_positives():
    evaluator = CocoEvaluator(CATEGORIES)
    boxes = np.array([[60, 60, 90, 90], [10, 10, 50, 50]], np.float32)
    found = (boxes, np.array([0.9, 0.5]), np.array([3, 3]))
    evaluator.add(1, (100, 100), one_box(3), found, not_exhaustive=[3])
    assert evaluator.compute().AP50 == pytest.approx(1)
    assert confusion_matrix(evaluator).sum() == 1


@pytest.mark.skipif(not LVIS.exists(), reason="real LVIS records (shared/data/lvis) are absent")
def test_federated_records_equal_the_lvis_mode_of_faster_coco_eval():
    data = json.loads(LVIS.read_text())
    rng = np.random.default_rng(0)
    categories = [
        Category(id=c["id"], name=c["name"], groups=(c["frequency"],)) for c in data["categories"]
    ]
    evaluator = CocoEvaluator(categories, protocol="lvis")
    for image in data["images"]:
        rows = [row for row in data["annotations"] if row["image_id"] == image["id"]]
        boxes = np.array([row["bbox"] for row in rows], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([row["category_id"] for row in rows], np.int32)
        near = np.repeat(boxes, 4, 0) + rng.normal(0, 4, (4 * len(boxes), 4)).astype(np.float32)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        guesses = np.concatenate([labels, image["neg_category_ids"], [1, 2, 3]]).astype(np.int32)
        found = np.where(rng.uniform(size=len(near)) < 0.6, np.repeat(labels, 4), 0)
        found = np.where(found == 0, rng.choice(guesses, len(near)), found)
        evaluator.add(
            image["id"],
            (image["height"], image["width"]),
            (boxes, labels, np.zeros(len(boxes), bool)),
            (near, rng.uniform(size=len(near)), found),
            negatives=image["neg_category_ids"],
            not_exhaustive=image["not_exhaustive_category_ids"],
        )
    metrics = evaluator.compute()
    expected = lvis_mode(data, evaluator)
    assert 0.05 < metrics.AP < 0.95
    assert metrics.AP == pytest.approx(expected["AP_all"], abs=1e-6)
    for group, name in {"r": "APr", "c": "APc", "f": "APf"}.items():
        assert metrics.groups[group].AP == pytest.approx(expected[name], abs=1e-6)
    unchecked = sum(np.count_nonzero(~image.is_evaluated) for image in evaluator.images)
    exempt = sum(np.count_nonzero(image.is_exempt) for image in evaluator.images)
    assert unchecked > 0 and exempt > 0  # so both rules were tried


def lvis_mode(data, evaluator):
    truth = FasterCOCO(
        {
            "images": data["images"],
            "categories": data["categories"],
            "annotations": [
                {key: row[key] for key in ("id", "image_id", "category_id", "bbox", "area")}
                for row in data["annotations"]
            ],
        }
    )
    results = []
    for image in evaluator.images:
        columns = zip(image.boxes_xyxy, image.scores, image.categories, strict=True)
        for box, score, category in columns:
            row = {"image_id": image.image_id, "category_id": int(category), "bbox": xywh(box)}
            results.append(row | {"score": float(score)})
    run = COCOeval_faster(truth, truth.loadRes(results), "bbox", lvis_style=True)
    run.params.maxDets = [300]
    run.run()
    return run.stats_as_dict


def test_results_are_in_coco_format(tmp_path):
    evaluator = CocoEvaluator(CATEGORIES)
    found = one_box(90, 0.123456789, box=(1.239, 2, 4, 8.5))
    evaluator.add(5, (100, 100), one_box(7), found, negatives=[])
    path = tmp_path / "run" / "results.json"
    evaluator.write_results(path)
    row = {"image_id": 5, "category_id": 90, "bbox": [1.24, 2.0, 2.76, 6.5], "score": 0.12346}
    assert json.loads(path.read_text()) == evaluator.results() == [row]
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_results_name_the_ids_of_the_data_set():
    categories = [Category(id=1, name="cat", given_id=2**40), Category(id=2, name="dog")]
    evaluator = CocoEvaluator(categories)
    evaluator.add(5, (100, 100), one_box(1), one_box(1, 0.5), given_id="000005")
    evaluator.add(6, (100, 100), one_box(2), one_box(2, 0.5))
    rows = [(row["image_id"], row["category_id"]) for row in evaluator.results()]
    assert rows == [("000005", 2**40), (6, 2)] and evaluator.compute().AP == 1


def test_results_may_be_empty(tmp_path):
    CocoEvaluator(CATEGORIES).write_results(tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == []


def test_evaluator_keeps_no_view_of_the_callers_arrays():
    boxes, scores, labels = one_box(3, 0.5)
    evaluator = CocoEvaluator(CATEGORIES)
    evaluator.add(1, (100, 100), one_box(3), (boxes, scores, labels))
    boxes[:], scores[:], labels[:] = 0, 0, 7
    assert evaluator.compute().AP50 == pytest.approx(1)
    kept = evaluator.images[0]
    assert (kept.boxes_xyxy.dtype, kept.categories.dtype) == (np.float32, np.int32)


def test_confusion_matrix_counts_matches_misses_and_false_alarms():
    boxes = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 90, 10]], "f4")
    truth = (boxes, np.array([3, 7, 12, 90]), np.array([False, False, False, True]))
    found = np.array(
        [
            [0, 0, 10, 10],  # dog as dog
            [0, 0, 10, 9],  # the same dog again, at a lower score: background
            [20, 0, 30, 10],  # cat as bird
            [61, 0, 70, 10],  # inside the crowd of birds: no error
            [61, 0, 70, 10],  # not a bird: background
            [40, 0, 50, 10],  # the fish, at a score too low: missed
        ],
        "f4",
    )
    scores = np.array([0.8, 0.7, 0.6, 0.5, 0.5, 0.2])
    evaluator = CocoEvaluator(CATEGORIES)
    labels = np.array([3, 3, 90, 90, 12, 12])
    evaluator.add(1, (100, 100), truth, (found, scores, labels))
    expected = np.zeros((6, 6), int)  # by id: dog, cat, fish, never present, bird, none
    expected[0, 0] = expected[5, 0] = expected[1, 4] = expected[5, 2] = expected[2, 5] = 1
    np.testing.assert_array_equal(confusion_matrix(evaluator), expected)
    low = confusion_matrix(evaluator, score=0.1)
    assert low[2, 2] == 1 and low[2, 5] == 0


def test_equal_overlaps_are_matched_by_category():
    boxes = np.repeat(np.array([[0, 0, 10, 10]], "f4"), 2, 0)
    evaluator = CocoEvaluator(CATEGORIES)
    truth = (boxes, np.array([3, 7]), np.zeros(2, bool))
    evaluator.add(1, (20, 20), truth, (boxes, np.array([0.9, 0.8]), np.array([7, 3])))
    evaluator.add(2, (20, 20), truth, (boxes, np.array([0.9, 0.8]), np.array([3, 7])))
    matrix = confusion_matrix(evaluator)
    assert matrix[0, 0] == matrix[1, 1] == 2 and matrix.sum() == 4


@pytest.mark.parametrize(
    "detections, message",
    [
        (one_box(999, 0.5), "category id 999"),
        (one_box(3, np.nan), "finite"),
        ((np.zeros((2, 4)), np.zeros(1), np.zeros(1, int)), "do not describe the same"),
    ],
)
def test_bad_detections_are_one_clear_error(detections, message):
    evaluator = CocoEvaluator(CATEGORIES)
    with pytest.raises(DataError, match=f"image 8, detections.*{message}"):
        evaluator.add(8, (100, 100), one_box(3), detections)
    assert not evaluator.images


def test_an_image_cannot_be_added_twice():
    evaluator = evaluator_of([(4, one_box(3), NO_BOXES)])
    with pytest.raises(DataError, match="image 4: added twice"):
        evaluator.add(4, (100, 100), one_box(3), NO_BOXES)


def test_no_ground_truth_is_an_error():
    crowd = (np.array([[0.0, 0, 9, 9]]), np.array([3]), np.array([True]))
    with pytest.raises(DataError, match="no ground truth of the 5 categories in 1 images"):
        evaluator_of([(1, crowd, one_box(3, 0.5))]).compute()


@pytest.mark.parametrize("other", [Category(id=7, name="new"), Category(id=1, name="cat")])
def test_categories_must_differ(other):
    with pytest.raises(DataError, match="occurs 2 times"):
        CocoEvaluator([*CATEGORIES, other])
