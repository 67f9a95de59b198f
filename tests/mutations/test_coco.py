"""COCO and LVIS JSON, mutated: every box is used, or dropped with a reason."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.open_source import open_source
from owl_det.config import CocoSource
from tests.mutations import harness, pictures, raw, trees
from tests.mutations.harness import Case

_FILE = "instances_val.json"


@harness.COUNTS
def test_mutated_annotations(count: int, tmp_path: Path) -> None:
    harness.check(_case, count, tmp_path / "data")


def test_the_unmutated_are_read_whole(tmp_path: Path) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        tree = _good(rng)
        case = _written(json.dumps(tree).encode(), tmp_path, _images(tree))
        _, records = harness.read_and_verify(case)
        assert sum(len(record.names) for record in records) == len(tree["annotations"])


def _reproduce(seed: int) -> Any:
    return harness.reproduce(_case, seed)


def _case(rng: np.random.Generator, folder: Path) -> Case:
    tree = _good(rng)
    images = _images(tree)
    if rng.random() < 0.85:
        for _ in range(rng.integers(1, 5)):
            tree = trees.mutated(tree, rng)
    content = trees.as_json(tree, rng).encode()
    if rng.random() < 0.25:
        content = _twice(content, rng) if rng.random() < 0.2 else raw.mutated(content, rng)
    return _written(content, folder, images)


def _twice(content: bytes, rng: np.random.Generator) -> bytes:
    """A key of the outermost object stands twice."""
    key = trees.pick(rng, (b"images", b"annotations", b"categories", b"info"))
    return content.replace(b"{", b'{"%s": [], ' % key, 1)


def _written(content: bytes, folder: Path, images: dict[str, tuple[int, int]]) -> Case:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / _FILE).write_bytes(content)
    for name, (width, height) in images.items():
        (folder / "images" / name).write_bytes(pictures.jpeg(width, height))
    entry = CocoSource(path=str(folder), annotations=_FILE, images="images")

    def read() -> Any:
        opened = open_source(entry, "")
        return opened, harness.records(opened, str(folder / "images"), "/etc/passwd")

    def verify(value: Any, lines: list[str]) -> None:
        opened, records = value
        harness.check_counts(opened, records, _num_boxes(content), lines)

    return Case(read=read, verify=verify, names=[_FILE, str(folder / "images")])


def _num_boxes(content: bytes) -> int:
    """All boxes of a file: the entries of every list that is called annotations."""

    def count(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        lists = [value for key, value in pairs if key == "annotations"]
        found = sum(len(value) for value in lists if isinstance(value, list))
        return {**dict(pairs), "boxes": found}

    return json.loads(content.decode(json.detect_encoding(content)), object_pairs_hook=count)[
        "boxes"
    ]


# --- good files ----------------------------------------------------------------------------------


def _images(tree: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """File name → width, height."""
    return {
        (e.get("file_name") or e["coco_url"].rsplit("/", 1)[1]): (e["width"], e["height"])
        for e in tree["images"]
    }


def _good(rng: np.random.Generator) -> dict[str, Any]:
    is_lvis = rng.random() < 0.4
    categories = [
        {"id": 3, "name": "traffic light", "supercategory": "outdoor"},
        {"id": 17, "name": "cat", "supercategory": "animal"},
        {"id": 90, "name": "hair drier", "supercategory": "indoor"},
    ]
    images = []
    for number in range(int(rng.integers(1, 4))):
        width, height = int(rng.integers(20, 64)), int(rng.integers(20, 64))
        images.append(
            {"id": 7 + 30 * number, "file_name": f"{number}.jpg", "width": width, "height": height}
        )
    annotations = [
        _annotation(number, trees.pick(rng, images), rng)
        for number in range(int(rng.integers(1, 7)))
    ]
    if is_lvis:
        for category, letter in zip(categories, "rcf", strict=True):
            category["frequency"] = letter
        for entry in images:
            entry["coco_url"] = f"http://images.cocodataset.org/val2017/{entry.pop('file_name')}"
            entry |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    elif rng.random() < 0.5:
        for entry in annotations:
            entry["iscrowd"] = int(rng.random() < 0.2)
    return {
        "info": {"year": 2024},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def _annotation(number: int, image: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    x, y = rng.uniform(0, [image["width"] - 8, image["height"] - 8])
    w, h = rng.uniform(2, [image["width"] - x, image["height"] - y])
    box = [round(float(value), 2) for value in (x, y, w, h)]
    return {
        "id": number + 1,
        "image_id": image["id"],
        "category_id": trees.pick(rng, (3, 17, 90)),
        "bbox": box,
        "area": round(box[2] * box[3], 2),
    }
