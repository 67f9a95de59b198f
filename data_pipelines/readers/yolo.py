"""YOLO: one txt file an image, one box a line."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from jaxtyping import Float32

from data_pipelines import image_ops
from data_pipelines.features import Category, Names
from data_pipelines.readers import folder
from data_pipelines.readers.folder import LabelledImage
from owl_det.errors import DataError


class YoloReader(folder.FolderReader):
    """Images, and boxes relative to them; the annotation is taken to be exhaustive.

    A line is `class cx cy width height`, or `class x1 y1 x2 y2 x3 y3 …`, a polygon whose extent is
    the box. An image without a txt file has no boxes. Folders are searched in depth; labels mirror
    the image folder. An image's id is its position, from 1, in sorted order; a category's id is its
    class number.
    """

    def __init__(self, root: Path, *, labels: str, images: str, names: Names = ()):
        """`labels` and `images` are folders below `root`.

        `names` are the class names by number; empty = read from `data.yaml`, else `classes.txt`,
        in `root`. Raises `DataError` if something is missing or malformed (file and line named), or
        no image has labels.
        """
        image_folder, label_folder = root / images, root / labels
        folder.require_folder(image_folder, "images")
        folder.require_folder(label_folder, "labels")
        names = names or _read_names(root)
        folder.require_distinct(names, f"{root}: names")
        paths = sorted(
            path.relative_to(image_folder)
            for path in image_folder.rglob("*")
            if path.suffix.lower() in folder.IMAGE_SUFFIXES
        )
        if not paths:
            raise DataError(f"{image_folder}: holds no image; correct the key `images`")
        if not any((label_folder / path).with_suffix(".txt").is_file() for path in paths):
            raise DataError(
                f"{label_folder}: holds no label file of any image in {image_folder}, such as "
                f"{paths[0].with_suffix('.txt')}; correct the key `labels`"
            )

        labelled = []
        dropped, odd = Counter[str](), Counter[str]()
        for image_id, path in enumerate(paths, start=1):
            boxes, box_names = _read_labels((label_folder / path).with_suffix(".txt"), names)
            proper = folder.keep_proper(boxes, box_names, [False] * len(boxes), 1, 1)
            dropped += proper.dropped
            odd += proper.odd
            labelled.append(
                LabelledImage(
                    files=(path.as_posix(),),
                    image_id=image_id,
                    boxes_xyxy=proper.boxes_xyxy,
                    names=proper.names,
                    is_crowd=proper.is_crowd,
                    not_exhaustive=proper.not_exhaustive,
                )
            )
        counts = folder.image_counts(labelled, names)
        categories = [
            Category(id=index, name=name, frequency=float(counts[name]))
            for index, name in enumerate(names)
        ]
        super().__init__("yolo", root.name, image_folder, labelled, categories, dropped, odd)

    def _boxes_xyxy(self, labels: LabelledImage, image: bytes) -> Float32[np.ndarray, "m 4"]:
        height, width = image_ops.image_size(image)
        return labels.boxes_xyxy * np.array([width, height, width, height], np.float32)


def _read_names(root: Path) -> Names:
    config, classes = root / "data.yaml", root / "classes.txt"
    if config.is_file():
        return _names_from_yaml(config)
    if classes.is_file():
        lines = folder.read_text(classes, "path").splitlines()
        return tuple(line.strip() for line in lines if line.strip())
    raise DataError(
        f"{root}: has neither data.yaml nor classes.txt; give the class names in the key `names`"
    )


def _names_from_yaml(file: Path) -> Names:
    try:
        content = yaml.safe_load(folder.read_text(file, "path"))
    except yaml.YAMLError as error:
        raise DataError(f"{file}: is not valid YAML: {error}") from error
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise DataError(f"{file}: names: class numbers must run from 0 without gaps")
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{file}: names: expected a list of class names, got {names!r}")
    return tuple(str(name) for name in names)  # YAML reads names such as 7 or `no` as other types


def _read_labels(file: Path, names: Sequence[str]) -> tuple[list[list[float]], list[str]]:
    """Corners relative to the image, and the name of each."""
    boxes, box_names = [], []
    if not file.is_file():
        return boxes, box_names
    for number, line in enumerate(folder.read_text(file, "labels").splitlines(), start=1):
        columns = line.split()
        if not columns:
            continue
        where = f"{file}: line {number}"
        boxes.append(_corners(_numbers(columns[1:], where), where))
        box_names.append(_name(columns[0], names, where))
    return boxes, box_names


def _numbers(columns: Sequence[str], where: str) -> list[float]:
    try:
        values = [float(column) for column in columns]
    except ValueError as error:
        raise DataError(f"{where}: expected numbers after the class: {error}") from error
    if not all(map(math.isfinite, values)):
        raise DataError(f"{where}: a coordinate is not finite")
    return values


def _corners(values: Sequence[float], where: str) -> list[float]:
    if len(values) == 4:
        cx, cy, width, height = values
        return [cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2]
    if len(values) < 6 or len(values) % 2:
        raise DataError(
            f"{where}: expected `class cx cy width height` or `class` and at least three points, "
            f"got {len(values) + 1} columns"
        )
    xs, ys = values[0::2], values[1::2]
    return [min(xs), min(ys), max(xs), max(ys)]


def _name(column: str, names: Sequence[str], where: str) -> str:
    if not column.isdecimal() or int(column) >= len(names):
        raise DataError(
            f"{where}: the class {column!r} is not a number from 0 to {len(names) - 1}; "
            "mend the line or complete the key `names`"
        )
    return names[int(column)]
