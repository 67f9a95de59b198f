"""Files of images that a label file names otherwise."""

from pathlib import Path
from typing import Any

import pytest

from owl_det.errors import DataError
from tests.data_pipelines.readers.small_coco import content, messages

# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "on_disk"),
    [
        ("images\\b.jpg", "b.jpg"),
        ("C:\\data\\images\\b.jpg", "b.jpg"),
        ("./b.jpg", "b.jpg"),
        ("../../images/1/b.jpg", "b.jpg"),
        ("/home/someone/data/b.jpg", "b.jpg"),
        ("https://host.example/data/b.jpg?size=full", "b.jpg"),
        ("/data/local-files/?d=images/b.jpg", "b.jpg"),
        ("b.JPG", "b.jpg"),
        ("b.jpg", "b.JPG"),
        ("B.jpg", "b.jpg"),
        ("cafe\u0301.jpg", "caf\u00e9.jpg"),
        ("caf\u00e9.jpg", "cafe\u0301.jpg"),
        ("https://host.example/red%20b.jpg", "red b.jpg"),
        ("val/b.jpg", "b.jpg"),
        ("sub\\b.jpg", "sub/b.jpg"),
    ],
)
def test_files_are_found_under_names_written_otherwise(
    read: Any, images: Path, caplog: pytest.LogCaptureFixture, name: str, on_disk: str
) -> None:
    made = content()
    (images / "sub").mkdir()
    (images / "b.jpg").rename(images / on_disk)
    made["images"][0]["file_name"] = name
    reader = read(made)
    assert Path(reader[0].source) == images / on_disk and reader.missing(3) == []
    exact = (images / name).is_file()
    assert ("named otherwise" in messages(caplog)) == (not exact)


def test_no_file_is_taken_that_may_be_another_image(read: Any, images: Path) -> None:
    made = content()
    made["images"][0]["file_name"] = "one/b.jpg"
    made["images"][1]["file_name"] = "two/b.jpg"
    reader = read(made)
    assert len(reader.missing(3)) == 2
    (images / "x.JPG").touch()
    (images / "x.Jpg").touch()
    made["images"][0]["file_name"] = "x.jpg"
    assert read(made).missing(1) == [str(images / "x.jpg")]


@pytest.mark.parametrize(
    ("names", "on_disk", "cause"),
    [
        (["q\\b.jpg", "p\\b.jpg", "c"], "b.jpg", "several images may be one of these"),
        (["one\\x.jpg", "y", "z"], "b.jpg", "the file names use backslashes"),
        (["https://a.example/x.jpg", "y", "z"], "b.jpg", "the file names are addresses"),
        (["/home/a/x.jpg", "y", "z"], "b.jpg", "are paths of another machine"),
        (["x.jpg", "y", "z"], "deep/er/x.jpg", "deep/er/x.jpg lies in a subfolder"),
        (["x.jpg", "y", "z"], "x.png", "there is x.png, of another format"),
        (["x.jpg", "y", "z"], "w.jpg", "the folder holds w.jpg, for instance"),
        (["x.jpg", "y", "z"], None, "the folder holds no file"),
    ],
)
def test_where_no_image_is_found_the_cause_is_named(
    read: Any, images: Path, names: list[str], on_disk: str | None, cause: str
) -> None:
    for file in images.iterdir():
        file.unlink()
    if on_disk:
        (images / on_disk).parent.mkdir(parents=True, exist_ok=True)
        (images / on_disk).touch()
    made = content()
    for image, name in zip(made["images"], names, strict=True):
        image["file_name"] = name
    with pytest.raises(DataError, match="holds none of the first 3 images") as error:
        read(made)
    assert cause in str(error.value)
