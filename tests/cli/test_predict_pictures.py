"""`owl-det predict --out`: the picture is for people, the JSON lines are complete."""

import json

import numpy as np
from PIL import Image

from owl_det import cli


def test_the_picture_has_few_boxes_and_the_json_all(tiny_checkpoint, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).convert("P").save(tmp_path / "a.png")
    flags = ["--checkpoint", str(tiny_checkpoint), "--threshold", "0"]
    flags += ["--query", "cat", "--query", "dog", "--query", "fox"]
    assert cli.main(["predict", str(tmp_path / "a.png"), *flags, "--out", str(tmp_path / "o")]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert len(json.loads(line)["detections"]) > 30
    with Image.open(tmp_path / "o" / "a.png") as picture:
        assert picture.width == 8 * 64 and picture.height > 8 * 48, "a line below says how many"
