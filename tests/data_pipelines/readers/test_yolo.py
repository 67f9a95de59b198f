import os
import shutil

import numpy as np
import pytest
from PIL import Image

from data_pipelines.image_ops import UnreadableImage
from data_pipelines.readers.yolo import YoloReader
from owl_det.errors import DataError


@pytest.fixture
def root(tmp_path):
    for folder in ("images/val", "labels/val"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (200, 100)).save(tmp_path / "images/b.png")
    Image.new("RGB", (10, 10)).save(tmp_path / "images/val/a.JPG", "JPEG")
    (tmp_path / "labels/b.txt").write_text("1 0.5 0.5 0.2 0.4\n\n0 0.1 0.1 0.1 0.9 0.3 0.5\n")
    (tmp_path / "labels/classes.txt").write_text("not labels\n")
    return tmp_path


def open_(root, **options) -> YoloReader:
    return YoloReader(root, **({"labels": "labels", "images": "images"} | options))


def test_records(root):
    reader = open_(root, names=("cat", "dog"))
    assert len(reader) == 2 and reader.counts.num_dropped == 0
    one, empty = reader[0], reader[1]
    assert one.names == (("dog",), ("cat",)) and one.negatives == ()
    np.testing.assert_allclose(
        one.boxes_xyxy, [[80, 30, 120, 70], [20, 10, 60, 90]], rtol=1e-5, atol=1e-4
    )
    assert one.boxes_xyxy.dtype == np.float32
    assert (one.image_id, empty.image_id) == (1, 2)
    assert empty.boxes_xyxy.shape == (0, 4) and empty.negatives == ("cat", "dog")
    assert [(c.id, c.frequency) for c in reader.categories] == [(0, 1), (1, 1)]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("data.yaml", "nc: 2\nnames: [cat, dog]\n"),
        ("data.yaml", "names:\n  1: dog\n  0: cat\n"),
        ("classes.txt", "cat\ndog\n\n"),
    ],
)
def test_names_are_read(root, file, text):
    (root / file).write_text(text)
    assert [c.name for c in open_(root).categories] == ["cat", "dog"]


def test_more_than_ten_numbered_names(root):
    lines = "".join(f"  {i}: name{i}\n" for i in range(12))
    (root / "data.yaml").write_text(f"names:\n{lines}")
    assert open_(root).categories[11].name == "name11"


def test_boxes_are_clipped_and_degenerate_ones_counted(root):
    (root / "labels/b.txt").write_text("0 1 1 0.5 0.5\n1 0.5 0.5 0 0.1\n")
    reader = open_(root, names=("cat", "dog"))
    np.testing.assert_array_equal(reader[0].boxes_xyxy, [[150, 75, 200, 100]])
    assert reader.counts.num_dropped == 1
    assert reader[0].negatives == () and reader[0].not_exhaustive == ("dog",)


