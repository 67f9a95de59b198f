"""Pseudo-boxes as a source: what is counted, and one line for each fault of a record."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines import pseudo_records
from data_pipelines.pseudo_records import PseudoRecord, ShardWriter
from data_pipelines.readers.pseudo_boxes import PseudoBoxesReader
from owl_det.errors import DataError

JOB = {
    "format": 1,
    "floor": 0.01,
    "image_floor": 0.01,
    "max_ngrams": 3,
    "num_shards": 1,
    "min_box_score": 0.2,
    "min_image_score": 0.3,
    "hard_negatives": 2,
}


def record(key: str, scores: list[float], phrases: tuple[str, ...]) -> PseudoRecord:
    return PseudoRecord(
        key=key,
        height=40,
        width=60,
        texts=("a cat",),
        boxes_xyxy=np.array([[1, 2, 30 + i, 20] for i in range(len(scores))], np.float32),
        scores=np.array(scores, np.float32),
        phrases=phrases,
        spaces=("ngrams",) * len(phrases),
        hard_negatives=("bus", "car"),
        hard_negative_scores=np.array([0.5, 0.4], np.float32),
    )


@pytest.fixture
def records(tmp_path: Path) -> Path:
    pseudo_records.write_json(tmp_path / "job.json", JOB)
    with ShardWriter(tmp_path, 0, 1) as shard:
        shard.add(record("a", [0.9, 0.4, 0.1], ("cat", "dog", "cat")), b"image a")
        shard.add(record("b", [0.5], ("cat",)), b"image b")
        shard.add(record("c", [0.25, 0.1], ("dog", "cat")), b"image c")
        shard.finish({"format": 1})
    return tmp_path


def read(folder: Path) -> PseudoBoxesReader:
    return PseudoBoxesReader(folder, min_box_score=0, min_image_score=0, hard_negatives=1)


def test_all_boxes_are_counted(records: Path) -> None:
    counts = read(records).counts
    assert counts.boxes == {"cat": 2, "dog": 1} and (counts.num_images, counts.num_empty) == (2, 0)
    assert counts.dropped == {
        "that score below 0.2": 1,
        "of images without a box of 0.3 or more": 2,
    }
    assert counts.num_read == 6 and counts.num_negatives == 2 and counts.is_federated


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("boxes_xyxy", [[1, 2, 30, 20]]),
        ("boxes_xyxy", [[1, 2, 30, 1e300]] * 3),
        ("boxes_xyxy", [[1, 2, 30, 10**400]] * 3),
        ("boxes_xyxy", [[5, 2, 5, 20]] * 3),
        ("scores", [0.9, float("nan"), 0.1]),
        ("scores", [0.9, 2, 0.1]),
        ("phrases", "cat"),
        ("phrases", [["cat"], "dog", "cat"]),
        ("texts", "a cat"),
        ("hard_negatives", [["bus"]]),
        ("hard_negatives", ["cat"]),
        ("image", None),
        ("image", {"offset": 10**30, "size": 1}),
        ("height", "tall"),
        ("height", 1e300),
        ("key", 5),
    ],
)
def test_a_malformed_record_is_named(records: Path, key: str, value: Any) -> None:
    file = pseudo_records.shard_file(records, "boxes", 0, 1)
    first, *others = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("\n".join(json.dumps(line) for line in (first | {key: value}, *others)))
    with pytest.raises(DataError, match="boxes-00000-of-00001.jsonl, line 1: "):
        read(records)


@pytest.mark.parametrize("value", [None, "0.2", True, float("nan"), float("inf"), -1])
def test_a_malformed_job_is_named(records: Path, value: Any) -> None:
    pseudo_records.write_json(records / "job.json", JOB | {"num_shards": value})
    with pytest.raises(DataError, match="num_shards is missing or no number in range"):
        read(records)
