"""What a COCO or LVIS annotation file holds, checked entry by entry."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from data_pipelines import names as names_lib
from data_pipelines.readers import json_fields
from data_pipelines.readers.json_fields import Id
from owl_det.errors import DataError

# Why boxes are dropped, and what is odd of others; see `labelled_image`.
NO_OBJECT, NO_IMAGE, NO_CATEGORY = "that are no objects", "without an image", "without a category"
NO_BBOX, BAD_BBOX = "without a bbox", "whose bbox is not four numbers"
REPEATED = "that repeat an annotation, id and all"
BY_POLYGON = "have no bbox: their polygons' extent is taken"
BAD_AREA = "have no usable `area`: that of their box is taken"
_FEW, _FEW_SHARE = 3, 0.1  # annotations that belong nowhere; more are no accident
SHARED_ID = "share the id of another annotation"

_LETTERS = ("r", "c", "f")  # LVIS's frequency: rare, common, frequent
_MAX_AREA = 1e12  # pixels; an area beyond says no more, and stays finite in 32 bits


class ImageEntry(NamedTuple):
    id: Id
    given_id: Any  # as it stands in the file
    fields: Mapping[str, Any]
    where: str


class CategoryEntry(NamedTuple):
    id: Id
    given_id: Any
    name: str  # as it is asked for
    spelled: str  # as it stands in the file
    frequency: str | None  # LVIS's letter


class BoxEntry(NamedTuple):
    index: int  # in annotations
    image_id: Id
    category_id: Id
    corners: tuple[float, float, float, float] | None  # xyxy; None = there is no box to read
    fault: str  # why not
    is_crowd: bool
    area: float  # of the mask, else of the box; pixels


@dataclass(frozen=True, kw_only=True)
class CocoFile:
    """The entries of a file, in its order; all ids that boxes refer to are there."""

    path: Path
    images: Sequence[ImageEntry]
    categories: Sequence[CategoryEntry]
    boxes: Sequence[BoxEntry]
    is_federated: bool  # as LVIS: images say which names are absent
    dropped: Counter[str] = field(default_factory=Counter)  # of no image or category: why → boxes
    odd: Counter[str] = field(default_factory=Counter)  # what → boxes
    examples: dict[str, str] = field(default_factory=dict)  # what, or why dropped → where


def read(path: Path) -> CocoFile:
    """Raises `DataError` if the file is missing or malformed (entry and field named).

    A box that cannot be read is kept with its fault: it says that something is in the image.
    """
    content = json_fields.load(path)
    _refuse_other_kinds(content, path)
    is_federated = _is_federated(content, path)
    images = _images(content, path)
    categories = _categories(content, path, is_federated)
    odd, examples = Counter[str](), dict[str, str]()
    entries = json_fields.items(content, "annotations", path)
    lost = {i: why for i, entry in enumerate(entries) if (why := _why_lost(entry))}
    _require_few(lost, len(entries), path)
    for i, why in lost.items():
        examples.setdefault(why, f"annotations[{i}]")
    boxes = [
        _box(entry, i, path, odd, examples) for i, entry in enumerate(entries) if i not in lost
    ]
    categories = _without_placeholders(content, categories, boxes)
    image_ids, category_ids = {i.id for i in images}, {c.id for c in categories}
    _require_known([box.image_id for box in boxes], image_ids, "image", path)
    _require_known([box.category_id for box in boxes], category_ids, "category", path)
    boxes = _without_repeated(entries, boxes, odd, examples)
    return CocoFile(
        path=path,
        images=images,
        categories=categories,
        boxes=boxes,
        is_federated=is_federated,
        dropped=Counter(lost.values()),
        odd=odd,
        examples=examples,
    )


def plain_name(name: str) -> str:
    """`cup_(drinking)` → `cup drinking`, as the authors' code cleans every text.

    All but letters, digits, dashes and spaces become spaces (`_canonicalize_string_tf` in
    scenic/projects/owl_vit/preprocessing/label_ops.py, which knows ASCII's letters; those of other
    scripts are letters here). A name without any stays as it is. Lower case is the prompts' matter.
    """
    spaced = "".join(c if _is_kept(c) else " " for c in unicodedata.normalize("NFC", name))
    plain = re.sub(r"-+", "-", re.sub(r" +", " ", spaced)).strip()
    return plain or names_lib.plain(name)


def _is_kept(character: str) -> bool:
    if character.isascii():
        return character.isalnum() or character == "-"
    # Letters, marks (vowels of many scripts are marks) and numbers; joiners shape letters.
    return unicodedata.category(character)[0] in "LMN" or character in "\u200c\u200d"


def _refuse_other_kinds(content: Mapping[str, Any], path: Path) -> None:
    """Other files of COCO's family have the same lists with other entries."""
    entries = content.get("annotations")
    first = entries[0] if isinstance(entries, list) and entries else None
    keys = first.keys() if isinstance(first, dict) else set()
    if "segments_info" in keys:
        raise DataError(
            f"{path}: holds panoptic segments (segments_info), no boxes; name COCO's instances file"
        )
    if "caption" in keys and not keys & {"bbox", "category_id"}:
        raise DataError(f"{path}: holds captions, no boxes; name COCO's instances file")