def test_version_follows_labels_and_names(root):
    version = open_(root, names=("cat", "dog")).version
    assert version.startswith("yolo-")
    renamed = open_(root, names=("cat", "cow")).version
    (root / "labels/b.txt").write_text("1 0.5 0.5 0.2 0.3\n")
    assert len({version, renamed, open_(root, names=("cat", "dog")).version}) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 0.5 0.5 0.2 0.2\n2 0.5 0.5 0.2 0.4", "line 2: the class '2' is not a number from 0"),
        ("cat 0.5 0.5 0.2 0.4", "line 1: the class 'cat'"),
        ("-1 0.5 0.5 0.2 0.4", "line 1: the class '-1'"),
        ("0 0.5 0.5 0.2", "line 1: expected 5 columns.*4 columns"),
        ("0 0.5 0.5 0.2 0.2 0.9", "line 1: expected.*6 columns"),
        ("0 0.5 0.5 0.2 x", "line 1: expected numbers"),
        ("0,0.5,0.5,0.2,0.2", "line 1: .*has a comma"),
        ("0 0,5 0,5 0,2 0,2", "line 1: .*has a comma"),
        ("0;0.5;0.5;0.2;0.2", "line 1: .*has a semicolon"),
        ("0 0.5 0.5 0.2 0.2 0.9 17", "line 1: expected 5 columns.*7 columns.*track"),
        ("0 0.5 0.5 0.2 0.2 " + "0.5 0.5 2 " * 3, "line 1: expected 5 columns.*kpt_shape"),
        ("0 320 240 100 50", "line 1: 320 240 100 50: .*relative to the image"),
        ("0 10 10 90 10 90 90 10 90", "line 1: 10 10 90 10: .*relative to the image"),
        (b"0 0.5 0.5 0.2\x00 0.4", "line 1: has a NUL"),
        (b"\xff\xfe\xff", "is not UTF-8"),
    ],
)
def test_malformed_lines_are_named(root, text, message):
    data = text if isinstance(text, bytes) else text.encode()
    (root / "labels/b.txt").write_bytes(data)
    with pytest.raises(DataError, match=message) as error:
        open_(root, names=("cat", "dog"))
    assert "b.txt" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a", "is not valid YAML"),
        ("nc: 2", "expected a list of class names, got None"),
        ("names: {0: a, 2: b}", "must run from 0"),
        ("names: [a, a]", "two categories are called 'a'"),
    ],
)
def test_malformed_names(root, text, message):
    (root / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        open_(root)


def test_missing_and_empty(root):
    (root / "labels/classes.txt").unlink()
    with pytest.raises(DataError, match="neither data.yaml nor classes.txt.*`names`"):
        open_(root)
    with pytest.raises(DataError, match="gone: no such folder.*`labels`"):
        open_(root, labels="gone", names=("a",))
    with pytest.raises(DataError, match="gone: no such folder.*`images`"):
        open_(root, images="gone", names=("a",))
    with pytest.raises(DataError, match="labels: holds no image"):
        open_(root, images="labels", names=("a",))
    with pytest.raises(DataError, match="holds no label file of any image.*`labels`"):
        open_(root, labels="labels/val", names=("a",))


def test_unreadable_image(root):
    (root / "images/b.png").write_bytes(b"broken")
    reader = open_(root, names=("cat", "dog"))
    with pytest.raises(UnreadableImage):
        reader[0]
    assert reader[1].image_id == 2


def box(number=0) -> str:
    return f"{number} 0.5 0.5 0.2 0.4"


def test_what_was_read_before_is_read_so_today(tmp_path):
    root = tmp_path
    for folder in ("images/cam", "labels/cam"):
        (root / folder).mkdir(parents=True)
    for i, name in enumerate(("b.png", "a.jpg", "cam/c.jpeg", "cam/B.JPG", "empty.bmp")):
        Image.new("RGB", (200 + i, 100)).save(root / "images" / name)
    (root / "labels/b.txt").write_text(f"{box(1)}\n\n0 0.1 0.1 0.1 0.9 0.3 0.5\n")
    (root / "labels/a.txt").write_text("2 0.25 0.75 0.5 0.5\r\n2 1 1 0.5 0.5\n0 0.5 0.5 0 0.1\n")
    (root / "labels/cam/c.txt").write_text("0 0.3 0.3 0.1 0.1\n" * 2)
    (root / "labels/cam/B.txt").write_text("")
    (root / "data.yaml").write_text("train: images\nval: images\nnames: [cat, Dog, red emu]\n")
    for reader in (open_(root), YoloReader(root), YoloReader(root / "data.yaml", split="val")):
        assert reader.version == "yolo-472f112b5b82"  # computed before readers knew layouts
        sources = [os.path.basename(reader[i].source) for i in range(5)]
        assert sources == ["a.jpg", "b.png", "B.JPG", "c.jpeg", "empty.bmp"]
        assert [reader[i].image_id for i in range(5)] == [1, 2, 3, 4, 5]
        assert reader.counts.num_boxes == 6 and reader.counts.dropped == {"without area": 1}


@pytest.mark.parametrize("name", ["on", "off", "no", "yes", "007", "1e3", "12:30:45", "null", "~"])
@pytest.mark.parametrize(
    "text",
    [
        "names: [{0}, dog]",
        "names:\n  - {0}\n  - dog\n",
        "names:\n  0: {0}\n  1: dog\n",
        "names: {{'0': {0}, \"1\": dog}}",
        "nc: 2\nnames: [\n  {0},\n  dog,\n]\n",
        "%YAML 1.1\n---\nnames: ['{0}', \"dog\"]",
    ],
)
def test_names_are_as_they_stand_in_the_file(root, text, name):
    (root / "data.yaml").write_text(text.format(name))
    assert [c.name for c in open_(root).categories] == [name, "dog"]


def test_underscores_of_names_are_spaces(root):
    (root / "data.yaml").write_text("names: [traffic_light, fire__hydrant]")
    assert [c.name for c in open_(root).categories] == ["traffic light", "fire hydrant"]
    assert open_(root).version == "yolo-06f637926077"  # as ever
    given = open_(root, names=("traffic_light", "dog"))
    assert given[0].names == (("dog",), ("traffic light",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nc: 3\nnames: [a, b]", r"nc: '3' classes, but names has 2"),
        ("names: [a, b]\nnames: [c, d]", "not valid YAML.*names stands twice"),
        ("names: {0: a, 1: b, 1: c}", "not valid YAML.*1 stands twice"),
        ("names: [a, [b, c]]", "names: 1: expected a name, got a list of 2"),
        ("names: a, b", "names: expected a list of class names, got 'a, b'"),
        ("names: [a, b]\nkpt_shape: 17", "kpt_shape: expected"),
        ("names: [a, A]", "'a' and 'A' are one text"),
        ("names: [a, '']", "empty name"),
        ("- a\n- b", "expected keys such as `names`"),
        ("[" * 3000, "not valid YAML"),
        ("a: &a [x, x]\n" + "b: &b [*a, *a]\nnames: [*b, *b]", "names: 0: expected a name"),
    ],
)
def test_faults_of_the_yaml_file_are_named(root, text, message):
    (root / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=message) as error:
        open_(root)
    assert "data.yaml: " in str(error.value) and len(str(error.value)) < 1000


def test_tags_of_yaml_run_nothing(root, tmp_path):
    command = f"touch {tmp_path}/run"
    text = f'names: !!python/object/apply:os.system ["{command}"]\nnc: 1\n'
    (root / "data.yaml").write_text(text)
    with pytest.raises(DataError):
        open_(root)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("place", "content"),
    [
        ("data.yml", "names: [cat, dog]"),
        ("dataset.yaml", "names: [cat, dog]"),
        ("coco8.yaml", "names: [cat, dog]"),
        ("obj.names", "cat\ndog\n"),
        ("_darknet.labels", "cat\ndog"),
        ("things.names", "cat\ndog"),
        ("labels/classes.txt", "cat\ndog"),
        ("../data.yaml", "names: [cat, dog]"),
    ],
)
def test_names_are_found_where_tools_write_them(root, tmp_path, place, content):
    (root / "labels/classes.txt").unlink()
    inner = root / "inner"
    inner.mkdir()
    for name in ("images", "labels"):
        shutil.move(root / name, inner / name)
    (inner / place).write_text(content)
    assert [c.name for c in open_(inner).categories] == ["cat", "dog"]


