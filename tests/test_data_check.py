"""What a run's data must hold before its first step, of every kind of source."""

import json
import logging as std_logging
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipelines.features import Record
from data_pipelines.open_source import open_source
from owl_det.config import Config
from owl_det.config.resolve import resolve
from owl_det.errors import DataError
from owl_det.evaluation import data_check
from owl_det.training import loop
from tests import tiny

GOOD = {"bbox": [4, 4, 20, 10]}
WITHOUT_USE: dict[str, Any] = {
    "none in the file": [],
    "zero sizes": [{"bbox": [4, 4, 0, 10]}, {"bbox": [4, 4, 10, 0]}],
    "crowds alone": [{"bbox": [4, 4, 20, 10], "iscrowd": 1}],
    "outside the image": [{"bbox": [400, 400, 20, 10]}],
}


def _coco(folder: Path, boxes: list[dict[str, Any]], num_images: int = 3) -> dict[str, str]:
    """A COCO data set, its boxes all in the first image; a source of a config."""
    (folder / "images").mkdir(parents=True)
    images = [
        {"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in range(num_images)
    ]
    for image in images:
        Image.new("RGB", (40, 30)).save(folder / "images" / image["file_name"])
    entries = [
        {"id": i, "image_id": 0, "category_id": 1, "area": 9, "iscrowd": 0, **box}
        for i, box in enumerate(boxes)
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    content = {"images": images, "annotations": entries, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return {"kind": "coco", "path": str(folder)}


def _config(train_sources: dict[str, Any], **changes: Any) -> Config:
    return tiny.config(data__train=train_sources, **changes)


@pytest.mark.parametrize("what", WITHOUT_USE)
def test_a_training_without_a_usable_box_stops_before_anything_is_written(
    what: str, tmp_path: Path
) -> None:
    source = _coco(tmp_path / "data", WITHOUT_USE[what])
    workdir = tmp_path / "run"
    with pytest.raises(DataError, match=r"config.data.train: no usable box .*3 images") as error:
        loop.run(_config({"mine": source}), str(workdir))
    assert "mine: " in str(error.value)
    assert not workdir.exists()


def test_one_source_without_a_box_among_others_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sources = {
        "bare": _coco(tmp_path / "bare", WITHOUT_USE["zero sizes"]),
        "good": _coco(tmp_path / "good", [GOOD]),
    }
    config = _config(sources)
    opened = {n: open_source(s, "") for n, s in config.data.train.items()}
    data_check.require_training_labels(config, opened)
    warnings = [
        r.getMessage() for r in caplog.records if "config.data.train.bare" in r.getMessage()
    ]
    assert len(warnings) == 1 and "no usable box" in warnings[0]
    assert not any("config.data.train.good" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("max_images", [0, 2])
def test_an_evaluation_set_without_truth_is_refused_at_the_start(
    max_images: int, tmp_path: Path
) -> None:
    bare = _coco(tmp_path / "bare", WITHOUT_USE["crowds alone"])
    made = _config(
        {"good": _coco(tmp_path / "good", [GOOD])},
        data__eval={"val": bare},
        evaluation__max_images=max_images,
    )
    with pytest.raises(DataError, match="config.data.eval.val: no usable box"):
        loop.run(made, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_truth_beyond_the_images_that_are_measured_does_not_count(tmp_path: Path) -> None:
    source = _coco(tmp_path / "data", [{**GOOD, "image_id": 2}])
    made = _config({"good": source}, data__eval={"val": source}, evaluation__max_images=2)
    opened = {"val": open_source(made.data.eval["val"], "")}
    with pytest.raises(DataError, match="in the first 2 images .config.evaluation.max_images"):
        data_check.require_ground_truth(made, opened)


class _Uncounted:
    """A source that does not count its labels, as those read record by record."""

    counts = None
    categories = ()
    version = "v"
    name = "uncounted"

    def __init__(self, length: int, labelled: int):
        self.reads = 0
        self._length, self._labelled = length, labelled

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        import numpy as np

        self.reads += 1
        count = int(index >= self._length - self._labelled)
        return Record(
            image=b"",
            image_id=index,
            boxes_xyxy=np.zeros((count, 4), np.float32),
            names=(("cat",),) * count,
            is_crowd=np.zeros(count, bool),
            scores=np.ones(count, np.float32),
            captions=("a cat",) * count,
        )


@pytest.mark.parametrize(
    ("length", "labelled", "is_refused"),
    [(5, 0, True), (5, 1, False), (100_000, 0, False), (100_000, 50_000, False)],
)
def test_sources_that_do_not_count_are_looked_at_within_bounds(
    length: int, labelled: int, is_refused: bool, caplog: pytest.LogCaptureFixture
) -> None:
    source = _Uncounted(length, labelled)
    if is_refused:
        with pytest.raises(DataError, match="no usable box"):
            data_check.require_training_labels(tiny.config(), {"shapes": source})
    else:
        data_check.require_training_labels(tiny.config(), {"shapes": source})
    assert source.reads <= 256
    assert ("no usable box in the 256 images" in caplog.text) == (length > 5 and not labelled)


def test_contrastive_training_without_a_caption_is_refused() -> None:
    config = resolve(
        {
            "task": "contrastive",
            "model": {"contrastive": "softmax", "image": {"pooling": "mean"}},
            "optimizer": {"clip": {"scope": "global"}},
            "data": {"with_captions": True, "train": {"a": {"kind": "image_text"}}},
        }
    )
    with pytest.raises(DataError, match="no image of a has a caption"):
        data_check.require_training_labels(config, {"a": _Uncounted(9, 0)})
    data_check.require_training_labels(config, {"a": _Uncounted(9, 1)})
    with pytest.raises(DataError, match="config.data.eval.b: neither boxes nor captions"):
        data_check.require_ground_truth(config, {"b": _Uncounted(9, 0)})


def test_the_log_says_what_was_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from absl import logging

    logging.set_verbosity(logging.INFO)
    caplog.set_level(std_logging.INFO)
    source = _coco(tmp_path / "data", [GOOD, *WITHOUT_USE["zero sizes"]])
    config = _config({"mine": source})
    opened = {"mine": open_source(config.data.train["mine"], "")}
    data_check.log_what_was_read("train", opened)
    lines = [record.getMessage() for record in caplog.records]
    assert any(
        "train mine: 3 images (2 without a usable box), 1 boxes of 1 names" in x for x in lines
    )
    assert any("train mine: 2 of 3 boxes dropped: 2 without area" in x for x in lines)
    assert any(x.startswith("train mine: most boxes: cat 1") for x in lines)


def test_no_absent_name_at_all_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = _coco(tmp_path / "data", [GOOD, {**GOOD, "category_id": 2}], num_images=1)
    config = _config({"mine": source})
    opened = {"mine": open_source(config.data.train["mine"], "")}
    data_check.require_training_labels(config, opened)
    assert "of no image is a name known to be absent" in caplog.text
    caplog.clear()
    data_check.require_training_labels(_config({"mine": source}, data__min_queries=2), opened)
    assert "known to be absent" not in caplog.text
