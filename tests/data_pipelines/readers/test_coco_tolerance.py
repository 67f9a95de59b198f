"""COCO files as other tools write them: what is read, what is dropped, and what is said of it."""

import contextlib
import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.image_ops import UnreadableImage
from data_pipelines.readers.coco import CocoReader
from data_pipelines.readers.coco_panoptic import CocoPanopticReader
from owl_det.errors import DataError
from tests.data_pipelines.readers.small_coco import (
    LISTS,
    content,
    lvis_content,
    messages,
)

# --- what was saved still resumes ----------------------------------------------------------------


def test_versions_of_good_files_stay(images: Path, tmp_path: Path) -> None:
    """Computed before sizes were held against images and names made plain."""
    made = content()
    made["categories"][0]["name"] = "traffic_light"
    made["annotations"] = [
        {"id": 1, "image_id": 30, "category_id": 90, "bbox": [10.1, 20.2, 5.3, 10.5]},
        {"id": 2, "image_id": 30, "category_id": 3, "bbox": [50, 30, 10.9, 10.7], "iscrowd": 1},
        {"id": 3, "image_id": 30, "category_id": 90, "bbox": [1, 1, 0, 5]},
        {"id": 4, "image_id": 7, "category_id": 91, "bbox": [-0.6, -0.4, 30.25, 41.2]},
        {"id": 5, "image_id": 7, "category_id": 3, "bbox": [60, 3, 4, 4]},
    ]
    file = tmp_path / "val.json"

    def version(made: Any) -> str:
        file.write_text(json.dumps(made))
        return CocoReader(file, images).version

    assert version(made) == "coco-accdabd91e74"
    for category, letter in zip(made["categories"], "rcf", strict=True):
        category["frequency"] = letter
    for image in made["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{image.pop('file_name')}"
        image |= {"neg_category_ids": [91] if image["id"] != 7 else []}
        image["not_exhaustive_category_ids"] = [3]
    assert version(made) == "lvis-b51e39ba5b5c"


def test_version_of_a_good_panoptic_file_stays(images: Path, tmp_path: Path) -> None:
    boxes = [
        (3, [-0.5, 1, 30.2, 20], 0),
        (90, [50, 30, 10.75, 10.5], 1),
        (90, [5, 5, 0, 4], 0),
        (91, [0, 0, 60, 40], 0),
    ]
    names = ((3, "cat", 1), (90, "dog", 1), (91, "wall-other-merged", 0))
    made = {
        "images": content()["images"],
        "categories": [{"id": i, "name": name, "isthing": thing} for i, name, thing in names],
        "annotations": [
            {
                "image_id": image,
                "file_name": f"{image}.png",
                "segments_info": [
                    {"id": i, "category_id": category, "bbox": box, "iscrowd": crowd}
                    for i, (category, box, crowd) in enumerate(boxes, start=1)
                ],
            }
            for image in (30, 7, 8)
        ],
    }
    file = tmp_path / "panoptic.json"
    file.write_text(json.dumps(made))
    reader = CocoPanopticReader(file, images, images)
    assert reader.version == "coco_panoptic-10311080a310"


def test_a_good_file_is_read_without_a_word(read: Any, caplog: pytest.LogCaptureFixture) -> None:
    reader = read(content())
    assert messages(caplog) == ""
    counts = reader.counts
    assert counts.boxes == {"star": 2, "cat": 1, "dog": 1} and counts.dropped == {}
    assert (counts.num_images, counts.num_empty, counts.num_read) == (3, 1, 4)
    assert counts.num_negatives == 3 * 3 - 4 and not counts.is_federated
    # Clipped to the image.
    np.testing.assert_allclose(reader[1].boxes_xyxy[0], [0, 0, 29.65, 40], rtol=1e-6)


# --- boxes ---------------------------------------------------------------------------------------

DELETE = object()


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        (DELETE, "without a bbox"),
        (None, "without a bbox"),
        ([], "without a bbox"),
        ([1, 2, 3], "whose bbox is not four numbers"),
        ([1, 2, 3, 4, 5], "whose bbox is not four numbers"),
        ("1 2 3 4", "whose bbox is not four numbers"),
        ([1, 2, 3, "wide"], "whose bbox is not four numbers"),
        ([1, 2, 3, None], "whose bbox is not four numbers"),
        ([1, 2, 3, True], "whose bbox is not four numbers"),
        ([1, 2, [3], {}], "whose bbox is not four numbers"),
        ({"x": 1}, "whose bbox is not four numbers"),
        (7, "whose bbox is not four numbers"),
        ([float("nan"), 2, 3, 4], "not finite"),
        ([1, 2, float("inf"), 4], "not finite"),
        ([10**400, 2, 3, 4], "not finite"),
        ([1, 2, -3, 4], "of negative width or height"),
        ([1, 2, 0, 4], "without area"),
        ([1e300, 2, 3, 4], "without area"),
        ([100, 2, 3, 4], "outside their images"),
    ],
)
@pytest.mark.parametrize("area", [7.5, DELETE])
def test_a_box_that_is_none_is_dropped_and_counted(
    read: Any, caplog: pytest.LogCaptureFixture, box: Any, reason: str, area: Any
) -> None:
    made = content()
    made["annotations"][0] |= {"bbox": box, "area": area}
    made["annotations"][0] = {k: v for k, v in made["annotations"][0].items() if v is not DELETE}
    reader = read(made)
    said = messages(caplog)
    assert f"val: 1 of 4 boxes dropped: 1 {reason}" in said and "annotations[0]" in said
    assert reader.counts.dropped == {reason: 1} and reader.counts.num_boxes == 3
    assert reader[0].names == (("star",),) and reader[0].not_exhaustive == ("cat",)
    assert "cat" not in reader[0].negatives


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"category_id": None}, "without a category"),
        ({"category_id": DELETE}, "without a category"),
        ({"image_id": None}, "without an image"),
        ({"image_id": DELETE}, "without an image"),
        (None, "that are no objects"),
    ],
)
def test_an_annotation_that_belongs_nowhere_is_dropped_and_counted(
    read: Any, caplog: pytest.LogCaptureFixture, change: Any, reason: str
) -> None:
    made = content()
    entry = None if change is None else made["annotations"][0] | change
    made["annotations"][0] = entry and {k: v for k, v in entry.items() if v is not DELETE}
    reader = read(made)
    said = messages(caplog)
    assert f"val: 1 of 4 boxes dropped: 1 {reason}" in said and "annotations[0]" in said
    assert reader.counts.dropped == {reason: 1} and reader.counts.num_boxes == 3
    made["annotations"] = made["annotations"][:1]
    with pytest.raises(DataError, match=rf"annotations\[0\]: 1 of 1 annotations .* {reason}"):
        read(made)


