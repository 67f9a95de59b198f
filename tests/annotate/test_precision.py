"""Precision of pseudo-boxes against hand-made truths, and against drawn scenes."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines import pseudo_records, shapes_names
from data_pipelines.pseudo_records import PseudoRecord
from data_pipelines.shapes_world import ShapesWorld
from owl_det import cli
from owl_det.annotate import precision
from owl_det.annotate.precision import Truth
from owl_det.errors import DataError

GROUPS = {"cat": "base", "dog": "base", "owl": "novel"}
SQUARE, SHIFTED, FAR = [0, 0, 10, 10], [0, 0, 10, 6], [20, 20, 30, 30]  # IoU 0.6 and 0


def _entry(*boxes: tuple[str, float, list[float]]) -> dict[str, Any]:
    return {
        "key": "a",
        "phrases": [phrase for phrase, _, _ in boxes],
        "scores": [score for _, score, _ in boxes],
        "boxes_xyxy": [box for _, _, box in boxes],
    }


def _truth(*objects: tuple[str, list[float]]) -> dict[str, Truth]:
    boxes = np.array([box for _, box in objects], np.float32).reshape(-1, 4)
    return {"a": Truth(boxes, tuple(name for name, _ in objects))}


def _measure(
    entry: dict[str, Any], truths: dict[str, Truth], low: float = 0.1, high: float = 0.3
) -> dict[str, dict[str, Any]]:
    return precision.measure([entry], truths, GROUPS, min_box_score=low, min_image_score=high)


def test_a_box_is_right_on_a_true_box_of_its_name() -> None:
    truths = _truth(("cat", SQUARE), ("owl", FAR))
    found = _measure(_entry(("cat", 0.9, SHIFTED), ("dog", 0.8, SQUARE), ("cat", 0.7, FAR)), truths)
    assert found["base"] == {
        "pseudo_boxes": 3,
        "right": 1,
        "on_object": 3,
        "holds_name": 1,
        "true_boxes": 1,
        "precision": 1 / 3,
        "recall": 1.0,
    }
    assert found["novel"]["precision"] is None and found["novel"]["recall"] == 0.0
    assert found["all"]["true_boxes"] == 2 and found["all"]["recall"] == 0.5


def test_boxes_in_a_crowd_of_their_name_do_not_count() -> None:
    """Nobody boxed the objects of a crowd; its name is no absent one either."""
    crowd = np.array([[20, 20, 40, 40]], np.float32)
    truth = Truth(np.array([SQUARE], np.float32), ("cat",), crowd, ("dog",))
    boxes = [("dog", 0.9, FAR), ("cat", 0.8, FAR), ("dog", 0.7, [10, 20, 29, 30])]
    found = _measure(_entry(*boxes), {"a": truth})
    # The cat is none of the crowd's, and of the last box less than half lies in it.
    assert found["base"]["pseudo_boxes"] == 2
    entry = {**_entry(*boxes), "hard_negatives": ["dog"]}
    (row,) = precision.measure_hard_negatives([entry], {"a": truth}, 0.3)
    assert (row["asked"], row["absent"]) == (1, 0)


def test_a_true_box_is_given_once_to_the_best_score() -> None:
    truths = _truth(("cat", SQUARE))
    found = _measure(_entry(("cat", 0.5, SQUARE), ("cat", 0.9, SHIFTED)), truths)
    assert (found["base"]["right"], found["base"]["pseudo_boxes"]) == (1, 2)
    two = _truth(("cat", SQUARE), ("cat", SHIFTED))
    # The better box takes the object that it overlaps most and leaves the other.
    found = _measure(_entry(("cat", 0.9, SHIFTED), ("cat", 0.5, SQUARE)), two)
    assert found["base"]["right"] == 2


@pytest.mark.parametrize(("height", "right"), [(5.0, 1), (4.99, 0)])
def test_an_overlap_of_a_half_is_enough(height: float, right: int) -> None:
    found = _measure(_entry(("cat", 0.9, [0, 0, 10, height])), _truth(("cat", SQUARE)))
    assert found["base"]["right"] == right


def test_the_thresholds_are_those_of_training() -> None:
    entry = _entry(("cat", 0.35, SQUARE), ("cat", 0.2, FAR), ("owl", 0.05, FAR))
    truths = _truth(("cat", SQUARE), ("cat", FAR))
    counts = [
        _measure(entry, truths, low, high)["all"]["pseudo_boxes"]
        for low, high in ((0.1, 0.3), (0.3, 0.3), (0.05, 0.3), (0.1, 0.4))
    ]
    assert counts == [2, 1, 3, 0]


def test_phrases_that_are_no_name_are_a_group_of_their_own() -> None:
    boxes = ("a cat, lying", 0.9, SQUARE), ("catfish", 0.9, SQUARE)
    found = _measure(_entry(*boxes), _truth(("cat", SQUARE)))
    assert found["no name"]["on_object"] == 2 and found["no name"]["holds_name"] == 1
    assert found["no name"]["right"] == 0 and found["no name"]["precision"] == 0.0
    assert found["base"]["pseudo_boxes"] == 0 and found["all"]["pseudo_boxes"] == 2


def test_images_without_records_count_for_recall() -> None:
    truths = _truth(("cat", SQUARE))
    truths["b"] = Truth(np.array([FAR], np.float32), ("cat",))
    assert _measure(_entry(("cat", 0.9, SQUARE)), truths)["base"]["recall"] == 0.5
    with pytest.raises(DataError, match="record 'c'"):
        _measure({**_entry(), "key": "c"}, truths)


def test_hard_negatives_are_right_where_they_are_absent() -> None:
    truths = _truth(("cat", SQUARE))
    entry = {**_entry(("owl", 0.5, FAR)), "hard_negatives": ["dog", "cat"]}
    weak = {**_entry(("owl", 0.2, FAR)), "hard_negatives": ["cat"]}
    assert precision.measure_hard_negatives([entry, weak], truths, 0.3) == [
        {"first": 1, "asked": 1, "absent": 1, "share": 1.0},
        {"first": 2, "asked": 2, "absent": 1, "share": 0.5},
    ]
    none = {**_entry(("owl", 0.5, FAR)), "hard_negatives": []}
    assert precision.measure_hard_negatives([none], truths, 0.3) == []


# --- records of shapes world ---------------------------------------------------------------------

CROWDED = "shapes_world:crowded:6:32"


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Right boxes for the true objects of images 0 to 3, but image 1's are all called a cat."""
    world = ShapesWorld(split="crowded", num_images=6, image_size=32)
    job = {
        "format": pseudo_records.FORMAT,
        "input": CROWDED,
        "num_shards": 1,
        "max_ngrams": 1,
        "floor": 0.05,
        "image_floor": 0.05,
        "min_box_score": 0.1,
        "min_image_score": 0.3,
    }
    with pseudo_records.ShardWriter(tmp_path, 0, 1) as writer:
        for index in range(4):
            scene = world.scene(index)
            names = [shapes_names.object_names()[x.category].name for x in scene.objects]
            phrases = ["cat"] * len(names) if index == 1 else names
            record = PseudoRecord(
                key=f"{index:08d}",
                height=32,
                width=32,
                texts=(),
                boxes_xyxy=np.array([x.box for x in scene.objects], np.float32),
                scores=np.full(len(names), 0.5, np.float32),
                phrases=tuple(phrases),
                spaces=("curated",) * len(names),
            )
            writer.add(record, pseudo_records.encode_image(scene.image))
        writer.finish({"format": pseudo_records.FORMAT, "counts": {}})
    pseudo_records.write_json(tmp_path / "job.json", job)
    return tmp_path


