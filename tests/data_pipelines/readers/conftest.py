"""What tests of the COCO reader share: a folder of images, and a reader of a file of theirs."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipelines.readers.coco import CocoReader
from tests.data_pipelines.readers.small_coco import HEIGHT, WIDTH


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "abc":
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / f"{name}.jpg")
    return folder


@pytest.fixture
def read(images: Path, tmp_path: Path) -> Any:
    def read(made: Any) -> CocoReader:
        file = tmp_path / "val.json"
        if isinstance(made, bytes):
            file.write_bytes(made)
        else:
            file.write_text(made if isinstance(made, str) else json.dumps(made))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return CocoReader(file, images)

    return read
