"""COCO JSON, and LVIS JSON whose federated fields are honoured."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.features import Category, Names
from data_pipelines.readers import folder
from data_pipelines.readers.folder import LabelledImage
from data_pipelines.readers.json_fields import field as _field
from data_pipelines.readers.json_fields import integer as _integer
from data_pipelines.readers.json_fields import is_number as _is_number
from data_pipelines.readers.json_fields import items as _list
from data_pipelines.readers.json_fields import load as _load
from data_pipelines.readers.json_fields import text as _text
from owl_det.errors import DataError

# In open-vocabulary training on LVIS the boxes of rare categories are left out: they are novel.
_GROUPS = {"r": ("rare", "novel"), "c": ("common", "base"), "f": ("frequent", "base")}
_MAX_ID = 2**31 - 1  # image ids travel as int32


class CocoReader(folder.FolderReader):
    """Images and boxes of a COCO or LVIS annotation file.

    Where images have `neg_category_ids` (LVIS) only those names are negatives; otherwise the
    annotation is taken to be exhaustive and every name without a box is a negative. LVIS names are
    made plain (`plain_name`), and its categories belong to the groups rare and novel, common and
    base, or frequent and base. Boxes `[x, y, width, height]` become corners, clipped to the image.
    A category's `frequency` is the number of images it is boxed in.
    """

    def __init__(
        self,
        annotations: Path,
        images: Path,
        *,
        groups: Mapping[str, Names] | None = None,
        without_rare: bool = False,
        captions: Path | None = None,
    ):
        """`annotations` is the JSON file, `images` the folder that its file names refer to.

        `groups` are those of the categories to keep; the others, their boxes, and images without
        any box of the categories kept are left out. None = keep all. `without_rare` leaves LVIS's
        rare categories out, with their boxes and wherever an image names them. `captions` is COCO's
        captions JSON; of images that are not in `annotations` its texts are not read.

        Raises `DataError` if either is missing, the file is malformed (field named), an annotation
        refers to an unknown image or category, or a category to keep is not in the file.
        """
        content = _without_placeholders(_load(annotations), annotations)
        if groups is not None:
            content = _restrict(content, groups, annotations)
        if without_rare:
            content = _without_rare(content, annotations)
        entries = {
            _integer(entry, "id", f"{annotations}: images[{i}]"): entry
            for i, entry in enumerate(_list(content, "images", annotations))
        }
        if len(entries) != len(content["images"]):
            raise DataError(f"{annotations}: images: two have the same id; ids must be unique")
        is_federated = any("neg_category_ids" in entry for entry in entries.values())
        names = _names(content, annotations, is_federated)
        boxed = _by_image(content, annotations, entries, names)

        texts = _captions(captions) if captions else {}
        if captions and not texts.keys() & entries.keys():
            raise DataError(f"{captions}: holds no caption of an image of {annotations}")
        labelled = []
        total, odd = Counter[str](), Counter[str]()
        for image_id, entry in entries.items():
            image, proper = _labelled(
                entry, boxed.get(image_id, ()), names, is_federated, annotations
            )
            labelled.append(dataclasses.replace(image, captions=texts.get(image_id, ())))
            total += proper.dropped
            odd += proper.odd
        categories = _categories(content, annotations, names, labelled, groups or {})
        super().__init__(
            "lvis" if is_federated else "coco",
            annotations.stem,
            images,
            labelled,
            categories,
            total,
            odd,
        )


def _captions(file: Path) -> dict[int, tuple[str, ...]]:
    """The texts of a captions file of COCO, by image id."""
    found: dict[int, tuple[str, ...]] = {}
    for i, entry in enumerate(_list(_load(file), "annotations", file)):
        where = f"{file}: annotations[{i}]"
        image_id, text = _integer(entry, "image_id", where), _text(entry, "caption", where).strip()
        if text:
            found[image_id] = (*found.get(image_id, ()), text)
    return found


def plain_name(name: str) -> str:
    """`cup_(drinking)` → `cup drinking`, as the authors' code cleans every text.

    All but letters, digits, dashes and spaces become spaces (`_canonicalize_string_tf` in
    scenic/projects/owl_vit/preprocessing/label_ops.py). Lower case is the prompts' matter.
    """
    plain = re.sub(r"[^A-Za-z0-9-]+", " ", name)
    return re.sub(r"-+", "-", plain).strip()


def _without_placeholders(content: dict[str, Any], file: Path) -> dict[str, Any]:
    """The content without the unused category 0 that Roboflow's exports begin with.

    It is the supercategory of the others and often has the name of one of them.
    """
    entries = list(_list(content, "categories", file))
    parents = {e.get("supercategory") for e in entries if isinstance(e, dict)}
    used = {
        entry.get("category_id")
        for entry in _list(content, "annotations", file)
        if isinstance(entry, dict)
    }
    kept = [
        e
        for e in entries
        if not isinstance(e, dict)
        or e.get("supercategory") != "none"
        or e.get("id") in used
        or e.get("name") not in parents
    ]
    return {**content, "categories": kept}


def _without_rare(content: dict[str, Any], file: Path) -> dict[str, Any]:
    """The content of an LVIS file without rare categories and whatever refers to them."""
    categories = list(_list(content, "categories", file))
    if not all(isinstance(e, dict) and e.get("frequency") in _GROUPS for e in categories):
        raise DataError(
            f"{file}: categories: `frequency` (r, c, f) is missing; lvis_base needs an LVIS file"
        )
    rare = {entry.get("id") for entry in categories if entry["frequency"] == "r"}
    named = ("neg_category_ids", "not_exhaustive_category_ids")

    def without(entry: Any) -> Any:
        if not isinstance(entry, dict):
            return entry
        return entry | {
            key: [i for i in entry[key] if i not in rare]
            for key in named
            if isinstance(entry.get(key), list)
        }

    return {
        **content,
        "images": [without(entry) for entry in _list(content, "images", file)],
        "annotations": [
            entry
            for entry in _list(content, "annotations", file)
            if not isinstance(entry, dict) or entry.get("category_id") not in rare
        ],
        "categories": [entry for entry in categories if entry.get("id") not in rare],
    }


def _restrict(content: dict[str, Any], groups: Mapping[str, Names], file: Path) -> dict[str, Any]:
    """The content without what does not belong to the categories in `groups`."""
    names: dict[int, str] = {
        _integer(entry, "id", f"{file}: categories[{i}]"): _field(
            entry, "name", f"{file}: categories[{i}]"
        )
        for i, entry in enumerate(_list(content, "categories", file))
    }
    missing = [name for name in groups if name not in names.values()]
    if missing:
        raise DataError(
            f"{file}: categories: {missing[0]!r} is missing; its benchmark needs the annotations "
            "of COCO with the original 80 names"
        )
    boxes = [
        entry
        for i, entry in enumerate(_list(content, "annotations", file))
        if names.get(_integer(entry, "category_id", f"{file}: annotations[{i}]")) in groups
    ]
    shown = {
        _integer(entry, "image_id", f"{file}: annotations[{i}]") for i, entry in enumerate(boxes)
    }
    return {
        "images": [
            entry
            for i, entry in enumerate(_list(content, "images", file))
            if _integer(entry, "id", f"{file}: images[{i}]") in shown
        ],
        "annotations": boxes,
        "categories": [entry for entry in content["categories"] if entry["name"] in groups],
    }


class _Box(NamedTuple):
    xywh: list[float]
    name: str
    is_crowd: bool
    area: float  # of the mask, else of the box; pixels


def _names(content: Mapping[str, Any], file: Path, is_federated: bool) -> dict[int, str]:
    """Category id → name, in the order of the file."""
    names: dict[int, str] = {}
    for i, entry in enumerate(_list(content, "categories", file)):
        where = f"{file}: categories[{i}]"
        category_id, name = _integer(entry, "id", where), _field(entry, "name", where)
        if not isinstance(name, str):
            raise DataError(f"{where}.name: expected text, got {name!r}")
        if category_id in names:
            raise DataError(f"{where}.id: {category_id} is taken already; ids must be unique")
        names[category_id] = plain_name(name) if is_federated else name
    folder.require_distinct(names.values(), str(file))
    return names


def _categories(
    content: Mapping[str, Any],
    file: Path,
    names: Mapping[int, str],
    labelled: Sequence[LabelledImage],
    given_groups: Mapping[str, Names],
) -> list[Category]:
    counts = folder.image_counts(labelled, names.values())
    categories = []
    for i, entry in enumerate(content["categories"]):
        groups = given_groups.get(entry["name"], ())
        if "frequency" in entry:
            letter = entry["frequency"]
            if letter not in _GROUPS:
                raise DataError(f"{file}: categories[{i}].frequency: {letter!r} is not r, c or f")
            groups = _GROUPS[letter]
        name = names[entry["id"]]
        categories.append(
            Category(id=entry["id"], name=name, groups=groups, frequency=float(counts[name]))
        )
    return categories


def _by_image(
    content: Mapping[str, Any],
    file: Path,
    images: Mapping[int, Any],
    names: Mapping[int, str],
) -> dict[int, list[_Box]]:
    """Image id → its boxes."""
    boxed: dict[int, list[_Box]] = {}
    for i, entry in enumerate(_list(content, "annotations", file)):
        where = f"{file}: annotations[{i}]"
        image_id, category_id = (
            _integer(entry, "image_id", where),
            _integer(entry, "category_id", where),
        )
        if image_id not in images:
            raise DataError(f"{where}.image_id: no image has the id {image_id}")
        if category_id not in names:
            raise DataError(f"{where}.category_id: no category has the id {category_id}")
        box = _field(entry, "bbox", where)
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise DataError(f"{where}.bbox: expected [x, y, width, height], got {box!r}")
        is_crowd = bool(entry.get("iscrowd", 0))  # optional in the format: LVIS has no crowds
        area = entry.get("area", box[2] * box[3])  # optional too
        if not _is_number(area) or not 0 <= area < math.inf:
            raise DataError(f"{where}.area: expected a number of pixels, got {area!r}")
        boxed.setdefault(image_id, []).append(_Box(box, names[category_id], is_crowd, area))
    return boxed


def _labelled(
    entry: Mapping[str, Any],
    boxed: Sequence[_Box],
    names: Mapping[int, str],
    is_federated: bool,
    file: Path,
) -> tuple[LabelledImage, folder.Proper]:
    """The labels of an image, with what was dropped of them."""
    where = f"{file}: image {entry['id']}"
    if abs(entry["id"]) > _MAX_ID:
        raise DataError(f"{where}: id does not fit into 32 bits; number the images anew")
    height, width = _integer(entry, "height", where), _integer(entry, "width", where)
    corners = np.array([(x, y, x + w, y + h) for (x, y, w, h), *_ in boxed]).reshape(-1, 4)
    proper = folder.keep_proper(
        corners, [box.name for box in boxed], [box.is_crowd for box in boxed], height, width
    )
    negatives, not_exhaustive = None, ()
    if is_federated:
        negatives = _named(_field(entry, "neg_category_ids", where), names, where)
        partial = _field(entry, "not_exhaustive_category_ids", where)
        not_exhaustive = _named(partial, names, where)
    image = LabelledImage(
        files=_files(entry, where),
        image_id=entry["id"],
        boxes_xyxy=proper.boxes_xyxy,
        names=proper.names,
        is_crowd=proper.is_crowd,
        negatives=negatives,
        not_exhaustive=(*not_exhaustive, *proper.not_exhaustive),
        areas=np.array([box.area for box in boxed], np.float32)[proper.is_kept],
    )
    return image, proper


def _files(entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Where the image may be.

    LVIS 1 has only `coco_url`, whose tail is `<folder>/<file>`; LVIS 0.5 has file names of COCO
    2014 although its images are those of 2017.
    """
    files = [entry["file_name"]] if isinstance(entry.get("file_name"), str) else []
    if isinstance(entry.get("coco_url"), str):
        *_, parent, file = ("", *entry["coco_url"].split("/"))
        files += [file, f"{parent}/{file}"]
    if not files:
        raise DataError(f"{where}: has neither file_name nor coco_url")
    return tuple(dict.fromkeys(files))


def _named(ids: Any, names: Mapping[int, str], where: str) -> Names:
    if not isinstance(ids, list):
        raise DataError(f"{where}: expected a list of category ids, got {ids!r}")
    unknown = [i for i in ids if i not in names]
    if unknown:
        raise DataError(f"{where}: no category has the id {unknown[0]}")
    return tuple(names[i] for i in ids)
