import json

import numpy as np
import pytest
from PIL import Image

from data_pipelines.image_ops import UnreadableImage
from data_pipelines.readers.coco import CocoReader, plain_name
from owl_det.errors import DataError


def content() -> dict:
    return {
        "images": [
            {"id": 30, "file_name": "b.jpg", "height": 40, "width": 60},
            {"id": 7, "file_name": "a.jpg", "height": 40, "width": 60},
        ],
        "annotations": [
            {"id": 1, "image_id": 30, "category_id": 90, "bbox": [10, 20, 5, 10.5]},
            {"id": 2, "image_id": 30, "category_id": 3, "bbox": [50, 30, 50, 50], "iscrowd": 1},
            {"id": 3, "image_id": 30, "category_id": 90, "bbox": [1, 1, 0, 5]},
        ],
        "categories": [
            {"id": 3, "name": "traffic_light"},
            {"id": 90, "name": "cat"},
            {"id": 91, "name": "dog"},
        ],
    }


def lvis_content() -> dict:
    made = content()
    for category, frequency in zip(made["categories"], "rcf", strict=True):
        category["frequency"] = frequency
    for entry in made["images"]:
        entry["coco_url"] = f"http://images.cocodataset.org/val2017/{entry.pop('file_name')}"
        entry |= {"neg_category_ids": [91], "not_exhaustive_category_ids": [3]}
    return made


@pytest.fixture
def write(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (60, 40)).save(tmp_path / "images" / name)

    def write(made, images="images") -> CocoReader:
        text = made if isinstance(made, str) else json.dumps(made)
        (tmp_path / "instances.json").write_text(text)
        return CocoReader(tmp_path / "instances.json", tmp_path / images)

    return write


def test_captions_come_by_image_id(write, tmp_path):
    plain = write(content())
    texts = [(7, "one"), (30, " two "), (7, "three"), (30, ""), (99, "of another split")]
    file = tmp_path / "captions.json"
    entries = [{"image_id": image, "caption": text} for image, text in texts]
    file.write_text(json.dumps({"annotations": entries}))

    def read(captions) -> CocoReader:
        return CocoReader(tmp_path / "instances.json", tmp_path / "images", captions=captions)

    reader = read(file)
    assert [reader[i].captions for i in range(2)] == [("two",), ("one", "three")]
    assert reader.version != plain.version and plain[0].captions == ()
    file.write_text(json.dumps({"annotations": entries[-1:]}))
    with pytest.raises(DataError, match="holds no caption of an image of"):
        read(file)
    file.write_text(json.dumps({"annotations": [{"image_id": 7}]}))
    with pytest.raises(DataError, match=r"annotations\[0\].*caption"):
        read(file)


def test_records(write):
    reader = write(content())
    assert len(reader) == 2
    one = reader[0]
    assert one.image_id == 30 and one.image.startswith(b"\xff\xd8")
    np.testing.assert_array_equal(one.boxes_xyxy, [[10, 20, 15, 30.5], [50, 30, 60, 40]])
    assert one.boxes_xyxy.dtype == one.scores.dtype == np.float32
    assert one.names == (("cat",), ("traffic light",))
    np.testing.assert_array_equal(one.is_crowd, [False, True])
    np.testing.assert_array_equal(one.scores, [1, 1])
    assert one.negatives == ("dog",)
    assert one.source.endswith("b.jpg")
    empty = reader[1]
    assert empty.boxes_xyxy.shape == (0, 4) and empty.names == ()
    assert empty.negatives == ("traffic light", "cat", "dog")


def test_categories_keep_their_ids(write):
    reader = write(content())
    assert [(c.id, c.name, c.groups, c.frequency) for c in reader.categories] == [
        (3, "traffic light", (), 1),
        (90, "cat", (), 1),
        (91, "dog", (), 0),
    ]


def test_degenerate_boxes_are_counted_and_their_names_are_no_negatives(write, caplog):
    made = content()
    made["annotations"][2]["category_id"] = 91
    with caplog.at_level("WARNING"):
        reader = write(made)
    assert reader.counts.dropped == {"without area": 1}
    assert [r.getMessage() for r in caplog.records] == [
        "instances: 1 of 3 boxes dropped: 1 without area; 1 of 3 boxes reach beyond their images "
        "(such as annotations[2]; one of b.jpg)"
    ]
    assert reader[0].negatives == () and reader[0].not_exhaustive == ("dog",)


