"""JSON of any kind: what is read, and what a file is called that is no COCO file."""

import json
from typing import Any

import pytest

from owl_det.errors import DataError
from tests.data_pipelines.readers.small_coco import content

# --- JSON ----------------------------------------------------------------------------------------


def test_json_in_other_encodings(read: Any) -> None:
    good = read(content())
    text = json.dumps(content(), ensure_ascii=False)
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        assert read(text.encode(encoding)).version == good.version


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(content()) + "x", "is not valid JSON: Extra data"),
        (json.dumps(content())[:-5], "is not valid JSON"),
        ("", "is empty"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"images": ' + "9" * 5000 + "}", "is not valid JSON"),
        ('{"images": [], "images": [], "annotations": []}', "has the key 'images' twice"),
        ("<!DOCTYPE html><html>", "is a web page"),
        ("<annotations></annotations>", "is XML; export it as COCO"),
        ("version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        ('"text"', "it is a single str"),
        ('[{"image_id": 1, "category_id": 2, "bbox": [], "score": 1}]', "a list of detections"),
        ('[{"id": 1, "data": {}, "annotations": []}]', "Label Studio"),
        ('[{"image": "a.jpg", "annotations": []}]', "CreateML"),
        ('[{"a": 1, "b": 2}]', "a list of 1 entries with the keys a, b"),
        ('{"_via_settings": {}, "_via_img_metadata": {}}', "VGG Image Annotator"),
        ('{"a.jpg12": {"filename": "a.jpg", "regions": []}}', "VGG Image Annotator"),
        ('{"info": {}, "categories": {}, "items": []}', "Datumaro"),
        ('{"version": "5", "shapes": [], "imagePath": "a.jpg"}', "labelme"),
        (b"PK\x03\x04", "is a zip archive"),
        (b"\x1f\x8b\x08", "is compressed"),
        (b'{"images": "\xff"}', "is not UTF-8 text .* convert it to UTF-8"),
    ],
)
def test_files_of_other_kinds_are_called_what_they_are(read: Any, text: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read(text)
    assert "val.json" in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"segments_info": []}, "panoptic segments"),
        ({"caption": "a"}, "holds captions, no boxes"),
    ],
)
def test_other_files_of_coco_are_called_what_they_are(
    read: Any, entry: dict[str, Any], message: str
) -> None:
    made = content()
    made["annotations"] = [{"image_id": 30} | entry]
    with pytest.raises(DataError, match=message):
        read(made)
