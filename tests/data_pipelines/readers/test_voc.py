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
    assert reader.counts.dropped == {"without area": 1, "of negative width or height": 1}
    assert "2 of 3 boxes dropped" in caplog.text and "a.xml: 'dog' 9 5 3 9" in caplog.text
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
        ("<html><body>Not found</body></html>", "is no annotation of Pascal VOC.*<html>"),
        ("<annotations><image/></annotations>", "is no annotation of Pascal VOC"),
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


def test_what_was_read_before_is_read_so_today(voc, tmp_path):
    """The versions were computed before readers mended anything."""
    voc.add("b", box("cat", 11, 21, 30, 40), box("red emu", 50.5, 1, 70, 10), filename="b.jpg")
    voc.add("a", box("Dog", 5, 5, 5, 9), box("Dog", 1, 1, 2, 2), size="", filename="a.png")
    (tmp_path / "pictures/a.jpg").rename(tmp_path / "pictures/a.png")
    voc.add("c", filename="c.jpg")
    (tmp_path / "val.txt").write_text("c 1\nb -1\n")
    assert voc.open().version == "voc-4164663d8769"
    assert voc.open(split_list=tmp_path / "val.txt").version == "voc-0692a7e2e939"


def coordinates(**sides) -> str:
    inside = "".join(f"<{side}>{value}</{side}>" for side, value in sides.items())
    return f"<bndbox>{inside}</bndbox>"


GOOD = coordinates(xmin=1, ymin=1, xmax=9, ymax=9)
PART = f"<part><name>head</name>{GOOD}</part>"


@pytest.mark.parametrize(
    ("inside", "reason"),
    [
        ("<name>cat</name>", "without a bndbox"),
        ("<name>cat</name><polygon><x1>1</x1><y1>1</y1></polygon>", "without a bndbox"),
        (f"<name>cat</name>{PART}", "without a bndbox"),
        (f"<name>cat</name>{GOOD}{GOOD}", "with several bndbox"),
        (f"<name> </name>{GOOD}", "without a name"),
        (GOOD, "without a name"),
        (f"<name>cat</name>{coordinates(xmin=1, ymin=1, xmax=9)}", "with coordinates that"),
        (f"<name>cat</name>{coordinates(xmin=1, ymin=1, xmax='x', ymax=9)}", "with coordinates"),
        (f"<name>cat</name>{coordinates(xmin='1,5', ymin=1, xmax=9, ymax=9)}", "with coordinates"),
        (f"<name>cat</name>{coordinates(xmin=1, ymin=1, xmax='nan', ymax=9)}", "not finite"),
        (f"<name>cat</name>{coordinates(xmin='-inf', ymin=1, xmax=9, ymax=9)}", "not finite"),
        (f"<name>cat</name>{coordinates(xmin=9, ymin=1, xmax=1, ymax=9)}", "of negative width"),
        (f"<name>cat</name>{coordinates(xmin=9, ymin=1, xmax=9, ymax=9)}", "without area"),
        (f"<name>cat</name>{coordinates(xmin=99, ymin=1, xmax=109, ymax=9)}", "outside their"),
    ],
)
def test_one_bad_object_is_dropped_counted_and_named(voc, caplog, inside, reason):
    voc.add("a", f"<object>{inside}</object>", box("dog", 1, 1, 9, 9), box("cat", 11, 11, 19, 19))
    with caplog.at_level("WARNING"):
        reader = voc.open()
    assert (reader.counts.num_boxes, reader.counts.num_read) == (2, 3)
    ((found, count),) = reader.counts.dropped.items()
    assert found.startswith(reason) and count == 1
    assert "1 of 3 boxes dropped: 1 " in caplog.text and "a.xml: " in caplog.text
    assert reader[0].names == (("dog",), ("cat",))


def test_the_name_of_a_dropped_object_is_no_negative(voc):
    voc.add("a", "<object><name>emu</name></object>", box("dog", 1, 1, 9, 9))
    one = voc.open()[0]
    assert one.not_exhaustive == ("emu",) and one.negatives == ()


def test_boxes_in_unusual_places_are_read_or_counted(voc):
    inner = box("cat", 1, 1, 9, 9)
    bare = coordinates(xmin=1, ymin=1, xmax=9, ymax=9)
    voc.add("a", box("dog", 1, 1, 9, 9), f"<objects>{inner}</objects>", f"<obj>{bare}</obj>", bare)
    reader = voc.open()
    assert reader[0].names == (("dog",), ("cat",))
    assert reader.counts.dropped == {"outside of any <object>": 2}


def test_parts_are_no_objects(voc):
    voc.add("a", f"<object><name>person</name>{GOOD}{PART}</object>")
    reader = voc.open()
    assert reader[0].names == (("person",),) and [c.name for c in reader.categories] == ["person"]


