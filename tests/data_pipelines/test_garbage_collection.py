"""Collection is paused inside, and goes on afterwards as before."""

import gc
import json
from pathlib import Path

import pytest

from data_pipelines import garbage_collection
from data_pipelines.readers.coco import CocoReader
from owl_det.errors import DataError


def test_collection_is_paused_inside_alone():
    with garbage_collection.paused():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_collection_that_was_off_stays_off():
    gc.disable()
    try:
        with garbage_collection.paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_refused_file_leaves_collection_on(tmp_path: Path):
    file = tmp_path / "labels.json"
    file.write_text(json.dumps({"images": [], "annotations": None}))
    with pytest.raises(DataError):
        CocoReader(file, tmp_path)
    assert gc.isenabled()
