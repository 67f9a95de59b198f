"""Records of `owl-det annotate`, mutated: every box is used, or left out with a reason."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.open_source import open_source
from owl_det.config import PseudoBoxesSource
from tests.mutations import harness, pictures, raw, tars, trees
from tests.mutations.harness import Case

_BOXES, _TAR = "boxes-{:05d}-of-00002.jsonl", "images-{:05d}-of-00002.tar"
_SUMMARY = "shard-{:05d}-of-00002.json"
_PHRASES = ("a cat", "traffic light", "dog", "hair drier")


@harness.COUNTS
def test_mutated_records(count: int, tmp_path: Path) -> None:
    harness.check(_case, count, tmp_path / "data")


def test_the_unmutated_are_read_whole(tmp_path: Path) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        opened, records = harness.read_and_verify(_written(_good(rng), tmp_path / str(seed)))
        assert len(records) == len(opened) > 0
        assert sum(len(record.names) for record in records) == opened.counts.num_boxes


def _reproduce(seed: int) -> Any:
    return harness.reproduce(_case, seed)


def _case(rng: np.random.Generator, folder: Path) -> Case:
    files = _good(rng)
    for _ in range(rng.integers(1, 4)):
        name = trees.pick(rng, list(files))
        if name.endswith(".tar") or rng.random() < 0.2:
            files[name] = raw.mutated(files[name], rng)
        else:
            files[name] = _with_other_line(files[name], rng)
    return _written(files, folder)


def _with_other_line(content: bytes, rng: np.random.Generator) -> bytes:
    """One object of JSON lines, or of a file of one object, changes."""
    try:
        lines = [json.dumps(json.loads(content))]
    except (ValueError, RecursionError):
        lines = content.decode("utf-8", "replace").splitlines()
    if not lines:
        return content
    at = int(rng.integers(len(lines)))
    try:
        lines[at] = trees.as_json(trees.mutated(json.loads(lines[at]), rng), rng)
    except (ValueError, TypeError, RecursionError):  # it was mutated before
        lines[at] = ""
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")


def _written(files: dict[str, bytes], folder: Path) -> Case:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    entry = PseudoBoxesSource(path=str(folder))

    def read() -> Any:
        opened = open_source(entry, "")
        return opened, harness.records(opened, str(folder))

    def verify(value: Any, lines: list[str]) -> None:
        opened, records = value
        counts = opened.counts
        num_boxes = sum(_num_boxes(files[_BOXES.format(i)]) for i in range(2))
        found = counts.num_boxes + sum(counts.dropped.values())
        assert found == num_boxes, f"{num_boxes} boxes in the files, {found} used or left out"
        used = sum(len(r.names) for r in records if r is not None)
        assert used <= counts.num_boxes and (None in records or used == counts.num_boxes)
        for record in (r for r in records if r is not None):
            boxes = record.boxes_xyxy
            assert np.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all()

    # Thresholds that contradict each other are keys of the source, whose values the job gives.
    keys = ("min_box_score", "min_image_score")
    return Case(read=read, verify=verify, names=[str(folder), *keys])


def _num_boxes(content: bytes) -> int:
    return sum(np.size(json.loads(line)["scores"]) for line in content.splitlines())


# --- good records --------------------------------------------------------------------------------


def _good(rng: np.random.Generator) -> dict[str, bytes]:
    """Content by name: two shards, as their format is documented in `pseudo_records`."""
    job = {"format": 1, "floor": 0.1, "image_floor": 0.1, "max_ngrams": 10, "num_shards": 2}
    job |= {"min_box_score": 0.3, "min_image_score": 0.3, "hard_negatives": 2, "uses_ngrams": True}
    files = {"job.json": json.dumps(job).encode()}
    for shard in range(2):
        parts = [
            tars.Part(name=f"{shard}{i}.jpg", content=pictures.jpeg(20 + i, 24))
            for i in range(int(rng.integers(1, 4)))
        ]
        content = tars.written(parts, np.random.default_rng(0))
        lines = [_line(part, content, rng) for part in parts]
        files[_BOXES.format(shard)] = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
        files[_TAR.format(shard)] = content
        files[_SUMMARY.format(shard)] = json.dumps({"format": 1, "sha256": "0" * 64}).encode()
    return files


def _line(part: tars.Part, tar: bytes, rng: np.random.Generator) -> dict[str, Any]:
    scores = sorted((float(x) for x in rng.uniform(0.1, 0.9, rng.integers(1, 4))), reverse=True)
    scores[0] = max(scores[0], 0.5)
    corners = [[*rng.uniform(0, 9, 2), *rng.uniform(11, 19, 2)] for _ in scores]
    phrases = [trees.pick(rng, _PHRASES[:3]) for _ in scores]
    return {
        "key": part.name,
        "image": {"offset": tar.index(part.content), "size": len(part.content)},
        "height": 24,
        "width": 20 + int(part.name[1]),
        "texts": ["a cat beside a traffic light"],
        "boxes_xyxy": [[round(float(x), 2) for x in box] for box in corners],
        "scores": scores,
        "phrases": phrases,
        "spaces": ["ngrams"] * len(scores),
        "hard_negatives": ["hair drier"],
        "hard_negative_scores": [0.2],
    }
