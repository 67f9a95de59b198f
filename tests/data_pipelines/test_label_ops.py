import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines import label_ops
from data_pipelines.label_ops import Instances


def instances(boxes, names=None, scores=None, is_crowd=None) -> Instances:
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return Instances(
        boxes,
        tuple(names or ((str(i),) for i in range(len(boxes)))),
        np.array(scores if scores is not None else np.ones(len(boxes)), np.float32),
        np.array(is_crowd if is_crowd is not None else np.zeros(len(boxes)), bool),
    )


def test_degenerate_boxes():
    boxes = np.array(
        [
            [1, 1, 5, 5],
            [5, 5, 5, 9],  # no width
            [6, 5, 5, 9],  # corners swapped
            [-9, 0, 0, 9],  # touches the image from outside
            [20, 2, 30, 9],  # right of it
            [-5, -5, 90, 90],
            [np.nan, 0, 5, 5],
            [0, 0, np.inf, 5],
        ]
    )
    keep = label_ops.drop_degenerate(boxes, 10, 20)
    np.testing.assert_array_equal(keep, [True, False, False, False, False, True, False, False])
    clipped = label_ops.clip_boxes(boxes[keep], 10, 20)
    np.testing.assert_array_equal(clipped, [[1, 1, 5, 5], [0, 0, 20, 10]])


def test_no_boxes():
    empty = instances([])
    assert label_ops.drop_degenerate(empty.boxes_xyxy, 4, 4).shape == (0,)
    merged = label_ops.merge_instances(*empty, iou=0.5, rng=np.random.default_rng(0))
    assert merged.names == ()
    cropped, hidden = label_ops.crop_instances(empty, (0, 0, 2, 2), 0.5)
    assert cropped.names == () and hidden == ()


def test_merging_unites_names_and_keeps_one_box():
    labels = instances(
        [[0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 10, 9.5]],
        [("cat", "animal"), ("dog",), ("animal", "pet")],
        scores=[0.3, 0.5, 0.9],
    )
    kept = set()
    for seed in range(20):
        merged = label_ops.merge_instances(*labels, iou=0.9, rng=np.random.default_rng(seed))
        assert set(merged.names) == {("cat", "animal", "pet"), ("dog",)}
        united = merged.names.index(("cat", "animal", "pet"))
        assert merged.scores[united] == np.float32(0.9)
        kept.add(tuple(merged.boxes_xyxy[united]))
    assert kept == {(0, 0, 10, 10), (0, 0, 10, 9.5)}


def test_merging_spares_lower_overlaps_and_crowds():
    labels = instances(
        [[0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 10]], is_crowd=[False, False, True]
    )
    merged = label_ops.merge_instances(*labels, iou=0.81, rng=np.random.default_rng(0))
    assert merged.names == labels.names
    merged = label_ops.merge_instances(*labels, iou=0.79, rng=np.random.default_rng(0))
    assert len(merged.names) == 2 and ("2",) in merged.names


boxes_strategy = st.lists(
    st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(1, 9), st.integers(1, 9)),
    max_size=8,
).map(lambda rows: np.array([(x, y, x + w, y + h) for x, y, w, h in rows]).reshape(-1, 4))


@given(boxes=boxes_strategy, iou=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_merging_loses_no_name_and_leaves_boxes_of_the_input(boxes, iou, seed):
    labels = instances(boxes)
    merged = label_ops.merge_instances(*labels, iou=iou, rng=np.random.default_rng(seed))
    assert sorted(n for names in merged.names for n in names) == sorted(
        n for names in labels.names for n in names
    )
    assert {tuple(box) for box in merged.boxes_xyxy} <= {tuple(box) for box in labels.boxes_xyxy}


@pytest.mark.parametrize(("keep", "kept"), [(0.6, True), (0.61, False)])
def test_crop_keeps_by_visible_area(keep, kept):
    labels = instances([[0, 0, 10, 10], [0, 0, 3, 3]])
    cropped, hidden = label_ops.crop_instances(labels, (4, 0, 30, 30), keep)
    assert cropped.names == ((("0",),) if kept else ())
    assert hidden == (() if kept else ("0",))  # the second one is out of sight altogether
    if kept:
        np.testing.assert_array_equal(cropped.boxes_xyxy, [[0, 0, 6, 10]])


def test_crop_keeps_what_is_seen_of_a_crowd():
    labels = instances([[0, 0, 10, 10]], is_crowd=[True])
    cropped, hidden = label_ops.crop_instances(labels, (9, 9, 20, 20), 0.6)
    np.testing.assert_array_equal(cropped.boxes_xyxy, [[0, 0, 1, 1]])
    assert hidden == ()


@given(boxes=boxes_strategy, keep=st.floats(0, 1))
def test_crop_rule(boxes, keep):
    x0, y0, x1, y1 = 3, 2, 11, 12
    cropped, _ = label_ops.crop_instances(instances(boxes), (x0, y0, x1, y1), keep)
    expected = []
    for index, (a, b, c, d) in enumerate(boxes):
        visible = max(0, min(c, x1) - max(a, x0)) * max(0, min(d, y1) - max(b, y0))
        if visible > 0 and visible >= keep * (c - a) * (d - b):
            expected.append((str(index),))
    assert cropped.names == tuple(expected)
    assert label_ops.drop_degenerate(cropped.boxes_xyxy, y1 - y0, x1 - x0).all()


@given(boxes=boxes_strategy)
def test_flip_twice_is_the_identity(boxes):
    boxes = boxes.astype(np.float32)
    once = label_ops.flip_boxes(boxes, 20)
    assert label_ops.drop_degenerate(once, 20, 20).all()
    np.testing.assert_array_equal(label_ops.flip_boxes(once, 20), boxes)