def test_floats_difficult_and_truncated_are_read(voc):
    flags = "<difficult>1</difficult><truncated>1</truncated><occluded>1</occluded>"
    inside = coordinates(xmin=1.5, ymin="2e0", xmax="+30.25", ymax=" 40 ")
    voc.add("a", f"<object><name>cat</name>{flags}{inside}</object>")
    np.testing.assert_allclose(voc.open()[0].boxes_xyxy, [[0.5, 1, 30.25, 40]])


@pytest.mark.parametrize(
    "size",
    [
        "<size><width>60</width></size>",
        "<size><width>sixty</width><height>40</height></size>",
        "<size><width>nan</width><height>inf</height></size>",
        "<size><width>-60</width><height>40</height></size>",
        "<size/>",
    ],
)
def test_a_size_that_is_no_size_is_measured(voc, size):
    voc.add("a", box("cat", 31, 31, 90, 90), size=size)
    np.testing.assert_array_equal(voc.open()[0].boxes_xyxy, [[30, 30, 60, 40]])


def test_boxes_are_held_against_the_image_not_the_size_in_the_file(voc, tmp_path, caplog):
    sideways = "<size><width>40</width><height>60</height></size>"
    voc.add("a", box("cat", 31, 1, 60, 20), size=sideways)
    turned = Image.new("RGB", (40, 60))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "pictures/a.jpg", exif=exif)
    with caplog.at_level("WARNING"):
        reader = voc.open()
    np.testing.assert_array_equal(reader[0].boxes_xyxy, [[30, 0, 60, 20]])
    assert "60 x 40" in caplog.text and "40 x 60" in caplog.text


# --- which image ----------------------------------------------------------------------------------


def test_the_image_is_the_one_called_like_the_file(voc):
    for stem in ("a", "b", "c"):
        voc.add(stem, box(stem, 1, 1, 9, 9), filename="a.jpg")
    reader = voc.open()
    assert [reader[i].source[-5:] for i in range(3)] == ["a.jpg", "b.jpg", "c.jpg"]


def test_files_whose_filename_is_another_image_are_told(voc, caplog):
    voc.add("a", filename="b.jpg")
    voc.add("b", filename="b.jpg")
    assert voc.open()[0].source.endswith("a.jpg")
    assert "1 XML files name another image of the folder in <filename>, such as" in caplog.text
    assert "a.xml (b.jpg); the one that is called like the XML file is taken" in caplog.text


def test_images_without_an_xml_file_are_told(voc, tmp_path, caplog):
    voc.add("a")
    for name in ("b.jpg", "c.png", "._a.jpg"):
        Image.new("RGB", (60, 40)).save(tmp_path / "pictures" / name)
    assert len(voc.open()) == 1
    assert "2 of 3 images have no XML file and are left out, such as b.jpg" in caplog.text
    caplog.clear()
    (tmp_path / "val.txt").write_text("a\n")
    voc.open(split_list=tmp_path / "val.txt")  # which leaves images out
    assert caplog.text == ""


def test_boxes_that_stand_twice_are_told(voc, caplog):
    voc.add("a", box("dog", 1, 1, 9, 9), box("dog", 1, 1, 9, 9), box("cat", 1, 1, 9, 9))
    assert voc.open().counts.num_boxes == 3
    assert "1 of 3 boxes stand twice in their files" in caplog.text


def test_two_files_of_one_image_are_an_error(voc, tmp_path):
    voc.add("x1", box("cat", 1, 1, 9, 9), filename="image.jpg", image="image.jpg")
    voc.add("x2", box("cat", 1, 1, 9, 9), filename="image.jpg", image="image.jpg")
    with pytest.raises(DataError, match=r"x2\.xml: its image is image\.jpg, which x1\.xml has"):
        voc.open()
    (tmp_path / "val.txt").write_text("x2\n")
    assert len(voc.open(split_list=tmp_path / "val.txt")) == 1


@pytest.mark.parametrize(
    "filename",
    [
        r"C:\data\b.jpg",
        "/home/somebody/b.jpg",
        "https://example.com/images/b.jpg?size=large",
        "b",
        "pictures/b.jpg",
        "B.JPG",
    ],
)
def test_filenames_of_other_machines(voc, tmp_path, filename):
    voc.add("b", box("cat", 1, 1, 9, 9), filename=filename, image="b.jpg")
    assert voc.open()[0].source.endswith("pictures/b.jpg")
    (tmp_path / "xml/b.xml").rename(tmp_path / "xml/0001.xml")
    assert voc.open()[0].source.endswith("pictures/b.jpg")


