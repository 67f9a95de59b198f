"""Captions of a folder of images (lines of JSON, tables, COCO's JSON, texts beside), mutated.

A caption that no mutation touched is in its record, or a warning names the file that was not read.
"""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import image_files
from data_pipelines.open_source import open_source
from owl_det.config import ImageTextSource
from tests.mutations import harness, pictures, raw, trees
from tests.mutations.harness import Case

_TABLES = ("metadata.jsonl", "captions.jsonl", "metadata.csv", "captions.tsv", "captions.json")
_COCO = "captions_val.json"
_Rows = list[dict[str, Any]]


@harness.COUNTS
def test_mutated_captions(count: int, tmp_path: Path) -> None:
    harness.check(_case, count, tmp_path / "data")


def test_the_unmutated_are_read_whole(tmp_path: Path) -> None:
    for kind in (*_TABLES, _COCO, "beside"):
        rng = np.random.default_rng(0)
        rows = _good(rng)
        folder = tmp_path / kind
        case = _written(kind, _serialised(kind, rows, rng), rows, rows, folder)
        opened, records = harness.read_and_verify(case)
        assert [record.captions for record in records] == [(row["caption"],) for row in rows]


def _reproduce(seed: int) -> Any:
    return harness.reproduce(_case, seed)


def _case(rng: np.random.Generator, folder: Path) -> Case:
    kind = trees.pick(rng, (*_TABLES, _COCO, "beside"))
    rows = _good(rng)
    changed = [dict(row) for row in rows]
    is_raw = rng.random() < 0.3
    for _ in range(0 if is_raw else rng.integers(1, 4)):
        at = int(rng.integers(len(changed)))
        changed[at] = trees.mutated(changed[at], rng) if changed[at] else {}
    intact = [row for row, other in zip(rows, changed, strict=True) if row == other]
    files = _serialised(kind, changed, rng)
    if is_raw:
        name = trees.pick(rng, list(files))
        files[name], intact = raw.mutated(files[name], rng), []
    return _written(kind, files, rows, intact, folder)


def _written(kind: str, files: dict[str, bytes], rows: _Rows, intact: _Rows, folder: Path) -> Case:
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        (folder / row["file_name"]).write_bytes(pictures.jpeg(20 + number, 20))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    entry = ImageTextSource(path=str(folder), captions=_COCO if kind == _COCO else "")

    def read() -> Any:
        opened = open_source(entry, "")
        return opened, harness.records(opened, str(folder))

    def verify(value: Any, lines: list[str]) -> None:
        opened, records = value
        found = {str(r.source).split(", ")[-1]: r for r in records if r is not None}
        images = {content.image for content in found.values()}
        if kind != _COCO:  # whose file lists the images
            there = sum(image_files.is_image(file.name) for file in folder.iterdir())
            assert len(opened) >= there, f"{there} images in the folder, {len(opened)} records"
        is_said = any(name in line for name in files for line in lines)
        for row in [] if is_said else intact:
            image = (folder / row["file_name"]).read_bytes()
            assert image in images, "an image is in no record"
            texts = [t for r in found.values() if r.image == image for t in r.captions]
            assert row["caption"] in texts, f"a caption is lost: {texts}"

    return Case(read=read, verify=verify, names=[str(folder)])


# --- good files ----------------------------------------------------------------------------------


def _good(rng: np.random.Generator) -> _Rows:
    return [
        {"file_name": f"{i}.jpg", "caption": f"a picture of {i}, or not"}
        for i in range(int(rng.integers(1, 5)))
    ]


def _serialised(kind: str, rows: _Rows, rng: np.random.Generator) -> dict[str, bytes]:
    """Content of the captions' files by name."""
    if kind == "beside":
        return {
            f"{number}.txt": str(row.get("caption", "")).encode("utf-8", "replace")
            for number, row in enumerate(rows)
        }
    if kind == _COCO:
        return {kind: trees.as_json(_coco(rows), rng).encode()}
    if kind.endswith(".json"):
        return {kind: trees.as_json(rows, rng).encode()}
    if kind.endswith(".jsonl"):
        return {kind: "".join(f"{trees.as_json(row, rng)}\n" for row in rows).encode()}
    return {kind: _table(rows, "\t" if kind.endswith("tsv") else ",")}


def _coco(rows: _Rows) -> dict[str, Any]:
    """Images and annotations; a row that lacks its file has no image, as in a cut file."""
    images = [{"id": i, **_without(row, "caption")} for i, row in enumerate(rows)]
    annotations = [{"image_id": i, **_without(row, "file_name")} for i, row in enumerate(rows)]
    return {"images": images, "annotations": annotations}


def _without(row: Any, key: str) -> dict[str, Any]:
    return {k: value for k, value in row.items() if k != key} if isinstance(row, dict) else {}


def _table(rows: _Rows, mark: str) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=mark)
    header = list(dict.fromkeys(["file_name", "caption", *(key for row in rows for key in row)]))
    writer.writerow(header)
    for row in rows:
        writer.writerow([row.get(key, "") for key in header])
    return buffer.getvalue().encode("utf-8", "surrogatepass")