def test_quoted_numbers_are_numbers(read: Any) -> None:
    good, made = read(content()), content()
    for entry in made["annotations"]:
        entry |= {"bbox": [f" {x}" for x in entry["bbox"]], "area": "7.5"}
    reader = read(made)
    assert reader.version == good.version and reader.counts == good.counts
    np.testing.assert_array_equal(reader[0].areas, good[0].areas)


def test_a_box_of_any_size_overflows_nothing(read: Any) -> None:
    made = content()
    made["annotations"][0] |= {"bbox": [-1e308, -1e308, 1.7e308, 1.7e308], "area": 1e308}
    made["annotations"][1] |= {"bbox": [-(10**30), 1, 10**31, 20]}
    made["annotations"][2] |= {"bbox": [0, 0, 1e200, 1e200]}
    del made["annotations"][2]["area"]
    reader = read(made)
    np.testing.assert_array_equal(reader[0].boxes_xyxy, [[0, 0, 60, 40], [0, 1, 60, 21]])
    assert np.isfinite(reader[0].areas).all() and np.isfinite(reader[1].areas).all()


def test_without_a_bbox_the_extent_of_the_polygons_is_taken(
    read: Any, caplog: pytest.LogCaptureFixture
) -> None:
    made = content()
    made["annotations"][0] |= {
        "bbox": [],
        "segmentation": [[1, 2, 9, 2, 5, 8], [3, 3, 20, 3, 4, 4]],
    }
    reader = read(made)
    np.testing.assert_array_equal(reader[0].boxes_xyxy[0], [1, 2, 20, 8])
    assert "1 of 4 boxes have no bbox: their polygons' extent is taken" in messages(caplog)


