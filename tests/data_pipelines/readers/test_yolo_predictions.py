"""What detectors write with labels: confidences, tracks, key points. It is never a polygon."""

import numpy as np
import pytest
from PIL import Image

from data_pipelines.readers.yolo import YoloReader
from owl_det.errors import DataError

BOXES = np.array(  # cx, cy, width, height
    [[x, y, side, 0.8 * side] for x in (0.3, 0.5, 0.7) for y in (0.3, 0.6) for side in (0.1, 0.5)]
)


def labelled(root, rows, yaml="") -> YoloReader:
    """A data set of one image with these numbers after the class."""
    (root / "images").mkdir()
    (root / "labels").mkdir()
    Image.new("RGB", (100, 100)).save(root / "images/a.png")
    lines = ["0 " + " ".join(f"{number:.6g}" for number in row) + "\n" for row in rows]
    (root / "labels/a.txt").write_text("".join(lines))
    (root / "data.yaml").write_text(f"names: [cat]\n{yaml}")
    return YoloReader(root)


def poses(num_points: int, *, dimensions: int, tail: tuple[float, ...] = (), spread: float = 0.4):
    """Boxes with points in them, each with a confidence if there are three dimensions."""
    rng = np.random.default_rng(0)
    rows = []
    for box in BOXES:
        points = rng.uniform(0.3, 0.99, (num_points, dimensions))
        points[:, :2] = box[:2] + box[2:] * rng.uniform(-spread, spread, (num_points, 2))
        rows.append([*box, *points.clip(0, 1).ravel(), *tail])
    return rows


@pytest.mark.parametrize(
    ("num_points", "tail", "told"),
    [
        (4, (), r"add `kpt_shape: \[4, 3\]`.* to data.yaml, or"),
        (24, (), r"add `kpt_shape: \[24, 3\]`.* to data.yaml, or"),
        (1, (0.83,), r"\[1, 3\]` to data.yaml and leave out the confidence at the end"),
        (17, (0.83,), r"\[17, 3\]` to data.yaml and leave out the confidence at the end"),
        (2, (0.83, 1), r"\[2, 3\]`.* and leave out the confidence and the track number"),
        (17, (), "expected 5 columns"),  # an odd number of columns is no polygon
        (17, (0.83, 3), "expected 5 columns"),
    ],
)
def test_predicted_poses_are_refused(tmp_path, num_points, tail, told):
    with pytest.raises(DataError, match=told):
        labelled(tmp_path, poses(num_points, dimensions=3, tail=tail))


def test_predicted_poses_are_their_boxes_where_their_shape_is_told(tmp_path):
    reader = labelled(tmp_path, poses(17, dimensions=3), yaml="kpt_shape: [17, 3]\n")
    centers, sides = BOXES[:, :2], BOXES[:, 2:]
    truth = 100 * np.concatenate([centers - sides / 2, centers + sides / 2], axis=1)
    np.testing.assert_allclose(reader[0].boxes_xyxy, truth.clip(0, 100), atol=1e-3)


@pytest.mark.parametrize("track", [0, 1])
def test_a_track_number_that_never_changes_is_one(tmp_path, track):
    with pytest.raises(DataError, match="the confidence and the track number"):
        labelled(tmp_path, [[*box, 0.9, track] for box in BOXES])


def test_points_outside_of_their_boxes_are_doubted(tmp_path, caplog):
    rows = poses(5, dimensions=2, spread=0.7) + poses(5, dimensions=2, spread=0.7)
    labelled(tmp_path, rows)
    assert "begins with what may be a box, and all have 14 numbers" in caplog.text


def test_a_number_far_off_is_shown_wherever_it_stands(tmp_path):
    with pytest.raises(DataError, match="line 1: 0.4 0.4 64 0.2: YOLO's coordinates are relative"):
        labelled(tmp_path, [[0.1, 0.1, 0.4, 0.1, 0.4, 0.4, 64, 0.2]])


@pytest.mark.parametrize("num_points", [4, 5, 12])
def test_polygons_of_one_length_are_polygons(tmp_path, caplog, num_points):
    angles = np.linspace(0, 2 * np.pi, num_points, endpoint=False)
    around = np.stack([np.cos(angles), np.sin(angles)], axis=1) / 2
    rows = [(box[:2] + box[2:] * around).clip(0, 1).ravel() for box in BOXES]
    reader = labelled(tmp_path, rows)
    assert len(reader[0].names) == len(BOXES) and "poses" not in caplog.text