def test_true_objects_are_all_right(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = ShapesWorld(split="crowded", num_images=6, image_size=32)
    sizes = [len(world.scene(index).objects) for index in range(6)]
    out = tmp_path / "precision.json"
    assert cli.main(["annotate-precision", str(records), "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    everything = content["groups"]["all"]
    assert content["source"] == CROWDED and content["images"] == 6
    assert everything["pseudo_boxes"] == everything["on_object"] == sum(sizes[:4])
    assert everything["right"] == sum(sizes[:4]) - sizes[1]
    assert everything["true_boxes"] == sum(sizes)
    assert content["groups"]["no name"]["pseudo_boxes"] == sizes[1]
    named = [row for name, row in content["groups"].items() if name.startswith(("base", "novel"))]
    assert sum(row["right"] for row in named) == everything["right"]
    assert all(row["precision"] == 1.0 for row in named if row["pseudo_boxes"])
    assert f"| all | {sum(sizes[:4])} |" in capsys.readouterr().out


def _write_coco(root: Path) -> None:
    """Two images in a folder and its folder; of the second a cat and a crowd of dogs are boxed."""
    (root / "images" / "sub").mkdir(parents=True)
    files = ("a.png", "sub/b.png")
    for file in files:
        Image.new("RGB", (32, 32)).save(root / "images" / file)
    boxes = [(1, 1, [0, 0, 10, 10], 0), (2, 1, [0, 0, 10, 10], 0), (2, 2, [20, 20, 10, 10], 1)]
    content = {
        "images": [
            {"id": i, "file_name": file, "height": 32, "width": 32}
            for i, file in enumerate(files, start=1)
        ],
        "annotations": [
            {"id": i, "image_id": image, "category_id": c, "bbox": b, "area": 100, "iscrowd": crowd}
            for i, (image, c, b, crowd) in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "Cat"}, {"id": 2, "name": "dog"}],
    }
    (root / "annotations.json").write_text(json.dumps(content))


def test_the_truth_of_a_folder_of_images_is_a_source_as_in_a_config(tmp_path: Path) -> None:
    _write_coco(tmp_path)
    images = str(tmp_path / "images")
    known = precision.open_truth(f"kind=coco,path={tmp_path}", images)
    assert known.groups == {"cat": "names", "dog": "names"}
    assert {key: truth.names for key, truth in known.truths.items()} == {
        "a.png": ("cat",),
        "sub/b.png": ("cat",),
    }
    entry = {**_entry(("cat", 0.9, SHIFTED), ("dog", 0.8, FAR)), "key": "sub/b.png"}
    found = precision.measure(
        [entry], known.truths, known.groups, min_box_score=0.1, min_image_score=0.3
    )
    assert found["all"]["right"] == 1 and found["all"]["recall"] == 0.5
    # The dog lies in the crowd of dogs, and does not count.
    assert found["all"]["precision"] == 1.0 and found["all"]["pseudo_boxes"] == 1
    with pytest.raises(DataError, match="kind=shapes_world, but expected coco"):
        precision.open_truth("kind=shapes_world", images)
    with pytest.raises(DataError, match="no such|annotations"):
        precision.open_truth(f"kind=coco,path={tmp_path / 'absent'}", images)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--source", "shapes_world:train:6:32"], "--source: .*were made of shapes_world:crowded"),
        (["--source", "shapes_world:crowded:6"], "--source"),
        (["--source", "shapes_world:crowded:2:32"], "record '00000002'"),
        (["--source", "kind=coco,path=a"], "were made of shapes_world:crowded"),
        (["--source", "shapes_world:crowd:6:32"], "expected shapes_world:SPLIT:NUM"),
        (["--min_box_score", "0.01"], "--min_box_score: 0.01"),
    ],
)
def test_what_does_not_belong_together_is_one_line(
    records: Path, extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["annotate-precision", str(records), *extra]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()

    assert re.search(message, line)