def test_lvis_is_federated(write):
    reader = write(lvis_content())
    assert [c.groups for c in reader.categories] == [
        ("rare", "novel"),
        ("common", "base"),
        ("frequent", "base"),
    ]
    assert reader.categories[0].name == "traffic light"
    assert reader[0].negatives == reader[1].negatives == ("dog",)
    assert reader[1].not_exhaustive == ("traffic light",)
    assert reader.version.startswith("lvis-")


def test_version_follows_the_annotations(write):
    version = write(content()).version
    assert version.startswith("coco-") and len(version) == len("coco-") + 12
    reordered = content()
    reordered["images"].reverse()
    assert write(reordered).version == version
    moved = content()
    moved["annotations"][0]["bbox"][0] += 1
    renamed = content()
    renamed["categories"][2]["name"] = "wolf"
    assert len({version, write(moved).version, write(renamed).version}) == 3


def test_a_missing_image_is_unreadable(write, tmp_path):
    reader = write(content())
    (tmp_path / "images/b.jpg").unlink()
    with pytest.raises(UnreadableImage, match=r"b\.jpg"):
        reader[0]
    assert reader[1].image_id == 7


def edit(path: str, value):
    """The content with one value changed; `path` like annotations.0.bbox; ... deletes."""
    made = content()
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = made
    for part in parents:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return made


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("{not json", r"instances\.json: is not valid JSON"),
        ("[]", r"instances\.json: expected a JSON object.*it is a list of 0 entries"),
        (edit("annotations", ...), "the field annotations is missing"),
        (edit("images", {}), "images: expected a list"),
        (edit("images", []), "no image has the id 30"),
        (edit("images.0.id", "x"), "no image has the id 30"),
        (edit("images.0.id", [30]), r"images\[0\]\.id: expected an id .*, got \[30\]"),
        (edit("images.0.id", None), r"images\[0\]\.id: expected an id"),
        (edit("images.0.id", True), r"images\[0\]\.id: expected an id"),
        (edit("images.0.id", 1.5), r"images\[0\]\.id: expected an id"),
        (edit("categories.0.id", {}), r"categories\[0\]\.id: expected an id"),
        (edit("annotations.0.image_id", []), r"annotations\[0\]\.image_id: expected an id"),
        (edit("annotations.0.category_id", []), r"annotations\[0\]\.category_id: expected an id"),
        (edit("annotations.0.iscrowd", 2), r"annotations\[0\]\.iscrowd: expected 0 or 1, got 2"),
        (edit("annotations.0.iscrowd", []), r"annotations\[0\]\.iscrowd: expected 0 or 1"),
        (edit("annotations.0.iscrowd", "maybe"), r"annotations\[0\]\.iscrowd: expected 0 or 1"),
        (edit("images.0.id", 7), "two have the same id"),
        (edit("images.0.file_name", ...), "image 30: has neither file_name nor coco_url"),
        (edit("annotations.0.category_id", 4), "no category has the id 4"),
        (edit("annotations.0.image_id", 4), r"no image has the id 4 \(1 of 3 annotations"),
        (edit("categories.1.name", "DOG"), "'DOG' and 'dog' are one text"),
        (edit("categories.1.name", "Traffic  light"), "'traffic_light' and 'Traffic  light'"),
        (edit("categories.1.name", "dog"), "two categories are called 'dog'"),
        (edit("categories.1.name", ""), "empty name"),
        (edit("categories.1.name", 5), r"categories\[1\]\.name: expected text"),
        (edit("categories.1.id", 3), r"categories\[1\]\.id: 3 is taken"),
        (edit("categories.1.frequency", "x"), r"categories\[1\]\.frequency: 'x' is not r, c or f"),
    ],
)
def test_malformed_files_are_named(write, made, message):
    with pytest.raises(DataError, match=message) as error:
        write(made)
    assert "instances.json" in str(error.value)


def test_missing_and_empty(write, tmp_path):
    with pytest.raises(DataError, match=r"none\.json.*`annotations`"):
        CocoReader(tmp_path / "none.json", tmp_path)
    with pytest.raises(DataError, match="pictures: no such folder.*`images`"):
        write(content(), images="pictures")
    with pytest.raises(DataError, match=r"none of the first 2 images.*such as b\.jpg"):
        write(content(), images=".")
    made = content() | {"images": [], "annotations": []}
    with pytest.raises(DataError, match="instances has no images"):
        write(made)