def test_a_place_in_classes_txt_is_a_class_number(root):
    (root / "classes.txt").write_text("cat\n\ndog\n")
    with pytest.raises(DataError, match=r"classes\.txt: line 2: is empty"):
        open_(root)
    (root / "classes.txt").write_text("cat,dog\n")
    with pytest.raises(DataError, match=r"classes\.txt: line 1: .*comma"):
        open_(root)


# --- lines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "tail"),
    [("[2, 2]", " 0.45 0.4 0.55 0.6"), ("[2, 3]", " 0.45 0.4 2 0 0 0"), ("[17, 3]", " 0" * 51)],
)
def test_a_pose_is_its_box(root, shape, tail):
    (root / "data.yaml").write_text(f"kpt_shape: {shape}\nnames: [cat, dog]")
    (root / "labels/b.txt").write_text(f"{box(1)}{tail}\n{box(0)}\n")
    one = open_(root)[0]
    assert one.names == (("dog",), ("cat",))
    np.testing.assert_allclose(one.boxes_xyxy, [[80, 30, 120, 70]] * 2, atol=1e-4)


@pytest.mark.parametrize("length", [2, 4, 6, 10])
def test_poses_without_their_shape_are_never_polygons(root, length):
    rng = np.random.default_rng(length)
    lines = []
    for _ in range(12):
        width, height = rng.uniform(0.1, 0.5, 2)
        cx, cy = rng.uniform(width / 2, 1 - width / 2), rng.uniform(height / 2, 1 - height / 2)
        points = rng.uniform(-0.5, 0.5, (length // 2, 2)) * (width, height) + (cx, cy)
        numbers = [cx, cy, width, height, *points.ravel()]
        lines.append("0 " + " ".join(f"{number:.6f}" for number in numbers))
    (root / "labels/b.txt").write_text("\n".join(lines))
    with pytest.raises(DataError, match=rf"b\.txt: line 1: .*kpt_shape: \[{length // 2}, 2\]"):
        open_(root, names=("cat",))
    (root / "data.yaml").write_text("names: [cat]\nkpt_shape: [0, 2]")
    assert open_(root).counts.num_boxes == 12


def test_poses_with_points_that_are_seen_are_no_pixels(root):
    lines = [f"{box()} " + "0.45 0.4 2 0.55 0.6 2 " * 2, f"{box()} " + "0.5 0.5 1 0 0 0 " * 2]
    (root / "labels/b.txt").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"line 1: looks like a pose.*kpt_shape: \[4, 3\]"):
        open_(root, names=("cat",))


def test_a_triangle_at_the_edge_is_no_track(root):
    triangle = "0 0.5 0.5 0.9 1.000000 0.2 1"
    (root / "labels/b.txt").write_text(f"{triangle}\n0 0.5 0.5 0.9 0.8 0.2 0.7\n")
    reader = open_(root, names=("cat",))
    np.testing.assert_allclose(
        reader[0].boxes_xyxy, [[40, 50, 180, 100], [40, 50, 180, 80]], atol=1e-3
    )
    (root / "labels/b.txt").write_text("0 0.5 0.5 0.2 0.2 0.93 1\n0 0.5 0.6 0.2 0.2 0.8 1\n")
    with pytest.raises(DataError, match="expected 5 columns, got 7 columns.*track"):
        open_(root, names=("cat",))


@pytest.mark.parametrize("first_corner", range(4))
def test_quadrilaterals_are_never_taken_for_poses(root, first_corner):
    rng = np.random.default_rng(first_corner)
    lines, extents = [], []
    for _ in range(40):
        x, y = rng.uniform(0.05, 0.6, 2)
        w, h = rng.uniform(0.03, 0.3, 2)
        corners = [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]
        corners = corners[first_corner:] + corners[:first_corner]
        lines.append("1 " + " ".join(f"{c:.6f}" for corner in corners for c in corner))
        extents.append([200 * x, 100 * y, 200 * (x + w), 100 * (y + h)])
    (root / "labels/b.txt").write_text("\n".join(lines))
    np.testing.assert_allclose(open_(root, names=("cat", "dog"))[0].boxes_xyxy, extents, atol=1e-3)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("0 nan nan nan nan", "not finite"),
        ("0 0.5 0.5 inf 0.1", "not finite"),
        ("0 0.5 0.5 0 0.1", "without area"),
        ("0 0.5 0.5 -0.2 0.1", "of negative width or height"),
        ("0 0.5 0.5 0.2", "with a wrong number of columns"),
        ("0 0.5 0.5 0.2 0.2 0.9", "with a wrong number of columns"),
        ("0 320 240 64 48", "with coordinates far outside 0 to 1"),
        ("0 0.5 0.5 1.5 0.5", "with coordinates far outside 0 to 1"),
        ("cat 0.5 0.5 0.1 0.1", "without a class number"),
        ("-1 0.5 0.5 0.1 0.1", "without a class number"),
        ("0 x 0.5 0.1 0.1", "that are not numbers"),
        ("0 1_0 0.5 0.1 0.1", "that are not numbers"),
        ("<<<<<<< HEAD", "that are not numbers"),
    ],
)
def test_one_bad_line_is_dropped_counted_and_named(root, caplog, bad, reason):
    (root / "labels/b.txt").write_text(f"{box(1)}\n{bad}\n{box(1)}\n")
    (root / "labels/val/a.txt").write_text(f"{box(1)}\n")
    with caplog.at_level("WARNING"):
        reader = open_(root, names=("cat", "dog"))
    assert reader.counts.num_boxes == 3 and reader.counts.num_read == 4
    assert reader.counts.dropped == {reason: 1}
    assert f"1 of 4 boxes dropped: 1 {reason}" in caplog.text
    if reason.split()[0] in ("with", "that"):
        assert "b.txt: line 2" in caplog.text
    if bad.startswith("0 "):
        assert reader[0].not_exhaustive == ("cat",) and reader[0].negatives == ()


