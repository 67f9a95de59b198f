"""What an evaluation shows of an image: good boxes beside the truth, each class in its colour."""

import numpy as np
import pytest

from data_pipelines.features import Category, Record
from owl_det.evaluation import pictures
from owl_det.viz.detections import draw_detections
from owl_det.viz.pictures import pair

CATEGORIES = [Category(id=3 * i, name=f"name {i}") for i in range(5)]


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn, of prediction and truth, and the titles."""
    calls = []

    def note(image, boxes, names, scores=None, **options):
        calls.append((np.asarray(boxes).tolist(), list(names), options["classes"], scores))
        return draw_detections(image, boxes, names, scores, **options)

    def note_pair(left, right, **options):
        calls.append(options)
        return pair(left, right, **options)

    monkeypatch.setattr(pictures, "draw_detections", note)
    monkeypatch.setattr(pictures, "pair", note_pair)
    return calls


def record(boxes, names, source=""):
    return Record(
        image=np.zeros((100, 100, 3), np.uint8),
        image_id=7,
        boxes_xyxy=np.array(boxes, np.float32).reshape(-1, 4),
        names=tuple((name,) for name in names),
        is_crowd=np.zeros(len(names), bool),
        scores=np.ones(len(names), np.float32),
        source=source,
    )


def test_only_good_boxes_of_different_objects_are_drawn(drawn):
    boxes = np.array([[10, 10, 50, 50], [11, 10, 50, 50], [60, 60, 90, 90], [0, 0, 9, 9]], float)
    scores, classes = np.array([0.9, 0.8, 0.3, 0.19]), np.array([2, 1, 4, 0])
    truth = record([[10, 10, 50, 50]], ["name 2"], source="/data/images/a b.jpg")
    picture = pictures.beside_truth(truth, CATEGORIES, boxes, scores, classes)
    predicted, true, titles = drawn
    assert predicted[1:3] == (["name 2", "name 4"], [2, 4])
    assert predicted[3].tolist() == [0.9, 0.3]
    assert true[1:3] == (["name 2"], [2]), "the same colour in both"
    assert titles["title"] == "a b.jpg"
    assert titles["captions"] == ("prediction, scores from 0.2: 2 of 3", "ground truth")
    assert picture.shape[1] <= 2 * 386 + 8


def test_the_largest_of_many_true_boxes_are_drawn(drawn):
    sides = np.arange(1, 41)
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], axis=1)
    none = np.zeros((0, 4)), np.zeros(0), np.zeros(0, int)
    pictures.beside_truth(record(boxes, ["name 0"] * 40), CATEGORIES, *none)
    predicted, true, titles = drawn
    assert predicted[1] == [] and [box[2] for box in true[0]] == list(range(11, 41))
    assert titles["title"] == "image 7"
    assert titles["captions"][1] == "ground truth: 30 largest of 40"
