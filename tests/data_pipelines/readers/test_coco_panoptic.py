"""The panoptic reader: ids in PNG colours, what counts as a region, and one line for each fault."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.panoptic_world import PanopticWorld
from data_pipelines.readers.coco_panoptic import CocoPanopticReader, plain_name
from owl_det.errors import DataError

CAT, SPECK, CROWD, GRASS = 5, 300, 70_000, 2**24 - 1
HEIGHT, WIDTH = 40, 60


def _ids() -> np.ndarray:
    ids = np.full((HEIGHT, WIDTH), GRASS, np.uint32)
    ids[:3] = 0  # unlabelled
    ids[10:30, 5:25] = CAT
    ids[5:12, 50:58] = SPECK
    ids[20:40, 40:60] = CROWD
    return ids


def _content() -> dict[str, Any]:
    def segment(id: int, category: int, bbox: list[int], iscrowd: int = 0) -> dict[str, Any]:
        return {"id": id, "category_id": category, "bbox": bbox, "iscrowd": iscrowd, "area": 1}

    return {
        "images": [{"id": 9, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}],
        "categories": [
            {"id": 17, "name": "cat", "isthing": 1},
            {"id": 18, "name": "dog", "isthing": 1},
            {"id": 193, "name": "grass-merged", "isthing": 0},
            {"id": 199, "name": "wall-other-merged", "isthing": 0},
        ],
        "annotations": [
            {
                "image_id": 9,
                "file_name": "a.png",
                "segments_info": [
                    segment(CAT, 17, [5, 10, 20, 20]),
                    segment(GRASS, 193, [0, 3, 60, 37]),
                    segment(SPECK, 18, [50, 5, 8, 7]),
                    segment(CROWD, 18, [40, 20, 20, 20], 1),
                ],
            }
        ],
    }


@pytest.fixture
def open_reader(tmp_path: Path) -> Any:
    (tmp_path / "images").mkdir()
    (tmp_path / "panoptic").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images/a.jpg")

    def make(content: Any = None, ids: np.ndarray | None = None) -> CocoPanopticReader:
        ids = _ids() if ids is None else ids
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        Image.fromarray(colours).save(tmp_path / "panoptic/a.png")
        file = tmp_path / "panoptic.json"
        file.write_text(json.dumps(_content() if content is None else content))
        return CocoPanopticReader(file, tmp_path / "images", tmp_path / "panoptic")

    return make


def test_regions_are_segments_that_are_no_crowd_and_not_tiny(open_reader: Any) -> None:
    reader = open_reader()
    found = reader.regions(0)
    assert found.names == ("cat", "grass") and found.is_thing.tolist() == [True, False]
    assert found.present == ("cat", "grass", "dog") and found.size == (HEIGHT, WIDTH)
    np.testing.assert_array_equal(found.boxes_xyxy, [[5, 10, 25, 30], [0, 3, 60, 40]])
    ids = _ids()
    wanted = np.where(ids == CAT, 0, np.where(ids == GRASS, 1, -1))
    np.testing.assert_array_equal(found.segments, wanted)


def test_records_are_those_of_a_detection_data_set(open_reader: Any) -> None:
    reader = open_reader()
    record = reader[0]
    assert record.names == (("cat",), ("dog",), ("dog",))
    assert record.is_crowd.tolist() == [False, False, True]
    assert record.not_exhaustive == ("grass",) and record.negatives == ("wall",)
    assert [c.name for c in reader.categories] == ["cat", "dog", "grass", "wall"]
    assert [c.groups for c in reader.categories] == [("thing",)] * 2 + [("stuff",)] * 2


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("wall-other-merged", "wall"),
        ("wall-brick", "wall brick"),
        ("door-stuff", "door"),
        ("food-other-merged", "food"),
        ("sea", "sea"),
    ],
)
def test_names_of_stuff_are_made_plain(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def _without(path: str) -> dict[str, Any]:
    content = _content()
    *parents, leaf = path.split(".")
    node: Any = content
    for key in parents:
        node = node[int(key) if key.isdigit() else key]
    del node[int(leaf) if leaf.isdigit() else leaf]
    return content


def _with(path: str, value: Any) -> dict[str, Any]:
    content = _content()
    *parents, leaf = path.split(".")
    node: Any = content
    for key in parents:
        node = node[int(key) if key.isdigit() else key]
    node[leaf] = value
    return content


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("categories.0.isthing", r"categories\[0\]: the field isthing is missing"),
        ("annotations.0", "image 9 has no entry in annotations"),
        ("annotations.0.file_name", r"annotations\[0\]: the field file_name is missing"),
        ("categories.1", r"segments_info\[2\].category_id: no category has the id 18"),
    ],
)
def test_a_missing_field_is_named(open_reader: Any, path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_reader(_without(path))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("annotations.0.segments_info.0.id", [5], "expected an integer, got"),
        ("annotations.0.segments_info.0.category_id", {}, "expected an id"),
        ("annotations.0.segments_info.0.iscrowd", "half", "expected 0 or 1, got 'half'"),
        ("annotations.0.segments_info", {}, "segments_info: expected a list"),
        ("annotations.0.image_id", [9], "expected an id"),
        ("categories.0.isthing", None, "expected 0 or 1"),
        ("categories.0.name", "Dog", "'Dog' and 'dog' are one text"),
        ("images.0.id", None, "expected an id"),
        ("annotations", [{"image_id": 9, "bbox": []}], "no segments"),
    ],
)
def test_a_malformed_field_is_named(open_reader: Any, path: str, value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_reader(_with(path, value))


def test_other_spellings_are_read_alike(open_reader: Any) -> None:
    good, made = open_reader(), _content()
    made["images"][0] |= {"height": str(HEIGHT), "width": float(WIDTH)}
    made["annotations"][0]["image_id"] = "9"
    for info in made["annotations"][0]["segments_info"]:
        info |= {"bbox": [str(x) for x in info["bbox"]], "iscrowd": str(info["iscrowd"])}
        info |= {"id": str(info["id"]), "category_id": float(info["category_id"])}
    reader = open_reader(made)
    assert reader.version == good.version and reader.counts == good.counts
    assert reader.regions(0).names == good.regions(0).names


def test_without_a_size_the_image_is_measured(open_reader: Any) -> None:
    good, made = open_reader(), _content()
    del made["images"][0]["height"]
    reader = open_reader(made)
    assert reader.counts == good.counts and reader.regions(0).size == (HEIGHT, WIDTH)
    np.testing.assert_array_equal(reader[0].boxes_xyxy, good[0].boxes_xyxy)


@pytest.mark.parametrize(
    "box", [None, [], [1, 2, 3], "box", [1, 2, float("nan"), 4], [10**400] * 4]
)
def test_segments_without_a_box_are_counted(
    open_reader: Any, caplog: pytest.LogCaptureFixture, box: Any
) -> None:
    made = _content()
    for info in made["annotations"][0]["segments_info"][:2]:
        info["bbox"] = box
    reader = open_reader(made)
    assert reader.counts.dropped == {"whose bbox is missing or no four finite numbers": 1}
    assert reader.counts.num_read == 3 and set(reader[0].not_exhaustive) == {"grass", "cat"}
    assert "1 segments of stuff" in caplog.text and reader.regions(0).names == ()


@pytest.mark.parametrize("name", ["../a.png", "", "folder/a.png", "/etc/a.png"])
def test_files_outside_the_folder_are_refused(open_reader: Any, name: str) -> None:
    content = _content()
    content["annotations"][0]["file_name"] = name
    with pytest.raises(DataError, match="without folders"):
        open_reader(content)


def test_the_png_must_show_the_segments_of_the_file(open_reader: Any, tmp_path: Path) -> None:
    more = _ids()
    more[0, 0] = 1234
    with pytest.raises(DataError, match="a.png: segment 1234 is in the PNG but not in the JSON"):
        open_reader(ids=more).regions(0)
    fewer = _ids()
    fewer[fewer == CAT] = GRASS
    with pytest.raises(DataError, match="segment 5 is in the JSON file but not in the PNG"):
        open_reader(ids=fewer).regions(0)
    reader = open_reader(ids=_ids()[:-1])
    with pytest.raises(DataError, match=r"a.png: expected 60 x 40 pixels.* got 60 x 39"):
        reader.regions(0)
    reader = open_reader()
    Image.new("P", (WIDTH, HEIGHT)).save(tmp_path / "panoptic/a.png")
    with pytest.raises(DataError, match="PNG of RGB pixels, got PNG of P"):
        reader.regions(0)
    (tmp_path / "panoptic/a.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match="a.png: "):
        reader.regions(0)
    (tmp_path / "panoptic/a.png").unlink()
    with pytest.raises(DataError, match="No such file"):
        reader.regions(0)


def test_the_image_must_have_the_size_of_the_file(open_reader: Any, tmp_path: Path) -> None:
    reader = open_reader()
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(tmp_path / "images/a.jpg")
    with pytest.raises(DataError, match="a.jpg: is not of the size"):
        reader.regions(0)


def test_shapes_world_written_as_coco_panoptic_reads_back(tmp_path: Path) -> None:
    world = PanopticWorld(split="panoptic_test", num_images=6, image_size=128)
    images, segments = tmp_path / "images", tmp_path / "panoptic"
    images.mkdir()
    segments.mkdir()
    ids = {category.name: category.id for category in world.categories}
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [
        {"id": c.id, "name": c.name, "isthing": int("thing" in c.groups)} for c in world.categories
    ]
    for i in range(len(world)):
        found = world.regions(i)
        assert found.segments is not None
        Image.fromarray(world[i].image).save(images / f"{i}.png")
        numbers = 250 + 3 * np.arange(len(found.names))  # two bytes and one
        colours = numbers[found.segments]
        rgb = np.stack([colours % 256, colours // 256, 0 * colours], -1).astype(np.uint8)
        Image.fromarray(rgb).save(segments / f"{i}.png")
        content["images"].append({"id": i, "file_name": f"{i}.png", "height": 128, "width": 128})
        infos = [
            {
                "id": int(number),
                "category_id": ids[name],
                "iscrowd": 0,
                "bbox": [x, y, X - x, Y - y],
            }
            for number, name, (x, y, X, Y) in zip(
                numbers, found.names, found.boxes_xyxy.tolist(), strict=True
            )
        ]
        entry = {"image_id": i, "file_name": f"{i}.png", "segments_info": infos}
        content["annotations"].append(entry)
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    reader = CocoPanopticReader(tmp_path / "panoptic.json", images, segments)
    for i in range(len(world)):
        ours, theirs = reader.regions(i), world.regions(i)
        assert ours.names == theirs.names and set(ours.present) == set(theirs.present)
        np.testing.assert_array_equal(ours.segments, theirs.segments)
        np.testing.assert_array_equal(ours.boxes_xyxy, theirs.boxes_xyxy)
        np.testing.assert_array_equal(ours.is_thing, theirs.is_thing)
        assert reader[i].names == world[i].names
        assert set(reader[i].negatives) == set(world[i].negatives)
