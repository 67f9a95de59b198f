"""COCO panoptic segmentation: a JSON file, and a folder of PNG files whose colours are segments.

Format: https://cocodataset.org/#format-data, "Panoptic Segmentation".
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from data_pipelines import image_ops
from data_pipelines import names as names_lib
from data_pipelines.features import Category
from data_pipelines.image_ops import UnreadableImage
from data_pipelines.named_regions import NamedRegions
from data_pipelines.readers import folder, json_fields
from data_pipelines.readers.folder import LabelledImage
from data_pipelines.readers.json_fields import Id
from data_pipelines.readers.labelled_image import Size
from owl_det import files
from owl_det.errors import DataError

MIN_SIDE = 8  # pixels: a region's box is at least as large as a square of this side
_MAX_SEGMENT = 2**24 - 1  # three bytes a pixel
_MAX_SIDE = 2**16  # pixels; keeps sums of areas far from overflow
_NO_BOX = "whose bbox is missing or no four finite numbers"


class _Segment(NamedTuple):
    id: int
    category_id: Id
    box_xyxy: tuple[float, float, float, float] | None  # None = none that can be read
    is_crowd: bool


class _Name(NamedTuple):
    given_id: Any  # of the category, as it stands in the file
    text: str
    spelled: str  # in versions of the data set
    is_thing: bool


class CocoPanopticReader(folder.FolderReader):
    """Images, the boxes of their things, and regions of things and stuff.

    Records are those of a detection data set: boxes of things alone. Stuff in an image counts as
    present but not boxed (`not_exhaustive`). Regions are, as in CLIPSelf's protocol
    (arXiv 2310.01403), all segments whose box is at least as large as 8 x 8 pixels; crowds are left
    out, which the authors' code keeps. Stuff names are made plain (`plain_name`). Implements
    `named_regions.RegionSource`.
    """

    def __init__(self, annotations: Path, images: Path, segments: Path) -> None:
        """`annotations` is the JSON file, `images` and `segments` (PNG) are folders.

        Raises `DataError` if one is missing, or the file is malformed (field named) or refers to
        an unknown image or category.
        """
        folder.require_folder(segments, "segments")
        content = json_fields.load(annotations)
        _require_segments(content, annotations)
        names = _names(content, annotations)
        entries = _images(content, annotations)
        found = _annotations(content, entries, names, annotations)
        self._segment_folder = segments
        self._names = names
        self._segments = [found[image_id] for image_id in entries]
        self._stated = [size for *_, size in entries.values()]
        numbers = json_fields.number_ids(entries, 0)
        labelled = []
        dropped, odd, num_stuff = Counter[str](), Counter[str](), 0
        for image_id, (given, file, size) in entries.items():
            of_image = found[image_id][1]
            image, proper = _labelled(numbers[image_id], given, file, size, of_image, names)
            labelled.append(image)
            dropped += proper.dropped
            dropped[_NO_BOX] += _num_unboxed(of_image, names, is_thing=True)
            num_stuff += _num_unboxed(of_image, names, is_thing=False)
            odd += proper.odd
        if num_stuff:
            logging.warning(
                "%s: %d segments of stuff, %s, are no regions", annotations, num_stuff, _NO_BOX
            )
        super().__init__(
            "coco_panoptic",
            annotations.stem,
            images,
            labelled,
            _categories(names, self._segments),
            +dropped,
            odd,
            spelled={n.text: n.spelled for n in names.values() if n.text != n.spelled},
        )

    def regions(self, index: int) -> NamedRegions:
        """Raises `DataError` if the PNG is missing or damaged or shows other segments than the JSON
        file names, or if one of the two images is of another size than the file says."""
        file, segments = self._segments[index]
        path, stated, record = self._segment_folder / file, self._stated[index], self[index]
        size = image_ops.image_size(record.image)
        if stated is not None and size != stated:
            raise DataError(
                f"{record.source}: is not of the size that {self.name} gives it: {size[1]} x "
                f"{size[0]} pixels, not {stated[1]} x {stated[0]}"
            )
        ids = _decode(path, size)
        shown = set(np.unique(ids).tolist()) - {0}
        for segment_id in sorted(shown ^ {segment.id for segment in segments}):
            places = ("the PNG", "the JSON file")
            has, lacks = places if segment_id in shown else reversed(places)
            raise DataError(f"{path}: segment {segment_id} is in {has} but not in {lacks}")
        chosen = [segment for segment in segments if _is_region(segment)]
        rows = np.full(len(segments) + 1, -1, np.int32)
        order = np.array([0, *sorted(shown)])
        for row, segment in enumerate(chosen):
            rows[np.searchsorted(order, segment.id)] = row
        named = [self._names[segment.category_id] for segment in chosen]
        present = (self._names[segment.category_id].text for segment in segments)
        return NamedRegions(
            size=size,
            boxes_xyxy=np.array([s.box_xyxy for s in chosen], np.float32).reshape(-1, 4),
            names=tuple(name.text for name in named),
            is_thing=np.array([name.is_thing for name in named], bool),
            segments=rows[np.searchsorted(order, ids)],
            present=tuple(dict.fromkeys(present)),
        )


def plain_name(name: str) -> str:
    """A name of COCO's stuff as people say it: `wall-other-merged` → `wall`, `wall-brick` →
    `wall brick`."""
    plain = re.sub(r"(-other|-stuff|-merged)+$", "", name)
    return plain.replace("-", " ") or name


def _require_segments(content: Mapping[str, Any], file: Path) -> None:
    entries = content.get("annotations")
    first = entries[0] if isinstance(entries, list) and entries else {}
    if isinstance(first, dict) and "segments_info" not in first and {"bbox", "caption"} & {*first}:
        raise DataError(f"{file}: holds boxes or captions, no segments; name COCO's panoptic file")


def _names(content: Mapping[str, Any], file: Path) -> dict[Id, _Name]:
    """Category id → name, in the order of the file."""
    found: dict[Id, _Name] = {}
    for i, entry in enumerate(json_fields.items(content, "categories", file)):
        where = f"{file}: categories[{i}]"
        category_id = json_fields.identifier(entry, "id", where)
        spelled = json_fields.text(entry, "name", where)
        if json_fields.field(entry, "isthing", where) in (None, ""):
            raise DataError(f"{where}.isthing: expected 0 or 1, got {entry['isthing']!r}")
        is_thing = json_fields.flag(entry, "isthing", where)
        if category_id in found:
            raise DataError(f"{where}.id: {category_id} is taken already; ids must be unique")
        spelled = spelled if is_thing else plain_name(spelled)
        text = names_lib.plain(spelled)
        found[category_id] = _Name(entry["id"], text, spelled, is_thing)
    names_lib.require_distinct([name.spelled for name in found.values()], str(file))
    return found


def _images(content: Mapping[str, Any], file: Path) -> dict[Id, tuple[Any, str, Size | None]]:
    """Image id → id as it stands in the file, file name, height and width (None = not said)."""
    images: dict[Id, tuple[Any, str, Size | None]] = {}
    for i, entry in enumerate(json_fields.items(content, "images", file)):
        where = f"{file}: images[{i}]"
        image_id = json_fields.identifier(entry, "id", where)
        if image_id in images:
            raise DataError(f"{where}.id: {image_id} is taken already; ids must be unique")
        size = json_fields.size(entry)
        if size and max(size) > _MAX_SIDE:
            raise DataError(f"{where}: height and width go from 1 to {_MAX_SIDE} pixels")
        images[image_id] = entry["id"], _file_name(entry, where), size
    return images


def _annotations(
    content: Mapping[str, Any], images: Collection[Id], names: Mapping[Id, _Name], file: Path
) -> dict[Id, tuple[str, list[_Segment]]]:
    """Image id → PNG file and segments; every image has one entry."""
    found: dict[Id, tuple[str, list[_Segment]]] = {}
    for i, entry in enumerate(json_fields.items(content, "annotations", file)):
        where = f"{file}: annotations[{i}]"
        image_id = json_fields.identifier(entry, "image_id", where)
        if image_id not in images:
            raise DataError(f"{where}.image_id: no image has the id {image_id}")
        if image_id in found:
            raise DataError(f"{where}.image_id: image {image_id} has two annotations")
        png = _file_name(entry, where)
        found[image_id] = png, _segments(entry, names, where)
    missing = [image_id for image_id in images if image_id not in found]
    if missing:
        raise DataError(f"{file}: image {missing[0]} has no entry in annotations")
    return found


def _file_name(entry: Any, where: str) -> str:
    """A file name without folders: files are read from the folder that was named."""
    name = json_fields.text(entry, "file_name", where)
    if not name or Path(name).name != name:
        raise DataError(f"{where}.file_name: expected a file name without folders, got {name!r}")
    return name


def _segments(entry: Any, names: Mapping[Id, _Name], where: str) -> list[_Segment]:
    segments: list[_Segment] = []
    for i, info in enumerate(json_fields.items(entry, "segments_info", where)):
        here = f"{where}.segments_info[{i}]"
        segment_id = json_fields.integer(info, "id", here)
        if not 0 < segment_id <= _MAX_SEGMENT:
            raise DataError(f"{here}.id: expected 1 to {_MAX_SEGMENT}, got {segment_id}")
        category_id = json_fields.identifier(info, "category_id", here)
        if category_id not in names:
            raise DataError(f"{here}.category_id: no category has the id {category_id}")
        is_crowd = json_fields.flag(info, "iscrowd", here)
        segments.append(_Segment(segment_id, category_id, _corners(info), is_crowd))
    if len({segment.id for segment in segments}) != len(segments):
        raise DataError(f"{where}.segments_info: two segments have the same id")
    return segments


def _corners(info: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    numbers = json_fields.numbers(info.get("bbox"))
    if numbers is None or len(numbers) != 4:
        return None
    x, y, width, height = numbers
    corners = x, y, x + width, y + height
    return corners if all(map(math.isfinite, corners)) else None


def _num_unboxed(segments: Sequence[_Segment], names: Mapping[Id, _Name], *, is_thing: bool) -> int:
    """How many segments of things, or of stuff, have no box, so that they are no regions."""
    without = [segment for segment in segments if segment.box_xyxy is None]
    return sum(names[segment.category_id].is_thing == is_thing for segment in without)


def _labelled(
    image_id: int,
    given_id: Any,
    file: str,
    size: Size | None,
    segments: Sequence[_Segment],
    names: Mapping[Id, _Name],
) -> tuple[LabelledImage, folder.Proper]:
    """The labels of an image, with what was dropped of them."""
    things = [segment for segment in segments if names[segment.category_id].is_thing]
    boxed = [segment for segment in things if segment.box_xyxy is not None]
    stuff = [segment for segment in segments if not names[segment.category_id].is_thing]
    faulty = [segment for segment in things if segment.box_xyxy is None]
    image, proper = folder.labelled(
        files=(file,),
        image_id=image_id,
        boxes_xyxy=np.array([segment.box_xyxy for segment in boxed], np.float64),
        names=[names[segment.category_id].text for segment in boxed],
        is_crowd=[segment.is_crowd for segment in boxed],
        size=size,
        not_exhaustive=tuple(names[segment.category_id].text for segment in (*stuff, *faulty)),
        given_id=None if given_id == image_id else given_id,
    )
    unboxed = tuple(dict.fromkeys(image.not_exhaustive))
    return dataclasses.replace(image, not_exhaustive=unboxed), proper


def _is_region(segment: _Segment) -> bool:
    if segment.is_crowd or segment.box_xyxy is None:
        return False
    x0, y0, x1, y1 = segment.box_xyxy
    return (x1 - x0) * (y1 - y0) >= MIN_SIDE**2


def _categories(
    names: Mapping[Id, _Name], segments: Sequence[tuple[str, list[_Segment]]]
) -> list[Category]:
    """With the number of images that each occurs in."""
    counts: Counter[Id] = Counter()
    for _, found in segments:
        counts.update({segment.category_id for segment in found})
    numbers = json_fields.number_ids(names, -(2**31) + 1)
    return [
        Category(
            id=numbers[category_id],
            name=name.text,
            groups=("thing",) if name.is_thing else ("stuff",),
            frequency=float(counts[category_id]),
            given_id=None if name.given_id == numbers[category_id] else name.given_id,
        )
        for category_id, name in names.items()
    ]


def _decode(path: Path, size: tuple[int, int]) -> np.ndarray:
    try:
        return image_ops.decode_segment_ids(files.read_bytes(path), size)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; correct the folder of segments") from error
    except UnreadableImage as error:
        raise DataError(f"{path}: {error}; download it again") from error
