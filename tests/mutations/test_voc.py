"""Pascal VOC XML, mutated: every object is used, or dropped with a reason."""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from data_pipelines.open_source import open_source
from owl_det.config import VocSource
from tests.mutations import harness, pictures, raw, trees, xml_trees
from tests.mutations.harness import Case

_NAMES = ("traffic light", "cat", "dog")


@harness.COUNTS
def test_mutated_annotations(count: int, tmp_path: Path) -> None:
    harness.check(_case, count, tmp_path / "data")


def test_the_unmutated_are_read_whole(tmp_path: Path) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        folder = tmp_path / str(seed)
        roots = _good(rng)
        files = {f"{i}.xml": xml_trees.as_bytes(root) for i, root in enumerate(roots)}
        case = _written(files, folder, _sizes(roots), rng)
        opened, records = harness.read_and_verify(case)
        assert not opened.counts.dropped
        assert sum(len(r.names) for r in records) == sum(len(r.findall("object")) for r in roots)


def _reproduce(seed: int) -> Any:
    return harness.reproduce(_case, seed)


def _case(rng: np.random.Generator, folder: Path) -> Case:
    roots = _good(rng)
    sizes = _sizes(roots)
    files = {f"{i}.xml": xml_trees.as_bytes(root) for i, root in enumerate(roots)}
    for _ in range(rng.integers(1, 3)):
        name = trees.pick(rng, list(files))
        files[name] = _mutated(roots[int(name[0])], rng)
    return _written(files, folder, sizes, rng)


def _mutated(root: ElementTree.Element, rng: np.random.Generator) -> bytes:
    if rng.random() < 0.8:
        for _ in range(rng.integers(1, 4)):
            root = xml_trees.mutated(root, rng)
    content = xml_trees.as_bytes(root)
    if rng.random() < 0.2:
        content = xml_trees.mutated_text(content, rng)
    return raw.mutated(content, rng) if rng.random() < 0.15 else content


def _written(
    files: dict[str, bytes], folder: Path, sizes: list[tuple[int, int]], rng: np.random.Generator
) -> Case:
    for name in ("Annotations", "JPEGImages"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / "Annotations" / name).write_bytes(content)
    for i, (width, height) in enumerate(sizes):
        (folder / "JPEGImages" / f"{i}.jpg").write_bytes(pictures.jpeg(width, height))
    names = _NAMES if rng.random() < 0.3 else ()
    entry = VocSource(path=str(folder), names=names)

    def read() -> Any:
        opened = open_source(entry, "")
        return opened, harness.records(opened, str(folder))

    def verify(value: Any, lines: list[str]) -> None:
        opened, records = value
        harness.check_counts(opened, records, sum(map(_num_boxes, files.values())), lines)

    return Case(read=read, verify=verify, names=[*files, str(folder), *_KEYS])


_KEYS = ("names, queries",)


def _num_boxes(content: bytes) -> int:
    """All boxes of a file: objects that are in no other, and boxes that stand in none."""

    match = re.match(rb"""\s*<\?xml[^>]*encoding=["']([^"']*)[^>]*>""", content)
    if match and match[1].lower() == b"gb2312":  # which the parser does not know
        content = content[match.end() :].decode("gb2312").encode()
    count, pending = 0, [ElementTree.fromstring(content)]
    while pending:
        element = pending.pop()
        is_box = element.tag.split("}")[-1].lower() in ("object", "bndbox")
        count += is_box
        pending += [] if is_box else list(element)
    return count


# --- good files ----------------------------------------------------------------------------------


def _sizes(roots: list[ElementTree.Element]) -> list[tuple[int, int]]:
    """Width and height of each image."""
    return [tuple(int(r.findtext(f"size/{k}") or 0) for k in ("width", "height")) for r in roots]  # pyright: ignore[reportReturnType]


def _good(rng: np.random.Generator) -> list[ElementTree.Element]:
    return [_annotation(number, rng) for number in range(int(rng.integers(1, 4)))]


def _annotation(number: int, rng: np.random.Generator) -> ElementTree.Element:
    width, height = int(rng.integers(20, 64)), int(rng.integers(20, 64))
    objects = []
    for _ in range(int(rng.integers(0 if number else 1, 4))):
        x0, y0 = rng.integers(1, [width - 8, height - 8])
        x1, y1 = rng.integers([x0 + 2, y0 + 2], [width + 1, height + 1])
        objects.append(
            {
                "name": trees.pick(rng, _NAMES),
                "pose": "Unspecified",
                "truncated": 0,
                "difficult": int(rng.random() < 0.2),
                "bndbox": {"xmin": x0, "ymin": y0, "xmax": x1, "ymax": y1},
            }
        )
    return xml_trees.element(
        "annotation",
        {
            "folder": "JPEGImages",
            "filename": f"{number}.jpg",
            "size": {"width": width, "height": height, "depth": 3},
            "segmented": 0,
            "object": objects,
        },
    )