@pytest.mark.parametrize("area", ["large", -1, float("nan"), float("inf"), [], True, "nan"])
def test_a_bad_area_costs_nothing_but_a_word(
    read: Any, caplog: pytest.LogCaptureFixture, area: Any
) -> None:
    made = content()
    made["annotations"][0] |= {"area": area, "bbox": [1, 2, 3, 4]}
    one = read(made)[0]
    np.testing.assert_array_equal(one.areas, [12, 7.5])
    assert "1 of 4 boxes have no usable `area`" in messages(caplog)


def _normalised(box: list[float]) -> list[float]:
    return [x / 100 for x in box]


def _corners(box: list[float]) -> list[float]:
    x, y, width, height = box
    return [x + 20, y + 20, x + width + 20, y + height + 20]


@pytest.mark.parametrize(
    ("change", "said"),
    [(_normalised, "are below a pixel"), (_corners, "reach beyond their images")],
)
def test_boxes_in_another_unit_are_questioned(
    read: Any, caplog: pytest.LogCaptureFixture, change: Any, said: str
) -> None:
    made = content()
    for entry in made["annotations"]:
        entry["bbox"] = change([10, 10, 20, 20])
    read(made)
    assert f"4 of 4 boxes {said}" in messages(caplog)


# --- fields in other spellings -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "is_crowd"),
    [
        ("0", False),
        ("1", True),
        ("false", False),
        ("True", True),
        (True, True),
        (False, False),
        (0.0, False),
        (1.0, True),
        (None, False),
        ("", False),
    ],
)
def test_iscrowd_in_any_spelling(read: Any, value: Any, is_crowd: bool) -> None:
    made = content()
    made["annotations"][0]["iscrowd"] = value
    reader = read(made)
    assert reader[0].is_crowd.tolist() == [is_crowd, False]
    assert reader.counts.num_crowd == is_crowd and reader.counts.num_read == 4


@pytest.mark.parametrize(
    "renumber",
    [
        lambda i: i + 2**40,
        lambda i: -i,
        lambda i: f"{i:012}",
        lambda i: f"uuid-{i}",
        lambda i: i * 10**20,
        str,
    ],
    ids=["large", "negative", "zeros", "texts", "huge", "quoted"],
)
def test_ids_of_any_kind(read: Any, renumber: Any) -> None:
    made = content()
    for image in made["images"]:
        image["id"] = renumber(image["id"])
    for entry in made["annotations"]:
        entry["image_id"] = renumber(entry["image_id"])
    good, reader = read(content()), read(made)
    records = [reader[i] for i in range(3)]
    assert [r.names for r in records] == [good[i].names for i in range(3)]
    ids = [record.image_id for record in records]
    assert len(set(ids)) == 3 and all(0 <= i < 2**31 for i in ids)
    given = [r.image_id if r.given_id is None else r.given_id for r in records]
    assert given == [renumber(i) for i in (30, 7, 8)]


def test_fractional_and_quoted_ids_are_the_numbers(read: Any) -> None:
    made = content()
    for entry in made["annotations"]:
        entry |= {"image_id": float(entry["image_id"]), "category_id": str(entry["category_id"])}
    good, reader = read(content()), read(made)
    assert reader.version == good.version
    assert [c.given_id for c in reader.categories] == [None] * 3


def test_large_and_text_ids_of_categories(read: Any) -> None:
    made = content()
    new = {3: "star-id", 90: 2**50, 91: 1}
    for entry in made["categories"]:
        entry["id"] = new[entry["id"]]
    for entry in made["annotations"]:
        entry["category_id"] = new[entry["category_id"]]
    categories = read(made).categories
    assert [c.given_id if c.given_id is not None else c.id for c in categories] == [*new.values()]
    assert len({c.id for c in categories}) == 3 and all(abs(c.id) < 2**31 for c in categories)


def test_fields_that_nobody_reads_may_hold_anything(read: Any) -> None:
    made = content()
    made["categories"][0] |= {"supercategory": ["none"], "keypoints": {}}
    made["images"][0] |= {"license": [], "coco_url": None}
    made["annotations"][0] |= {"id": ["x"], "segmentation": "none", "keypoints": {}}
    assert read(made).version == read(content()).version


# --- entries that are there twice ----------------------------------------------------------------


