"""The size that a label file states is held against the image."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from data_pipelines.readers.coco import CocoReader
from data_pipelines.readers.voc import VocReader
from tests.data_pipelines.readers.small_coco import HEIGHT, WIDTH, content, messages

# --- the size in the file ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size",
    [(HEIGHT, WIDTH), (20, 20), (9, 9), (6000, 6000)],
    ids=["swapped", "smaller", "tiny", "larger"],
)
def test_a_wrong_size_is_said_and_loses_no_box(
    read: Any, caplog: pytest.LogCaptureFixture, size: tuple[int, int]
) -> None:
    good = read(content())
    wanted = [good[i].boxes_xyxy for i in range(3)]
    made = content()
    for image in made["images"]:
        image["width"], image["height"] = size
    reader = read(made)
    said = messages(caplog)
    assert "val: 3 of 3 images are not of the size in the label file" in said
    assert f"b.jpg: 60 x 40 pixels, the labels say {size[0]} x {size[1]}" in said
    assert reader.counts == good.counts and reader.counts.num_boxes == 4
    assert reader.categories == good.categories  # their frequencies too
    for i in range(3):
        np.testing.assert_array_equal(reader[i].boxes_xyxy, wanted[i])
        assert reader[i].names == good[i].names
        np.testing.assert_array_equal(reader[i].areas, good[i].areas)


@pytest.mark.parametrize("value", [0, None, ..., "", -1, "wide", [60], 0.5])
def test_without_a_size_images_are_measured(
    read: Any, caplog: pytest.LogCaptureFixture, value: Any
) -> None:
    good = read(content())
    made = content()
    for image in made["images"]:
        image["width"] = value
        if value is ...:
            del image["width"], image["height"]
    reader = read(made)
    assert "3 of 3 images have no size in the label file; they are measured" in messages(caplog)
    assert reader.counts == good.counts
    for i in range(3):
        np.testing.assert_array_equal(reader[i].boxes_xyxy, good[i].boxes_xyxy)


def test_quoted_and_fractional_sizes_are_sizes(read: Any, caplog: pytest.LogCaptureFixture) -> None:
    good, made = read(content()), content()
    for image in made["images"]:
        image |= {"width": f"{WIDTH}", "height": float(HEIGHT)}
    assert read(made).version == good.version and messages(caplog) == ""


def turned(path: Path, width: int, height: int) -> None:
    """An image of that upright size, stored on its side as cameras do."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (height, width)).save(path, exif=exif)