def test_a_class_that_has_no_name_is_an_error_but_for_one_line_in_a_thousand(root, caplog):
    (root / "labels/b.txt").write_text(f"{box(0)}\n" * 1999 + f"{box(7)}\n")
    reader = open_(root, names=("cat", "dog"))
    assert reader.counts.dropped == {"of classes without a name": 1}
    assert "line 2000: the class '7'" in caplog.text
    (root / "labels/b.txt").write_text(f"{box(0)}\n" * 40 + f"{box(7)}\n")
    with pytest.raises(DataError, match="line 41: the class '7' is not a number from 0 to 1"):
        open_(root, names=("cat", "dog"))


def test_one_file_in_pixels_is_dropped_and_a_whole_set_refused(root):
    (root / "labels/b.txt").write_text(f"{box()}\n" * 30)
    (root / "labels/val/a.txt").write_text("0 5 5 2 2\n0 3 3 2 2\n")
    reader = open_(root, names=("cat",))
    assert reader.counts.dropped == {"with coordinates far outside 0 to 1": 2}
    assert len(reader[1].names) == 0 and reader[1].negatives == ()
    (root / "labels/b.txt").write_text("0 50 50 20 40\n" * 30)
    with pytest.raises(DataError, match=r"b\.txt: line 1: 50 50 20 40: .*32 of 32 lines"):
        open_(root, names=("cat",))


