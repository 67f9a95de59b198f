"""COCO panoptic segmentation: a JSON file, and a folder of PNG files whose colours are segments.

Format: https://cocodataset.org/#format-data, "Panoptic Segmentation".
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines import image_ops
from data_pipelines.features import Category, Names
from data_pipelines.image_ops import UnreadableImage
from data_pipelines.readers import folder, json_fields
from data_pipelines.readers.folder import LabelledImage
from data_pipelines.regions import Regions
from owl_det.errors import DataError

MIN_SIDE = 8  # pixels: a region's box is at least as large as a square of this side
_MAX_ID = 2**31 - 1  # image ids travel as int32
_MAX_SEGMENT = 2**24 - 1  # three bytes a pixel
_MAX_SIDE = 2**16  # pixels; keeps sums of areas far from overflow


class _Segment(NamedTuple):
    id: int
    category_id: int
    box_xyxy: tuple[float, float, float, float]
    is_crowd: bool


class _Name(NamedTuple):
    text: str
    is_thing: bool


class CocoPanopticReader(folder.FolderReader):
    """Images, the boxes of their things, and regions of things and stuff.

    Records are those of a detection data set: boxes of things alone. Stuff in an image counts as
    present but not boxed (`not_exhaustive`). Regions are, as in CLIPSelf's protocol
    (arXiv 2310.01403), all segments whose box is at least as large as 8 x 8 pixels; crowds are left
    out, which the authors' code keeps. Stuff names are made plain (`plain_name`). Implements
    `regions.RegionSource`.
    """

    def __init__(self, annotations: Path, images: Path, segments: Path) -> None:
        """`annotations` is the JSON file, `images` and `segments` (PNG) are folders.

        Raises `DataError` if one is missing, or the file is malformed (field named) or refers to
        an unknown image or category.
        """
        folder.require_folder(segments, "segments")
        content = json_fields.load(annotations)
        names = _names(content, annotations)
        entries = _images(content, annotations)
        found: dict[int, tuple[str, list[_Segment]]] = {}
        for i, entry in enumerate(json_fields.items(content, "annotations", annotations)):
            where = f"{annotations}: annotations[{i}]"
            image_id = json_fields.integer(entry, "image_id", where)
            if image_id not in entries:
                raise DataError(f"{where}.image_id: no image has the id {image_id}")
            if image_id in found:
                raise DataError(f"{where}.image_id: image {image_id} has two annotations")
            file = _file_name(entry, where)
            found[image_id] = file, _segments(entry, names, where)
        missing = [image_id for image_id in entries if image_id not in found]
        if missing:
            raise DataError(f"{annotations}: image {missing[0]} has no entry in annotations")
        self._segment_folder = segments
        self._names = names
        self._segments = [found[image_id] for image_id in entries]
        self._sizes = [(height, width) for _, height, width in entries.values()]
        labelled = []
        dropped, odd = Counter[str](), Counter[str]()
        for image_id, (file, height, width) in entries.items():
            image, proper = _labelled(image_id, file, height, width, found[image_id][1], names)
            labelled.append(image)
            dropped += proper.dropped
            odd += proper.odd
        counts = _counts(self._segments)
        categories = [
            Category(
                id=category_id,
                name=name.text,
                groups=("thing",) if name.is_thing else ("stuff",),
                frequency=float(counts.get(category_id, 0)),
            )
            for category_id, name in names.items()
        ]
        super().__init__(
            "coco_panoptic", annotations.stem, images, labelled, categories, dropped, odd
        )

    def regions(self, index: int) -> Regions:
        """Raises `DataError` if the PNG is missing or damaged or shows other segments than the JSON
        file names, or if one of the two images is of another size than the file says."""
        file, segments = self._segments[index]
        path, size, record = self._segment_folder / file, self._sizes[index], self[index]
        if image_ops.image_size(record.image) != size:
            raise DataError(f"{record.source}: is not of the size that {self.name} gives it")
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
        return Regions(
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


def _names(content: Mapping[str, Any], file: Path) -> dict[int, _Name]:
    """Category id → name, in the order of the file."""
    names: dict[int, _Name] = {}
    for i, entry in enumerate(json_fields.items(content, "categories", file)):
        where = f"{file}: categories[{i}]"
        category_id = json_fields.integer(entry, "id", where)
        name = json_fields.text(entry, "name", where)
        if json_fields.integer(entry, "isthing", where) not in (0, 1):
            raise DataError(f"{where}.isthing: expected 0 or 1, got {entry['isthing']}")
        if category_id in names:
            raise DataError(f"{where}.id: {category_id} is taken already; ids must be unique")
        is_thing = entry["isthing"] == 1
        names[category_id] = _Name(name if is_thing else plain_name(name), is_thing)
    folder.require_distinct([name.text for name in names.values()], str(file))
    return names


def _images(content: Mapping[str, Any], file: Path) -> dict[int, tuple[str, int, int]]:
    """Image id → file name, height, width."""
    images: dict[int, tuple[str, int, int]] = {}
    for i, entry in enumerate(json_fields.items(content, "images", file)):
        where = f"{file}: images[{i}]"
        image_id = json_fields.integer(entry, "id", where)
        if abs(image_id) > _MAX_ID:
            raise DataError(f"{where}.id: does not fit into 32 bits; number the images anew")
        if image_id in images:
            raise DataError(f"{where}.id: {image_id} is taken already; ids must be unique")
        height, width = (json_fields.integer(entry, key, where) for key in ("height", "width"))
        if not (0 < height <= _MAX_SIDE and 0 < width <= _MAX_SIDE):
            raise DataError(f"{where}: height and width go from 1 to {_MAX_SIDE} pixels")
        images[image_id] = _file_name(entry, where), height, width
    return images


def _file_name(entry: Any, where: str) -> str:
    """A file name without folders: files are read from the folder that was named."""
    name = json_fields.text(entry, "file_name", where)
    if not name or Path(name).name != name:
        raise DataError(f"{where}.file_name: expected a file name without folders, got {name!r}")
    return name


def _segments(entry: Any, names: Mapping[int, _Name], where: str) -> list[_Segment]:
    segments: list[_Segment] = []
    for i, info in enumerate(json_fields.items(entry, "segments_info", where)):
        here = f"{where}.segments_info[{i}]"
        segment_id = json_fields.integer(info, "id", here)
        if not 0 < segment_id <= _MAX_SEGMENT:
            raise DataError(f"{here}.id: expected 1 to {_MAX_SEGMENT}, got {segment_id}")
        category_id = json_fields.integer(info, "category_id", here)
        if category_id not in names:
            raise DataError(f"{here}.category_id: no category has the id {category_id}")
        box = json_fields.field(info, "bbox", here)
        if not isinstance(box, list) or len(box) != 4 or not all(map(json_fields.is_number, box)):
            raise DataError(f"{here}.bbox: expected [x, y, width, height], got {box!r}")
        x, y, w, h = (float(number) for number in box)
        if not np.isfinite([x, y, w, h]).all():
            raise DataError(f"{here}.bbox: expected finite numbers, got {box!r}")
        is_crowd = bool(json_fields.integer(info, "iscrowd", here))
        segments.append(_Segment(segment_id, category_id, (x, y, x + w, y + h), is_crowd))
    if len({segment.id for segment in segments}) != len(segments):
        raise DataError(f"{where}.segments_info: two segments have the same id")
    return segments


def _labelled(
    image_id: int,
    file: str,
    height: int,
    width: int,
    segments: Sequence[_Segment],
    names: Mapping[int, _Name],
) -> tuple[LabelledImage, folder.Proper]:
    """The labels of an image, with what was dropped of them."""
    things = [segment for segment in segments if names[segment.category_id].is_thing]
    stuff = [segment for segment in segments if not names[segment.category_id].is_thing]
    proper = folder.keep_proper(
        [segment.box_xyxy for segment in things],
        [names[segment.category_id].text for segment in things],
        [segment.is_crowd for segment in things],
        height,
        width,
    )
    of_stuff = (names[segment.category_id].text for segment in stuff)
    unboxed: Names = (*of_stuff, *proper.not_exhaustive)
    image = LabelledImage(
        files=(file,),
        image_id=image_id,
        boxes_xyxy=proper.boxes_xyxy,
        names=proper.names,
        is_crowd=proper.is_crowd,
        not_exhaustive=tuple(dict.fromkeys(unboxed)),
    )
    return image, proper


def _is_region(segment: _Segment) -> bool:
    x0, y0, x1, y1 = segment.box_xyxy
    return not segment.is_crowd and (x1 - x0) * (y1 - y0) >= MIN_SIDE**2


def _counts(segments: Sequence[tuple[str, list[_Segment]]]) -> dict[int, int]:
    """In how many images each category occurs."""
    counts: dict[int, int] = {}
    for _, found in segments:
        for category_id in {segment.category_id for segment in found}:
            counts[category_id] = counts.get(category_id, 0) + 1
    return counts


def _decode(path: Path, size: tuple[int, int]) -> np.ndarray:
    try:
        return image_ops.decode_segment_ids(path.read_bytes(), size)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; correct the folder of segments") from error
    except UnreadableImage as error:
        raise DataError(f"{path}: {error}; download it again") from error