def _is_federated(content: Mapping[str, Any], path: Path) -> bool:
    """True if anything shows that the file is LVIS's; then every image must say what is absent.

    Raises `DataError` where images of such a file lack their lists: without them every name
    without a box would be taken to be absent.
    """
    images = json_fields.items(content, "images", path)
    lists = ("neg_category_ids", "not_exhaustive_category_ids")
    signs = [key for key in lists if any(isinstance(i, dict) and key in i for i in images)]
    for entry in json_fields.items(content, "categories", path):
        if isinstance(entry, dict):
            signs += ["frequency"] if entry.get("frequency") in [*_LETTERS] else []
            signs += ["synset"] if isinstance(entry.get("synset"), str) else []
            signs += ["def"] if {"def", "synonyms"} <= entry.keys() else []
    for key in lists if signs else ():
        lacking = [i for i in images if isinstance(i, dict) and key not in i]
        if lacking:
            shown = " and ".join(f"`{sign}`" for sign in dict.fromkeys(signs))
            raise DataError(
                f"{path}: image {json_fields.shown(lacking[0].get('id'))}: the field {key} is "
                f"missing (in {len(lacking)} of {len(images)} images), and the file is one of LVIS "
                f"(it has {shown}), where images say which names are absent; take LVIS's own file, "
                f"or, if every image is fully annotated, remove {shown}"
            )
    return bool(signs)


def _images(content: Mapping[str, Any], path: Path) -> list[ImageEntry]:
    found: dict[Id, ImageEntry] = {}
    num_repeated = 0
    for i, entry in enumerate(json_fields.items(content, "images", path)):
        where = f"{path}: images[{i}]"
        image_id = json_fields.identifier(entry, "id", where)
        known = found.get(image_id)
        if known is not None and known.fields != entry:
            raise DataError(f"{where}.id: {image_id}: two have the same id; ids must be unique")
        num_repeated += known is not None
        where = f"{path}: image {image_id}"
        found.setdefault(image_id, ImageEntry(image_id, entry["id"], entry, where))
    if num_repeated:
        logging.warning("%s: %d entries of images are there twice; one counts", path, num_repeated)
    return list(found.values())


def _categories(content: Mapping[str, Any], path: Path, is_federated: bool) -> list[CategoryEntry]:
    categories: list[CategoryEntry] = []
    known: set[Id] = set()
    for i, entry in enumerate(json_fields.items(content, "categories", path)):
        where = f"{path}: categories[{i}]"
        category_id = json_fields.identifier(entry, "id", where)
        if category_id in known:
            raise DataError(f"{where}.id: {category_id} is taken already; ids must be unique")
        known.add(category_id)
        spelled = json_fields.text(entry, "name", where)
        letter = entry.get("frequency")
        if isinstance(letter, str) and letter not in _LETTERS:
            raise DataError(f"{where}.frequency: {letter[:60]!r} is not r, c or f")
        categories.append(
            CategoryEntry(
                id=category_id,
                given_id=entry["id"],
                name=plain_name(spelled) if is_federated else names_lib.plain(spelled),
                spelled=spelled,
                frequency=letter if isinstance(letter, str) else None,
            )
        )
    return categories


def _without_placeholders(
    content: Mapping[str, Any], categories: Sequence[CategoryEntry], boxes: Sequence[BoxEntry]
) -> list[CategoryEntry]:
    """The categories without the unused one that Roboflow's exports begin with.

    It is the supercategory of the others and often has the name of one of them.
    """
    parents = [entry.get("supercategory") for entry in content["categories"]]
    named = {parent for parent in parents if isinstance(parent, str)}
    used = {box.category_id for box in boxes}
    return [
        category
        for category, parent in zip(categories, parents, strict=True)
        if parent != "none" or category.id in used or category.spelled not in named
    ]