def test_a_dot_in_a_name_begins_no_suffix(voc):
    voc.add("0001", box("cat", 1, 1, 9, 9), filename="img.v1", image="img.v1.jpg")
    assert voc.open()[0].source.endswith("img.v1.jpg")


# --- files ----------------------------------------------------------------------------------------


def test_hidden_files_are_left_out(voc, tmp_path):
    voc.add("a", box("cat", 1, 1, 9, 9))
    version = voc.open().version
    (tmp_path / "xml/._a.xml").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "xml/.DS_Store").write_bytes(b"\0")
    (tmp_path / "xml/.hidden").mkdir()
    (tmp_path / "xml/.hidden/z.xml").write_text("broken")
    assert voc.open().version == version


def test_files_in_subfolders_are_told(voc, tmp_path, caplog):
    voc.add("a", box("cat", 1, 1, 9, 9))
    (tmp_path / "xml/more").mkdir()
    (tmp_path / "xml/more/b.xml").write_text("<annotation/>")
    assert len(voc.open()) == 1
    assert "1 XML files lie in subfolders" in caplog.text
    (tmp_path / "xml/a.xml").unlink()
    with pytest.raises(DataError, match=r"holds no XML file; more/b\.xml lies in a subfolder"):
        voc.open()


@pytest.mark.parametrize(
    "text",
    [
        '<annotation xmlns="http://example.com/voc">{}</annotation>',
        "<ANNOTATION>{}</ANNOTATION>",
        "<annotation><objects>{}</objects></annotation>",
        "\ufeff<?xml version='1.0' encoding='utf-8'?><annotation>{}</annotation>",
    ],
)
def test_xml_of_other_writers(voc, tmp_path, text):
    voc.add("a")
    (tmp_path / "xml/a.xml").write_text(text.format(box("cat", 1, 1, 9, 9)))
    assert voc.open()[0].names == (("cat",),)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "gb2312", "shift_jis"])
def test_xml_in_other_encodings(voc, tmp_path, encoding):
    name = "caf\u00e9" if encoding == "latin-1" else "\u732b" if encoding != "utf-16" else "кот"
    voc.add("a")
    head = f'<?xml version="1.0" encoding="{encoding}"?>'
    text = f"{head}<annotation>{box(name, 1, 1, 9, 9)}</annotation>"
    (tmp_path / "xml/a.xml").write_bytes(text.encode(encoding))
    assert voc.open()[0].names == ((name,),)


# --- names and splits -----------------------------------------------------------------------------


def test_underscores_of_names_are_spaces(voc):
    voc.add("a", box("traffic_light", 1, 1, 9, 9), box("Dog", 1, 1, 9, 9))
    for reader in (
        voc.open(),
        voc.open(names=("Dog", "traffic light")),
        voc.open(names=("dog", "traffic_light")),
    ):
        assert {c.name.lower() for c in reader.categories} == {"dog", "traffic light"}
        assert reader[0].names[0] == ("traffic light",)
    assert voc.open(names=("dog", "Traffic_light"))[0].names == (("Traffic light",), ("dog",))


def test_two_spellings_of_a_class_are_an_error_unless_names_tell(voc):
    voc.add("a", box("Cat", 1, 1, 9, 9), box("cat", 1, 1, 9, 9))
    with pytest.raises(DataError, match="<name>: the categories 'Cat' and 'cat' are one text"):
        voc.open()
    assert voc.open(names=("cat",))[0].names == (("cat",), ("cat",))


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfa b\r\n2007.1\r\n",
        b"a b 1\n2007.1 -1\n",
        b"a b.jpg\n2007.1.xml\n",
        b"JPEGImages/a b.png  0\nC:\\x\\2007.1.jpg\n",
        "a b\n2007.1\n".encode("utf-16"),
    ],
)
def test_split_lists_of_other_writers(voc, tmp_path, content):
    for stem in ("a b", "2007.1", "other"):
        voc.add(stem, box("cat", 1, 1, 9, 9))
    (tmp_path / "val.txt").write_bytes(content)
    reader = voc.open(split_list=tmp_path / "val.txt")
    assert [reader[i].image_id for i in range(len(reader))] == [2, 1]


def test_a_split_that_names_an_image_twice(voc, tmp_path, caplog):
    for stem in ("a", "b"):
        voc.add(stem, box("cat", 1, 1, 9, 9))
    (tmp_path / "val.txt").write_text("b\na\nb\n")
    assert len(voc.open(split_list=tmp_path / "val.txt")) == 2
    assert "names 1 images twice, such as b" in caplog.text
    (tmp_path / "val.txt").write_text("image,label\na,1\n")
    with pytest.raises(DataError, match=r"line 1: there is no annotation .*without commas"):
        voc.open(split_list=tmp_path / "val.txt")