@pytest.mark.parametrize(
    "text", ["1.0 0.5 0.5 0.2 0.4", "+1\t0.5  0.5\t0.2 0.4", "\ufeff1 .5 .5 .2 4e-1"]
)
def test_spellings_of_a_line(root, text):
    (root / "labels/b.txt").write_text(text + "\r\n \t\r\n")
    one = open_(root, names=("cat", "dog"))[0]
    assert one.names == (("dog",),)
    np.testing.assert_allclose(one.boxes_xyxy, [[80, 30, 120, 70]], atol=1e-4)


def test_label_files_of_another_unicode_encoding(root):
    (root / "labels/b.txt").write_text(box(1), encoding="utf-16")
    assert open_(root, names=("cat", "dog"))[0].names == (("dog",),)


def test_little_overshoot_is_clipped(root):
    (root / "labels/b.txt").write_text("0 0.98 0.5 0.1 1.04\n0 -0.02 0.5 0.3 0.5 0.3 1.03\n")
    reader = open_(root, names=("cat", "dog"))
    np.testing.assert_allclose(
        reader[0].boxes_xyxy, [[186, 0, 200, 100], [0, 50, 60, 100]], atol=1e-3
    )


def test_lines_that_stand_twice_are_told(root, caplog):
    (root / "labels/b.txt").write_text(f"{box()}\n{box()}\n{box(1)}\n")
    reader = open_(root, names=("cat", "dog"))
    assert reader.counts.num_boxes == 3
    assert "1 of 3 boxes stand twice in their files" in caplog.text


def test_what_has_no_counterpart_is_told(root, caplog):
    (root / "labels/gone.txt").write_text(box())
    (root / "labels/lost.TXT").write_text("")
    (root / "labels/._b.txt").write_bytes(b"\0\1")
    (root / "labels/notes.json").write_text("{}")
    (root / "labels/README.txt").write_text("exported by hand\n")
    open_(root, names=("cat", "dog"))
    assert "1 of 2 images have no label file" in caplog.text and "val/a.JPG" in caplog.text
    assert "2 label files have no image, such as" in caplog.text and "gone.txt" in caplog.text


def test_labels_without_images_are_told_in_any_subfolder_and_encoding(root, caplog):
    (root / "labels/other/deep").mkdir(parents=True)
    (root / "labels/other/deep/gone.txt").write_text(box())
    (root / "labels/broken.txt").write_bytes(box().encode() + b"\xe6\n")
    (root / "labels/faulty.txt").write_text("0 0.5 0.5 x 0.2\n" + box())
    open_(root, names=("cat", "dog"))
    assert "3 label files have no image, such as" in caplog.text


def test_an_image_that_cannot_be_read_is_named(root):
    (root / "images/b.png").write_text("not an image")
    with pytest.raises(UnreadableImage, match=r"b\.png: not an image of a known format"):
        open_(root, names=("cat", "dog"))[0]


def test_hidden_images_are_left_out(root):
    (root / "images/._b.png").write_bytes(b"half of a file")
    (root / "images/.trash").mkdir()
    Image.new("RGB", (9, 9)).save(root / "images/.trash/c.png")
    assert len(open_(root, names=("cat", "dog"))) == 2


