"""A small COCO file and a small LVIS file."""

from typing import Any

import pytest

WIDTH, HEIGHT = 60, 40
LISTS = ("neg_category_ids", "not_exhaustive_category_ids")


def content() -> dict[str, Any]:
    """Three images, four good boxes: two of COCO's that reach a little beyond their image."""
    boxes = [
        (30, 90, [10.1, 20.2, 5.3, 10.5]),
        (30, 3, [50, 30, 10.9, 10.7]),
        (7, 91, [-0.6, -0.4, 30.25, 41.2]),
        (7, 3, [20, 3, 4, 4]),
    ]
    return {
        "images": [
            {"id": i, "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH}
            for i, name in ((30, "b"), (7, "a"), (8, "c"))
        ],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": 7.5}
            for i, (image, category, box) in enumerate(boxes, start=1)
        ],
        "categories": [
            {"id": i, "name": name} for i, name in ((3, "star"), (90, "cat"), (91, "dog"))
        ],
    }


def lvis_content() -> dict[str, Any]:
    made = content()
    for category, letter in zip(made["categories"], "rcf", strict=True):
        category |= {"frequency": letter, "synset": f"{category['name']}.n.01"}
    for image in made["images"]:
        image |= {"neg_category_ids": [91] if image["id"] == 30 else []}
        image["not_exhaustive_category_ids"] = []
    return made


def messages(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)
