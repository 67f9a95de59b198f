"""The benchmark of search against detection."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import search as benchmark
from owl_det.inference.predictor import Detections
from tests import tiny


@pytest.mark.nightly
def test_command_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save(tmp_path / "model", model__class_prior=0.5)
    flags = ["--checkpoint", str(tmp_path / "model"), "--num_images", "5", "--batch_size", "2"]
    assert benchmark.main([*flags, "--repeats", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["detections"] <= 5 * 16 and found["images_that_differ"] == 0
    assert found["largest_box_difference_pixels"] < 1e-2
    assert found["bytes_per_image"] > 4 * 16 * (16 + 8)
    ratio = found["detect_wall_seconds"] / found["search_wall_seconds"]
    assert found["faster_wall"] == pytest.approx(ratio) and ratio > 0
    assert benchmark.main([*flags, "--repeats", "0"]) == 2
    assert "--repeats" in capsys.readouterr().err


def test_differences_are_found() -> None:
    box = np.array([[0, 0, 4, 4]], np.float32)
    one = Detections(box, np.array([0.5], np.float32), np.array([0], np.int32))
    moved = Detections(box + 1, np.array([0.25], np.float32), np.array([0], np.int32))
    renamed = Detections(box, np.array([0.5], np.float32), np.array([1], np.int32))
    found = benchmark.differences([one, one], [moved, renamed])
    assert found["images_that_differ"] == 1 and found["detections"] == 2
    assert found["largest_box_difference_pixels"] == 1
    assert found["largest_score_difference"] == 0.25