@pytest.mark.parametrize(("image", "label"), [("A.PNG", "a.txt"), ("ca\u0301.png", "c\u00e1.TXT")])
def test_labels_are_found_under_names_written_otherwise(root, image, label):
    (root / "images/b.png").rename(root / "images" / image)
    (root / "labels/b.txt").rename(root / "labels" / label)
    reader = open_(root, names=("cat", "dog"))
    assert reader.counts.num_boxes == 2


# --- layouts --------------------------------------------------------------------------------------


def split_root(tmp_path, layout, yaml=None):
    """Images with as many boxes as their split has: train 3, val 2, test 1."""
    for number, split in ((3, "train"), (2, "val"), (1, "test")):
        for place, suffix in (("images", "png"), ("labels", "txt")):
            folder = tmp_path / layout.format(split=split, place=place)
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{split}1.{suffix}"
            if place == "images":
                Image.new("RGB", (100, 100)).save(file)
            else:
                file.write_text(f"{box()}\n" * number)
    text = "names: [cat]\n" if yaml is None else yaml
    (tmp_path / "data.yaml").write_text(text)
    return tmp_path


NUMBERS = {"train": 3, "val": 2, "test": 1}


def read_split(root, split="") -> tuple[str, int]:
    reader = YoloReader(root, split=split)
    assert len(reader) == 1
    return os.path.basename(reader[0].source), reader.counts.num_boxes


@pytest.mark.parametrize(
    ("layout", "yaml"),
    [
        ("{place}/{split}", None),
        (
            "{place}/{split}",
            "train: images/train\nval: images/val\ntest: images/test\nnames: [cat]",
        ),
        ("{place}/{split}", "path: .\ntrain: images/train\nval: [images/val]\nnames: [cat]"),
        ("{place}/{split}", "path: /content/x\ntrain: /content/x/images/train\nnames: [cat]"),
        ("{split}/{place}", None),
        ("{split}/{place}", "train: ../train/images\nval: ../val/images\nnames: [cat]"),
        ("{split}", None),
        ("{place}/{split}2017", None),
        (
            "set/{place}/{split}_a",
            "path: set\ntrain: images\\train_a\nval: images/val_a\n"
            "test: images/test_a\nnames: [cat]",
        ),
    ],
)
def test_splits_are_read_one_by_one_and_never_together(tmp_path, layout, yaml):
    root = split_root(tmp_path, layout, yaml)
    for split, number in NUMBERS.items():
        assert read_split(root, split) == (f"{split}1.png", number)
        assert read_split(root / "data.yaml", split) == (f"{split}1.png", number)
    with pytest.raises(DataError, match=r"several splits: .*train \(1 images\).*`split`") as error:
        YoloReader(root)
    assert "val" in str(error.value) and "test" in str(error.value)


def test_a_split_reads_like_its_own_folders(tmp_path):
    root = split_root(tmp_path, "{place}/{split}")
    explicit = YoloReader(root, images="images/val", labels="labels/val")
    assert YoloReader(root, split="val").version == explicit.version


def test_a_folder_of_splits_that_a_key_names_is_no_set(tmp_path):
    root = split_root(tmp_path, "{place}/{split}")
    for old, new in (("images", "pictures"), ("labels", "txt")):
        (root / old).rename(root / new)
    with pytest.raises(DataError, match="pictures: holds several splits"):
        YoloReader(root, images="pictures", labels="txt")
    reader = YoloReader(root, images="pictures", labels="txt", split="test")
    assert os.path.basename(reader[0].source) == "test1.png"


def test_a_root_with_one_split_needs_no_name(tmp_path):
    root = split_root(
        tmp_path, "{place}/{split}", "train: images/train\nval: images/train\nnames: [cat]"
    )
    for split in ("val", "test"):
        shutil.rmtree(root / "images" / split)
    assert read_split(root) == ("train1.png", 3)
    assert read_split(root, "val") == ("train1.png", 3)
    with pytest.raises(DataError, match="has no split test; it has train, val"):
        YoloReader(root, split="test")


def test_a_split_whose_folder_is_gone(tmp_path):
    root = split_root(tmp_path, "{place}/{split}", "val: elsewhere/pictures\nnames: [cat]")
    assert read_split(root, "val") == ("val1.png", 2)
    shutil.rmtree(root / "images/val")
    with pytest.raises(DataError, match=r"data\.yaml: elsewhere/pictures: no such folder"):
        YoloReader(root, split="val")


