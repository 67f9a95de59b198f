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
        ("0 0.5 0.5 0.2", "line 1: expected `class cx cy width height`.*4 columns"),
        ("0 0.5 0.5 0.2 0.2 0.9", "line 1: expected.*6 columns"),
        ("0 0.5 0.5 0.2 x", "line 1: expected numbers"),
        ("0 0.5 0.5 0.2 inf", "line 1: a coordinate is not finite"),
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
