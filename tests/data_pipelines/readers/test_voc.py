import numpy as np
import pytest
from PIL import Image

from data_pipelines.image_ops import UnreadableImage
from data_pipelines.readers.voc import VocReader
from owl_det.errors import ConfigError, DataError

SIZE = "<size><width>60</width><height>40</height><depth>3</depth></size>"


def box(name, *corners) -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    inside = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return f"<object><name>{name}</name><bndbox>{inside}</bndbox></object>"


class Folder:
    """A VOC folder to write into and open."""

    def __init__(self, root):
        self.root = root
        (root / "xml").mkdir()
        (root / "pictures").mkdir()

    def add(self, stem, *boxes, size=SIZE, filename=None, image=None, head=""):
        said = f"<filename>{filename}</filename>" if filename else ""
        text = f"{head}<annotation>{said}{size}{''.join(boxes)}</annotation>"
        (self.root / "xml" / f"{stem}.xml").write_text(text)
        Image.new("RGB", (60, 40)).save(self.root / "pictures" / (image or f"{stem}.jpg"))

    def open(self, **options) -> VocReader:
        return VocReader(self.root / "xml", self.root / "pictures", **options)


@pytest.fixture
def voc(tmp_path) -> Folder:
    return Folder(tmp_path)


def test_records(voc):
    voc.add("b", box("dog", 11, 21, 30, 40), box("cat", 50, 1, 70, 10), filename="b.jpg")
    voc.add("a")
    reader = voc.open()
    assert [c.name for c in reader.categories] == ["cat", "dog"]
    assert [(c.id, c.frequency) for c in reader.categories] == [(1, 1), (2, 1)]
    assert reader[0].image_id == 1 and reader[0].negatives == ("cat", "dog")
    one = reader[1]
    assert one.image_id == 2 and one.names == (("dog",), ("cat",)) and one.negatives == ()
    np.testing.assert_array_equal(one.boxes_xyxy, [[10, 20, 30, 40], [49, 0, 60, 10]])
    assert not one.is_crowd.any() and one.image.startswith(b"\xff\xd8")


def test_queries_rename(voc):
    voc.add("a", box("RBC", 1, 1, 9, 9))
    reader = voc.open(names=("WBC", "RBC"), queries=("white blood cell", "red blood cell"))
    assert reader[0].names == (("red blood cell",),)
    assert reader[0].negatives == ("white blood cell",)
    assert [c.name for c in reader.categories] == ["white blood cell", "red blood cell"]


def test_queries_must_fit_the_names(voc):
    voc.add("a", box("RBC", 1, 1, 9, 9))
    with pytest.raises(ConfigError, match=r"queries: 2 for 1 names \(RBC\)"):
        voc.open(names=("RBC",), queries=("a", "b"))
    with pytest.raises(ConfigError, match="distinct"):
        voc.open(names=("RBC", "WBC"), queries=("cell", "cell"))


def test_split_keeps_ids_and_categories(voc, tmp_path):
    for stem, name in (("a", "cat"), ("b", "dog"), ("c", "emu")):
        voc.add(stem, box(name, 1, 1, 9, 9))
    (tmp_path / "val.txt").write_text("c  1\n\nb -1\n")
    reader = voc.open(split_list=tmp_path / "val.txt")
    assert [reader[i].image_id for i in range(len(reader))] == [3, 2]
    assert [c.name for c in reader.categories] == ["cat", "dog", "emu"]
    assert [c.frequency for c in reader.categories] == [0, 1, 1]
    assert reader.version != voc.open().version


def test_degenerate_boxes_are_dropped_and_counted(voc, caplog):
    voc.add("a", box("cat", 5, 5, 5, 9), box("dog", 9, 5, 3, 9), box("emu", 1, 1, 2, 2))
    with caplog.at_level("WARNING"):
        reader = voc.open()
    assert reader.counts.num_dropped == 2 and "boxes dropped: 2 without area" in caplog.text
    assert reader[0].names == (("emu",),) and reader[0].negatives == ()
    np.testing.assert_array_equal(reader[0].boxes_xyxy, [[0, 0, 2, 2]])


@pytest.mark.parametrize(
    ("filename", "image"),
    [(None, "a.png"), ("other.jpg", "other.jpg"), ("other", "other.bmp"), ("gone.jpg", "a.jpeg")],
)
def test_image_is_found(voc, filename, image):
    voc.add("a", filename=filename, image=image)
    assert voc.open()[0].source.endswith(image)


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>"])
def test_size_comes_from_the_image_where_the_file_has_none(voc, size):
    voc.add("a", box("cat", 31, 31, 90, 90), size=size)
    np.testing.assert_array_equal(voc.open()[0].boxes_xyxy, [[30, 30, 60, 40]])