def test_lists_of_images(tmp_path):
    root = split_root(tmp_path, "all/{place}", "train: train.txt\nval: lists/val.txt\nnames: [cat]")
    (root / "lists").mkdir()
    (root / "train.txt").write_text("\ufeff./all/images/train1.png\r\n\r\n")
    (root / "lists/val.txt").write_text("/old/place/all/images/val1.png\n")
    assert read_split(root, "train") == ("train1.png", 3)
    assert read_split(root, "val") == ("val1.png", 2)
    with pytest.raises(DataError, match="several splits"):
        YoloReader(root)
    (root / "lists/val.txt").write_text("all/images/val1.png\nall/images/gone.png\n")
    with pytest.raises(
        DataError, match=r"val\.txt: line 2: there is no image all/images/gone\.png"
    ):
        YoloReader(root, split="val")


def test_cvat_darknet_export(tmp_path):
    folder = tmp_path / "obj_train_data"
    folder.mkdir()
    for stem in ("a", "b"):
        Image.new("RGB", (20, 20)).save(folder / f"{stem}.png")
        (folder / f"{stem}.txt").write_text(box(1))
    (tmp_path / "obj.names").write_text("cat\nred_dog\n")
    (tmp_path / "obj.data").write_text(
        "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n"
    )
    (tmp_path / "train.txt").write_text("data/obj_train_data/b.png\n")
    reader = YoloReader(tmp_path, split="train")
    assert [c.name for c in reader.categories] == ["cat", "red dog"]
    assert len(reader) == 1 and reader[0].source.endswith("b.png")
    (tmp_path / "train.txt").unlink()
    assert len(YoloReader(tmp_path)) == 2
    both = YoloReader(tmp_path, images="obj_train_data", labels="obj_train_data")
    assert both.counts.num_boxes == 2


def test_labels_beside_images(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(box(1))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert YoloReader(tmp_path)[0].names == (("dog",),)
    for name in ("a.png", "a.txt"):
        (tmp_path / "images").mkdir(exist_ok=True)
        shutil.move(tmp_path / name, tmp_path / "images" / name)
    assert YoloReader(tmp_path)[0].names == (("dog",),)


def test_two_folders_of_one_split_are_two_sets(tmp_path):
    root = split_root(tmp_path, "{place}/{split}")
    for place in ("images", "labels"):
        (root / place / "val").rename(root / place / "train2014")
        (root / place / "test").rename(root / place / "train2017")
    assert read_split(root, "train") == ("train1.png", 3)
    for place in ("images", "labels"):
        shutil.rmtree(root / place / "train")
    with pytest.raises(DataError, match="has no split train; it has train2014, train2017"):
        YoloReader(root, split="train")


def test_a_split_without_images_is_said_to_have_none(tmp_path):
    yaml = "train: ../train/images\nval: ../val/images\ntest: ../test/images\nnames: [cat]"
    root = split_root(tmp_path, "{split}/{place}", yaml)
    (root / "test/images/test1.png").unlink()
    with pytest.raises(DataError, match=r"data\.yaml: test: \.\./test/images: holds no image"):
        YoloReader(root, split="test")


def test_the_folder_of_a_split_is_that_split(tmp_path):
    yaml = "train: ../train/images\nval: ../val/images\nnames: [cat]"
    root = split_root(tmp_path, "{split}/{place}", yaml)
    assert read_split(root / "val") == ("val1.png", 2)
    assert read_split(root / "val", "train") == ("train1.png", 3)  # as data.yaml says


def test_links_to_folders_are_told(tmp_path, caplog):
    root = split_root(tmp_path / "a", "{place}")
    elsewhere = tmp_path / "b"
    (root / "images").rename(elsewhere)
    (root / "images").mkdir()
    (root / "images/linked").symlink_to(elsewhere)
    with pytest.raises(DataError, match="holds no image; 1 link to a folder is not followed"):
        YoloReader(root)
    shutil.copy(elsewhere / "val1.png", root / "images")
    assert len(YoloReader(root)) == 1
    assert "1 link to a folder is not followed, such as linked" in caplog.text


def test_a_list_of_images_is_no_data_set(tmp_path):
    (tmp_path / "train.txt").write_text("images/a.png\nimages/b.png\n")
    with pytest.raises(DataError, match=r"train\.txt: is a list of images; name the folder or"):
        YoloReader(tmp_path / "train.txt")
