"""The benchmark of the training input: its files and its command."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import input_pipeline as benchmark


def test_made_files_are_like_photographs(tmp_path: Path) -> None:
    paths = benchmark.make_images(tmp_path, 2, quality=85)
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "JPEG" and all(480 <= side <= 1024 for side in image.size)
            # 1 to 5 bits a pixel is what cameras and the web have.
            assert 1 < 8 * path.stat().st_size / (image.width * image.height) < 5
            pixels = np.asarray(image, np.float32)
        red, blue = pixels[..., 0].ravel(), pixels[..., 2].ravel()
        assert np.corrcoef(red, blue)[0, 1] > 0.3


def test_command_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--grid", "2", "--image_size", "96", "--mosaics", "1", "--num_images", "4"]
    out = tmp_path / "found.json"
    assert benchmark.main([*flags, "--quality", "80", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text())
    entry = found["sets"]["quality_80"]
    assert entry["files"] == 4 and entry["tile_pixels"] == 48
    feeding = entry["feeding"]
    needed = feeding["mosaics_per_second"] * 4 / entry["images_per_core_second"]["median"]
    assert feeding["cores"] - 1 < needed <= feeding["cores"]


def test_a_folder_without_images_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(["--images", str(tmp_path)]) == 2
    assert "no .jpg or .jpeg files there (--images)" in capsys.readouterr().err