def test_unknown_ids_in_federated_fields(write):
    made = lvis_content()
    made["images"][0]["neg_category_ids"] = [5]
    with pytest.raises(DataError, match="image 30: no category has the id 5"):
        write(made)
    made["images"][0]["neg_category_ids"] = [[5]]
    with pytest.raises(DataError, match=r"image 30: neg_category_ids: \[5\] is no category id"):
        write(made)


@pytest.mark.parametrize("folder", ["", "val2017"])
def test_real_lvis_records(shared_data, tmp_path, folder):
    annotations = shared_data / "lvis/lvis_val_100.json"
    if not annotations.is_file():
        pytest.skip(f"needs {annotations.name}, which is absent")
    raw = json.loads(annotations.read_text())
    first = raw["images"][0]
    # The file has the names of COCO 2014, its addresses those of 2017, which are on disk.
    file = tmp_path / folder / first["coco_url"].rsplit("/", 1)[1]
    file.parent.mkdir(exist_ok=True)
    Image.new("RGB", (first["width"], first["height"])).save(file)

    reader = CocoReader(annotations, tmp_path)
    assert len(reader) == 100 and len(reader.categories) == 1230
    groups = [c.groups[0] for c in reader.categories]
    assert {g: groups.count(g) for g in set(groups)} == {
        "rare": 454,
        "common": 461,
        "frequent": 315,
    }
    one = reader[0]
    names = {c["id"]: plain_name(c["name"]) for c in raw["categories"]}
    assert one.negatives == tuple(names[i] for i in first["neg_category_ids"])
    boxed = [a for a in raw["annotations"] if a["image_id"] == first["id"]]
    assert one.names == tuple((names[a["category_id"]],) for a in boxed)
    x, y, w, h = boxed[0]["bbox"]
    np.testing.assert_allclose(one.boxes_xyxy[0], [x, y, x + w, y + h], rtol=1e-5)
    assert not {n for (n,) in one.names} & set(one.negatives)


def test_areas_are_those_of_the_annotations_that_are_kept(write):
    made = content()
    made["annotations"][0]["area"] = 20.5
    one = write(made)[0]
    np.testing.assert_array_equal(one.areas, np.array([20.5, 2500], np.float32))


@pytest.mark.parametrize(
    "name, plain",
    [
        ("cup_(drinking)", "cup drinking"),
        ("bow-tie", "bow-tie"),
        (
            "monitor_(computer_equipment) computer_monitor",
            "monitor computer equipment computer monitor",
        ),
        ("Band_Aid", "Band Aid"),
        ("a--b'c", "a-b c"),
        ("красный_круг", "красный круг"),
        ("हिन्दी_(भाषा)", "हिन्दी भाषा"),
        ("jalapen\u0303o", "jalape\u00f1o"),
        ("???", "???"),
    ],
)
def test_lvis_names_are_made_plain(name, plain):
    assert plain_name(name) == plain


def test_unused_first_category_of_roboflow_is_left_out(write):
    made = content()
    for category in made["categories"]:
        category["supercategory"] = "cat"
    made["categories"].insert(0, {"id": 0, "name": "cat", "supercategory": "none"})
    assert [c.id for c in write(made).categories] == [3, 90, 91]
    made["annotations"][0]["category_id"] = 0
    with pytest.raises(DataError, match="two categories are called 'cat'"):
        write(made)


def test_rare_categories_can_be_left_out(write, tmp_path):
    made = lvis_content()  # its first category is rare
    made["images"][1]["neg_category_ids"] = [3, 91]
    whole = write(made)
    reader = CocoReader(tmp_path / "instances.json", tmp_path / "images", without_rare=True)
    kept = {category.name for category in reader.categories}
    assert kept == {category.name for category in whole.categories} - {"traffic light"}
    assert "traffic light" in whole[1].negatives
    assert "traffic light" in whole[0].not_exhaustive
    assert [reader[i].image_id for i in range(2)] == [whole[i].image_id for i in range(2)]
    for record in (reader[0], reader[1]):
        named = {name for names in record.names for name in names}
        assert (named | set(record.negatives) | set(record.not_exhaustive)) <= kept
    assert reader[0].names == (("cat",),)
    write(content())
    with pytest.raises(DataError, match="frequency"):
        CocoReader(tmp_path / "instances.json", tmp_path / "images", without_rare=True)