def test_upright_boxes_of_turned_images_with_the_stored_size_are_kept(
    read: Any, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As Label Studio exports them."""
    good = read(content())
    made = content()
    for image in made["images"]:
        turned(images / image["file_name"], WIDTH, HEIGHT)
        image["width"], image["height"] = HEIGHT, WIDTH
    reader = read(made)
    assert "b.jpg: 60 x 40 pixels (its EXIF orientation turns it from 40 x 60)" in messages(caplog)
    assert reader.counts == good.counts
    np.testing.assert_array_equal(reader[0].boxes_xyxy, good[0].boxes_xyxy)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_upright_boxes_are_kept_however_an_image_is_turned_and_stored(
    read: Any, images: Path, caplog: pytest.LogCaptureFixture, kind: str, orientation: int
) -> None:
    good = read(content())
    made = content()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for image in made["images"]:
        picture = Image.new("RGB", (HEIGHT, WIDTH))  # as stored: turned, its sides are swapped
        picture.save(images / image["file_name"], kind, exif=exif)
        image["width"], image["height"] = HEIGHT, WIDTH
    reader = read(made)
    assert "b.jpg: 60 x 40 pixels" in messages(caplog)
    assert "the labels say 40 x 60" in messages(caplog)
    assert reader.counts == good.counts
    np.testing.assert_array_equal(reader[0].boxes_xyxy, good[0].boxes_xyxy)


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_images_that_are_mirrored_or_upside_down_keep_their_size(
    read: Any, images: Path, caplog: pytest.LogCaptureFixture, orientation: int
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for name in "abc":
        Image.new("RGB", (WIDTH, HEIGHT)).save(images / f"{name}.jpg", exif=exif)
    assert read(content()).counts.num_boxes == 4
    assert messages(caplog) == ""


def test_boxes_of_a_turned_image_before_it_is_turned_are_never_clipped_in_silence(
    read: Any, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = content()
    turned(images / "b.jpg", WIDTH, HEIGHT)
    made["images"][0]["width"], made["images"][0]["height"] = HEIGHT, WIDTH
    made["annotations"][0]["bbox"] = [5, 45, 30, 12]  # of the stored image, 40 x 60
    made["annotations"][1]["bbox"] = [5, 5, 10, 10]
    reader = read(made)
    assert "b.jpg" in messages(caplog) and "those of the image before it is turned" in messages(
        caplog
    )
    record = reader[0]
    assert len(record.boxes_xyxy) == 0 and set(record.not_exhaustive) == {"cat", "star"}
    assert reader.counts.dropped == {"of an image of another size or not yet upright": 2}
    assert reader.counts.num_read == 4


def test_boxes_of_images_that_were_shrunk_since_are_dropped_and_counted(
    read: Any, caplog: pytest.LogCaptureFixture
) -> None:
    made = content()
    made["images"][0] |= {"width": 600, "height": 400}
    made["annotations"][0]["bbox"] = [300, 200, 100, 100]
    reader = read(made)
    assert "those of an image of another size" in messages(caplog)
    assert reader.counts.num_dropped == 2 and reader.counts.num_read == 4


def test_sizes_are_checked_when_a_record_is_read(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large data set is not read through when it is opened."""
    monkeypatch.setattr("data_pipelines.readers.true_sizes._SAMPLE", 1)
    made = content()
    made["images"][2] |= {"width": 10, "height": 10}
    made["annotations"].append({"id": 9, "image_id": 8, "category_id": 3, "bbox": [30, 20, 9, 9]})
    (tmp_path / "val.json").write_text(json.dumps(made))
    reader = CocoReader(tmp_path / "val.json", images)
    assert "c.jpg" not in messages(caplog).replace("annotations[4]", "")
    assert reader.counts.dropped == {"outside their images": 1}
    np.testing.assert_array_equal(reader[2].boxes_xyxy, [[30, 20, 39, 29]])
    assert "c.jpg: 60 x 40 pixels, the labels say 10 x 10" in messages(caplog)
    assert reader.counts.dropped == {} and reader.counts.num_boxes == 5
    number = len(caplog.records)
    assert reader[2].names == (("star",),) and len(caplog.records) == number


# --- VOC -----------------------------------------------------------------------------------------


def voc(folder: Path, size: tuple[int, int], box: tuple[int, int, int, int]) -> VocReader:
    """A reader of one XML file about a.jpg; `size` is (width, height), `box` as in the file."""
    sides = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    corners = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    (folder / "xml").mkdir(exist_ok=True)
    (folder / "xml/a.xml").write_text(
        f"<annotation><filename>a.jpg</filename><size><width>{size[0]}</width>"
        f"<height>{size[1]}</height></size><object><name>cat</name><bndbox>{corners}</bndbox>"
        "</object></annotation>"
    )
    return VocReader(folder / "xml", folder / "images")


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (10, 10), (600, 400), (0, 0)])
def test_a_wrong_size_in_voc_is_said_and_loses_no_box(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, size: tuple[int, int]
) -> None:
    reader = voc(tmp_path, size, (31, 11, 55, 40))
    np.testing.assert_array_equal(reader[0].boxes_xyxy, [[30, 10, 55, 40]])
    assert reader.counts.num_boxes == 1 and reader.counts.dropped == {}
    said = f"a.jpg: 60 x 40 pixels, the labels say {size[0]} x {size[1]}"
    assert (said in messages(caplog)) == (size != (0, 0))


def test_voc_boxes_of_a_turned_image_before_it_is_turned(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turned(images / "a.jpg", WIDTH, HEIGHT)
    reader = voc(tmp_path, (HEIGHT, WIDTH), (5, 45, 35, 58))
    assert len(reader[0].boxes_xyxy) == 0 and reader.counts.num_dropped == 1
    assert "those of the image before it is turned" in messages(caplog)
