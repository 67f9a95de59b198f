"""The benchmark of one-shot detection: its queries and its command."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import image_queries as benchmark
from data_pipelines.shapes_names import object_names
from data_pipelines.shapes_world import ShapesWorld


def test_query_objects_are_what_they_are_called() -> None:
    images, boxes, names = benchmark.query_objects(first=10, image_size=32, shots=2)
    assert names == [entry.name for entry in object_names() for _ in range(2)]
    world = ShapesWorld(split="test", image_size=32, num_images=3000)
    evaluated = {world[index].image.tobytes() for index in range(10)}
    assert not evaluated & {image.tobytes() for image in images}
    named = {
        (record.image.tobytes(), name[0], tuple(box.tolist()))
        for record in (world[index] for index in range(10, 400))
        for name, box in zip(record.names, record.boxes_xyxy, strict=True)
    }
    seen = [
        (image.tobytes(), name, tuple(box)) in named
        for image, name, box in zip(images, names, boxes, strict=True)
    ]
    assert np.mean(seen) > 0.9  # the others come later


@pytest.mark.nightly
def test_command_measures(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--checkpoint", str(tiny_checkpoint), "--num_images", "6"]
    assert benchmark.main([*flags, "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "found.json").read_text())
    assert found["names"] == 113 and found["images_per_name"] == 1
    assert set(found["AP50_text"]) == set(found["AP50_image"]) == set(found["ratio"])
    assert benchmark.main([*flags, "--shots", "0"]) == 2
    assert "--shots: must be positive" in capsys.readouterr().err