def _why_lost(entry: Any) -> str:
    """Why an annotation belongs nowhere; empty = it does."""
    if not isinstance(entry, dict):
        return NO_OBJECT
    if entry.get("image_id") is None:
        return NO_IMAGE
    return NO_CATEGORY if entry.get("category_id") is None else ""


def _require_few(lost: Mapping[int, str], total: int, path: Path) -> None:
    if len(lost) > max(_FEW, _FEW_SHARE * total) or (lost and len(lost) == total):
        index, why = next(iter(lost.items()))
        raise DataError(
            f"{path}: annotations[{index}]: {len(lost)} of {total} annotations are so: {why}; "
            "expected objects with image_id, category_id and bbox"
        )


def _box(
    entry: Any, index: int, path: Path, odd: Counter[str], examples: dict[str, str]
) -> BoxEntry:
    where = f"{path}: annotations[{index}]"
    image_id = json_fields.identifier(entry, "image_id", where)
    category_id = json_fields.identifier(entry, "category_id", where)
    corners, fault, note = _corners(entry)
    area = json_fields.number(entry.get("area"))
    if area is None or not 0 <= area < math.inf:
        # Optional in the format; for the library that evaluates it, that of the box.
        area = _box_area(entry, corners)
        note = note or (BAD_AREA if entry.get("area") is not None else "")
    if note and not fault:
        odd[note] += 1
    if fault or note:
        examples.setdefault(fault or note, f"annotations[{index}]")
    is_crowd = json_fields.flag(entry, "iscrowd", where)
    return BoxEntry(index, image_id, category_id, corners, fault, is_crowd, min(area, _MAX_AREA))


def _corners(
    entry: Mapping[str, Any],
) -> tuple[tuple[float, float, float, float] | None, str, str]:
    """The corners of an annotation, why it has none, and what is odd of them."""
    box = entry.get("bbox")
    if box is None or box == []:
        extent = _extent(entry.get("segmentation"))
        return (extent, "", BY_POLYGON) if extent else (None, NO_BBOX, "")
    read = json_fields.numbers(box)
    if read is None or len(read) != 4:
        return None, BAD_BBOX, ""
    x, y, width, height = read
    return (x, y, x + width, y + height), "", ""


def _box_area(entry: Mapping[str, Any], corners: tuple[float, ...] | None) -> float:
    read = json_fields.numbers(entry.get("bbox"))
    if read is not None and len(read) == 4:
        area = read[2] * read[3]
    elif corners is not None:
        area = (corners[2] - corners[0]) * (corners[3] - corners[1])
    else:
        area = 0.0
    return area if area >= 0 else 0.0  # not of boxes that are dropped: NaN and below 0


def _extent(polygons: Any) -> tuple[float, float, float, float] | None:
    """The corners of the box around polygons `[[x, y, x, y, …], …]`; None if they are none."""
    if not isinstance(polygons, list) or not polygons:
        return None
    points: list[float] = []
    for polygon in polygons:
        read = json_fields.numbers(polygon)
        if read is None or len(read) < 6 or len(read) % 2 or not all(map(math.isfinite, read)):
            return None
        points += read
    xs, ys = points[::2], points[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def _require_known(ids: Sequence[Id], known: set[Id], what: str, path: Path) -> None:
    unknown = [i for i, found in enumerate(ids) if found not in known]
    if unknown:
        first = ids[unknown[0]]
        raise DataError(
            f"{path}: annotations[{unknown[0]}].{what}_id: no {what} has the id "
            f"{json_fields.shown(first) if isinstance(first, int) else first} "
            f"({len(unknown)} of {len(ids)} annotations refer to none that is in the file); remove "
            f"these annotations, or add the {what}"
        )


def _without_repeated(
    entries: Sequence[Any], boxes: Sequence[BoxEntry], odd: Counter[str], examples: dict[str, str]
) -> list[BoxEntry]:
    """The boxes, with a fault where id and content are those of an earlier annotation.

    Files that were joined hold annotations twice. Ids play no other part: annotations that only
    share one are all read.
    """
    known: dict[Id, BoxEntry] = {}
    checked: list[BoxEntry] = []
    for box in boxes:
        annotation_id = json_fields.as_id(entries[box.index].get("id"))
        first = known.setdefault(annotation_id, box) if annotation_id is not None else box
        if first is not box:
            same = first._replace(index=box.index) == box
            box = box._replace(corners=None, fault=box.fault or REPEATED) if same else box
            if not same:
                odd[SHARED_ID] += 1
            examples.setdefault(box.fault if same else SHARED_ID, f"annotations[{box.index}]")
        checked.append(box)
    return checked