def test_missing_image_is_unreadable_only_when_asked_for(voc, tmp_path):
    voc.add("a", box("cat", 1, 1, 90, 90), size="")
    voc.add("b")
    (tmp_path / "pictures/a.jpg").unlink()
    reader = voc.open()
    with pytest.raises(UnreadableImage, match=r"a\.jpg"):
        reader[0]
    assert reader[1].image_id == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>", "is not valid XML"),
        ("", "is not valid XML"),
        ("<a><object><name>cat</name></object></a>", "<object>: the field bndbox/xmin is missing"),
        (f"<a>{box('', 1, 1, 2, 2)}</a>", "the field name is missing or empty"),
        (f"<a>{box('cat', 1, 1, 'x', 2)}</a>", "bndbox/xmax: expected a number, got 'x'"),
        (f"<a>{box('cat', 1, 1, 'nan', 2)}</a>", "bndbox/xmax: expected a number"),
        ("<a><size><width>5</width></size></a>", "the field size/height is missing"),
        ('<!DOCTYPE a [<!ENTITY x "y">]><a>&x;</a>', "has a DOCTYPE"),
        ('<?xml version="1.0" encoding="klingon"?><a/>', "klingon|unknown encoding"),
    ],
)
def test_malformed_files_are_named(voc, tmp_path, text, message):
    voc.add("a")
    (tmp_path / "xml/a.xml").write_text(text)
    with pytest.raises(DataError, match=message) as error:
        voc.open()
    assert "a.xml" in str(error.value)


def test_doctype_is_refused_in_any_encoding(voc, tmp_path):
    voc.add("a")
    text = '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY x "y">]><a>&x;</a>'
    (tmp_path / "xml/a.xml").write_bytes(text.encode("utf-16"))
    with pytest.raises(DataError, match="DOCTYPE"):
        voc.open()


def test_unknown_class_names_the_file(voc):
    voc.add("a", box("cow", 1, 1, 2, 2))
    with pytest.raises(DataError, match=r"a\.xml: the class 'cow' is not among the names cat"):
        voc.open(names=("cat",))


def test_missing_and_empty(voc, tmp_path):
    with pytest.raises(DataError, match="holds no XML file"):
        voc.open()
    voc.add("a")
    with pytest.raises(DataError, match="gone: no such folder.*`annotations`"):
        VocReader(tmp_path / "gone", tmp_path)
    with pytest.raises(DataError, match="gone: no such folder.*`images`"):
        VocReader(tmp_path / "xml", tmp_path / "gone")
    with pytest.raises(DataError, match=r"train\.txt.*`split_list`"):
        voc.open(split_list=tmp_path / "train.txt")
    (tmp_path / "train.txt").write_text("a\nz\n")
    with pytest.raises(DataError, match=r"train\.txt: line 2: there is no annotation z\.xml"):
        voc.open(split_list=tmp_path / "train.txt")
    (tmp_path / "train.txt").write_text("\n")
    with pytest.raises(DataError, match="names no image"):
        voc.open(split_list=tmp_path / "train.txt")


def test_real_blood_cells(shared_data):
    root = shared_data / "bccd"
    if not root.is_dir():
        pytest.skip("needs the blood cell images (bccd), which are absent")
    names, queries = ("WBC", "RBC"), ("white blood cell", "red blood cell")
    with pytest.raises(DataError, match="'Platelets' is not among the names"):
        VocReader(root / "Annotations", root / "JPEGImages", names=names, queries=queries)
    everything = VocReader(root / "Annotations", root / "JPEGImages")
    assert len(everything) == 364 and everything.counts.num_dropped == 2
    assert [c.name for c in everything.categories] == ["Platelets", "RBC", "WBC"]

    test = VocReader(
        root / "Annotations",
        root / "JPEGImages",
        split_list=root / "ImageSets/Main/test.txt",
        names=("Platelets", "RBC", "WBC"),
    )
    assert len(test) == 72
    assert test.categories[0].id == everything.categories[0].id
    one = test[0]
    assert everything[one.image_id - 1].source == one.source
    np.testing.assert_array_equal(everything[0].boxes_xyxy[0], [259, 176, 491, 376])
