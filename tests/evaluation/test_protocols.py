"""LVIS's protocol and fixed AP against the official tool, and what the limits let through."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.features import Category
from owl_det.evaluation import average_precision
from owl_det.evaluation.average_precision import Limits
from owl_det.evaluation.coco import CocoEvaluator

NAMES = {
    "AP": "AP",
    "AP50": "AP50",
    "AP75": "AP75",
    "APs": "AP_small",
    "APm": "AP_medium",
    "APl": "AP_large",
    "APr": "AP_r",
    "APc": "AP_c",
    "APf": "AP_f",
}


@pytest.fixture(scope="module")
def annotations(shared_data: Path) -> dict[str, Any]:
    file = shared_data / "lvis/lvis_val_100.json"
    if not file.is_file():
        pytest.skip(f"needs the real LVIS records of {file.name}, which are absent")
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def lvis() -> Any:
    """The official tool, which asks NumPy for a name that it no longer has."""
    lvis = pytest.importorskip("lvis", reason="the official LVIS tool is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "float", float, raising=False)
        yield lvis


def truth(image: dict[str, Any], rows: list[dict[str, Any]]):
    boxes = np.array([row["bbox"] for row in rows], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = np.array([row["category_id"] for row in rows], np.int32)
    areas = np.array([row["area"] for row in rows], np.float32)
    return boxes, labels, areas


def detections(rng, image, boxes, labels):
    """Shifted true boxes, and many that are nowhere; categories present, negative and unknown."""
    near = np.repeat(boxes, 4, 0) + rng.normal(0, 4, (4 * len(boxes), 4))
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
    low = rng.uniform(0, 300, (330 if image["id"] % 3 == 0 else 20, 2))
    boxes = np.concatenate([near, np.concatenate([low, low + rng.uniform(5, 200, low.shape)], 1)])
    guesses = np.concatenate([labels, image["neg_category_ids"], [1, 2, 3]]).astype(np.int32)
    found = rng.choice(guesses, len(boxes))
    is_right = rng.uniform(size=len(near)) < 0.6
    found[: len(near)][is_right] = np.repeat(labels, 4)[is_right]
    return boxes.astype(np.float32), rng.uniform(size=len(boxes)).astype(np.float32), found


def evaluate(annotations, protocol, detect) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Our metrics, and the detections as the official tool takes them."""
    evaluator = CocoEvaluator(
        [
            Category(id=c["id"], name=c["name"], groups=(c["frequency"],))
            for c in annotations["categories"]
        ],
        protocol,
    )
    results = []
    for image in annotations["images"]:
        rows = [row for row in annotations["annotations"] if row["image_id"] == image["id"]]
        boxes, labels, areas = truth(image, rows)
        found = detect(image, boxes, labels)
        evaluator.add(
            image["id"],
            (image["height"], image["width"]),
            (boxes, labels, np.zeros(len(boxes), bool)),
            found,
            negatives=image["neg_category_ids"],
            not_exhaustive=image["not_exhaustive_category_ids"],
            true_areas=areas,
        )
        for (x0, y0, x1, y1), score, label in zip(*(a.tolist() for a in found), strict=True):
            bbox = [x0, y0, x1 - x0, y1 - y0]
            row = {"image_id": image["id"], "category_id": label, "bbox": bbox, "score": score}
            results.append(row)
    return evaluator.compute().scalars(), results


def official(lvis, annotations, results, max_dets) -> dict[str, float]:
    made = lvis.LVIS.__new__(lvis.LVIS)  # its own constructor reads files only
    made.dataset = json.loads(json.dumps(annotations))
    made.logger = logging.getLogger("lvis")
    made._create_index()
    run = lvis.LVISEval(made, lvis.LVISResults(made, results, max_dets), "bbox")
    run.run()
    return run.get_results()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("protocol, max_dets", [("lvis", 300), ("fixed", -1)])
def test_equals_the_official_tool(lvis, annotations, protocol, max_dets, monkeypatch):
    monkeypatch.setitem(average_precision.LIMITS, "fixed", Limits(per_category=40))
    rng = np.random.default_rng(0)
    ours, results = evaluate(annotations, protocol, lambda *args: detections(rng, *args))
    if protocol == "fixed":
        by_category: dict[int, list[dict[str, Any]]] = {}
        for row in sorted(results, key=lambda row: -row["score"]):
            by_category.setdefault(row["category_id"], []).append(row)
        assert max(map(len, by_category.values())) > 40
        results = [row for rows in by_category.values() for row in rows[:40]]
    theirs = official(lvis, annotations, results, max_dets)
    assert 0.05 < ours["AP"] < 0.95
    for name, mine in NAMES.items():
        assert ours[mine] == pytest.approx(theirs[name], abs=1e-6), name


@pytest.mark.parametrize("protocol", ["lvis", "fixed"])
def test_perfect_detections_reach_one_on_real_lvis_records(annotations, protocol):
    rng = np.random.default_rng(0)
    metrics, _ = evaluate(
        annotations, protocol, lambda _, boxes, labels: (boxes, rng.random(len(boxes)), labels)
    )
    for name in NAMES.values():
        assert metrics[name] == pytest.approx(1, abs=1e-12), name


CATEGORIES = (Category(id=1, name="cat"), Category(id=2, name="dog"))
BOX = np.array([[10, 10, 50, 50]], np.float32)


def crowded(protocol: Any, num_others: int) -> dict[str, float]:
    """One cat, found at a low score after many detections of dogs, which are known absent."""
    evaluator = CocoEvaluator(CATEGORIES, protocol)
    boxes = np.concatenate([np.tile(BOX, (num_others, 1)), BOX])
    scores = np.concatenate([np.full(num_others, 0.9), [0.1]])
    labels = np.concatenate([np.full(num_others, 2), [1]])
    evaluator.add(1, (90, 90), (BOX, np.array([1]), np.array([False])), (boxes, scores, labels))
    return evaluator.compute().AP50_by_category


def test_categories_compete_for_the_places_of_an_image_in_lvis_alone():
    assert crowded("lvis", 299)["cat"] == pytest.approx(1)
    assert crowded("lvis", 300)["cat"] == 0
    assert crowded("coco", 300)["cat"] == crowded("fixed", 300)["cat"] == pytest.approx(1)


def test_fixed_keeps_the_best_of_each_category_over_all_images(monkeypatch):
    monkeypatch.setitem(average_precision.LIMITS, "fixed", Limits(per_category=2))
    evaluator = CocoEvaluator(CATEGORIES, "fixed")
    for image_id, score in enumerate([0.5, 0.9, 0.7, 0.8], start=1):
        found = (BOX, np.array([score]), np.array([1]))
        evaluator.add(image_id, (90, 90), (BOX, np.array([1]), np.array([False])), found)
    # Two of four instances are found: precision 1 at the 51 recall values up to one half.
    assert evaluator.compute().AP50 == pytest.approx(51 / 101)


def test_sizes_go_by_the_area_of_the_mask():
    evaluator = CocoEvaluator(CATEGORIES)
    found = (BOX, np.array([0.5]), np.array([1]))
    truth = (BOX, np.array([1]), np.array([False]))
    evaluator.add(1, (90, 90), truth, found, true_areas=np.array([900.0]))
    assert evaluator.compute().AP_by_size == {"small": pytest.approx(1)}
    evaluator.add(2, (90, 90), truth, (BOX[:0], np.zeros(0), np.zeros(0, int)))
    assert set(evaluator.compute().AP_by_size) == {"small", "medium"}
    assert evaluator.compute().AP_by_size["medium"] == 0