def test_what_is_there_twice_counts_once(read: Any, caplog: pytest.LogCaptureFixture) -> None:
    made = content()
    made["images"].append(dict(made["images"][0]))
    made["annotations"].append(dict(made["annotations"][0]))
    reader = read(made)
    assert len(reader) == 3 and reader[0].names == (("cat",), ("star",))
    assert reader.counts.dropped == {"that repeat an annotation, id and all": 1}
    assert "1 entries of images are there twice" in messages(caplog)


def test_annotations_that_only_share_an_id_are_all_read(
    read: Any, caplog: pytest.LogCaptureFixture
) -> None:
    made = content()
    for entry in made["annotations"]:
        entry["id"] = 0
    assert read(made).counts.num_boxes == 4
    assert "3 of 4 boxes share the id of another annotation" in messages(caplog)


def test_boxes_that_repeat_others_under_their_own_ids_are_told(
    read: Any, caplog: pytest.LogCaptureFixture
) -> None:
    made = content()
    made["annotations"] += [entry | {"id": 100 + entry["id"]} for entry in made["annotations"]]
    assert read(made).counts.num_boxes == 8
    assert "4 of 8 boxes stand twice in their files" in messages(caplog)


def test_two_images_of_one_file_are_named(read: Any, caplog: pytest.LogCaptureFixture) -> None:
    made = content()
    made["images"][1]["file_name"] = "b.jpg"
    read(made)
    assert "1 files belong to several images, such as b.jpg to the images 30, 7" in messages(caplog)


# --- LVIS ----------------------------------------------------------------------------------------


def without(made: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    for entry in (*made["images"], *made["categories"]):
        for key in keys:
            entry.pop(key, None)
    return made


@pytest.mark.parametrize(
    "keys",
    [
        ("neg_category_ids",),
        LISTS,
        (*LISTS, "synset"),
        (*LISTS, "frequency"),
        ("neg_category_ids", "frequency", "synset"),
        ("not_exhaustive_category_ids",),
    ],
)
def test_an_lvis_file_without_its_lists_is_not_exhaustive(read: Any, keys: Any) -> None:
    with pytest.raises(DataError, match=r"image 30: the field \w+ is missing \(in 3 of 3 images\)"):
        read(without(lvis_content(), keys))


def test_an_lvis_file_shows_by_what_its_categories_mean(read: Any) -> None:
    made = without(lvis_content(), (*LISTS, "frequency", "synset"))
    for category in made["categories"]:
        category |= {"def": "a thing", "synonyms": [category["name"]]}
    with pytest.raises(DataError, match="the file is one of LVIS .*`def`"):
        read(made)


def test_one_missing_list_is_named(read: Any) -> None:
    made = lvis_content()
    del made["images"][1]["neg_category_ids"]
    with pytest.raises(DataError, match=r"image 7: the field neg_category_ids is .*in 1 of 3"):
        read(made)


def test_lvis_counts_its_negatives(read: Any) -> None:
    counts = read(lvis_content()).counts
    assert counts.is_federated and counts.num_negatives == 1


# --- anything at all -----------------------------------------------------------------------------

JUNK = [None, True, -1, 0, 2, 1e300, 2**70, 1.5, float("nan"), "", "7", "x", [], [1], {}, {"id": 1}]


def _mutate(rng: np.random.Generator, node: Any) -> None:
    """Changes, removes or repeats one entry somewhere."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = keys[rng.integers(len(keys))]
        child = node[key]
        if isinstance(child, (dict, list)) and child and rng.random() < 0.85:
            node = child
            continue
        action = rng.random()
        if action < 0.2:
            del node[key]
        elif action < 0.3 and isinstance(node, list):
            node.append(copy.deepcopy(child))
        else:
            node[key] = copy.deepcopy(JUNK[rng.integers(len(JUNK))])
        return


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make", [content, lvis_content])
def test_no_change_of_a_file_gives_a_traceback_or_a_silent_loss(read: Any, make: Any) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(300):
        rng = np.random.default_rng(seed)
        made = make()
        for _ in range(rng.integers(1, 3)):
            _mutate(rng, made)
        try:
            reader = read(made)
        except DataError as error:
            outcomes["refused"] += 1
            assert len(str(error)) < 900
            continue
        outcomes["read"] += 1
        for i in range(len(reader)):
            with contextlib.suppress(UnreadableImage):
                reader[i]
        assert reader.counts.num_read == len(made["annotations"])
        assert json.dumps(reader.counts.lines("val"))
    assert outcomes["read"] > 50 and outcomes["refused"] > 50
