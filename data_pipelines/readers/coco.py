"""COCO JSON, and LVIS JSON whose federated fields are honoured."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from data_pipelines import garbage_collection
from data_pipelines import names as names_lib
from data_pipelines.features import Category, Names
from data_pipelines.readers import coco_file, folder, json_fields, labelled_image
from data_pipelines.readers.coco_file import BoxEntry, CocoFile, ImageEntry
from data_pipelines.readers.coco_file import plain_name as plain_name
from data_pipelines.readers.folder import LabelledImage
from data_pipelines.readers.json_fields import Id
from data_pipelines.readers.labelled_image import Proper
from owl_det.errors import DataError

# In open-vocabulary training on LVIS the boxes of rare categories are left out: they are novel.
_AGAIN = (coco_file.REPEATED,)  # what they say is said already
_GROUPS = {"r": ("rare", "novel"), "c": ("common", "base"), "f": ("frequent", "base")}


class CocoReader(folder.FolderReader):
    """Images and boxes of a COCO or LVIS annotation file.

    In a file of LVIS (images have `neg_category_ids`) only those names are negatives; otherwise the
    annotation is taken to be exhaustive and every name without a box is a negative. LVIS names are
    made plain (`plain_name`), and its categories belong to the groups rare and novel, common and
    base, or frequent and base. Boxes `[x, y, width, height]` become corners, clipped to the image.
    A category's `frequency` is the number of images it is boxed in.
    """

    @garbage_collection.paused()
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
        content = coco_file.read(annotations)
        if groups is not None:
            content = _restrict(content, groups)
        if without_rare:
            content = _without_rare(content)
        names = _names(content)
        texts = _captions(captions) if captions else {}
        if captions and not texts.keys() & {image.id for image in content.images}:
            raise DataError(f"{captions}: holds no caption of an image of {annotations}")
        labelled, dropped, odd, examples = _label(content, names, texts)
        _warn_of_shared_files(annotations.stem, labelled)
        super().__init__(
            "lvis" if content.is_federated else "coco",
            annotations.stem,
            images,
            labelled,
            _categories(content, labelled, groups or {}),
            dropped,
            odd,
            examples=examples,
            spelled={}
            if content.is_federated
            else {c.name: c.spelled for c in content.categories if c.name != c.spelled},
        )
        self._count_images_anew()


def _captions(file: Path) -> dict[Id, tuple[str, ...]]:
    """The texts of a captions file of COCO, by image id."""
    found: dict[Id, tuple[str, ...]] = {}
    for i, entry in enumerate(json_fields.items(json_fields.load(file), "annotations", file)):
        where = f"{file}: annotations[{i}]"
        image_id = json_fields.identifier(entry, "image_id", where)
        text = json_fields.text(entry, "caption", where).strip()
        if text:
            found[image_id] = (*found.get(image_id, ()), text)
    return found


def _without_rare(content: CocoFile) -> CocoFile:
    """The content of an LVIS file without rare categories and whatever refers to them."""
    if not all(category.frequency for category in content.categories):
        raise DataError(
            f"{content.path}: categories: `frequency` (r, c, f) is missing; lvis_base needs an "
            "LVIS file"
        )
    rare = {category.id for category in content.categories if category.frequency == "r"}

    def without(image: ImageEntry) -> ImageEntry:
        fields = {
            key: [i for i in value if json_fields.as_id(i) not in rare]
            if key in ("neg_category_ids", "not_exhaustive_category_ids")
            and isinstance(value, list)
            else value
            for key, value in image.fields.items()
        }
        return image._replace(fields=fields)

    return dataclasses.replace(
        content,
        images=[without(image) for image in content.images],
        boxes=[box for box in content.boxes if box.category_id not in rare],
        categories=[category for category in content.categories if category.id not in rare],
    )


def _restrict(content: CocoFile, groups: Mapping[str, Names]) -> CocoFile:
    """The content without what does not belong to the categories in `groups`."""
    known = {category.name for category in content.categories}
    missing = [name for name in groups if name not in known]
    if missing:
        raise DataError(
            f"{content.path}: categories: {missing[0]!r} is missing; its benchmark needs the "
            "annotations of COCO with the original 80 names"
        )
    categories = [category for category in content.categories if category.name in groups]
    ids = {category.id for category in categories}
    boxes = [box for box in content.boxes if box.category_id in ids]
    shown = {box.image_id for box in boxes}
    return dataclasses.replace(
        content,
        images=[image for image in content.images if image.id in shown],
        boxes=boxes,
        categories=categories,
    )


def _names(content: CocoFile) -> dict[Id, str]:
    """Category id → name, in the order of the file."""
    spelled = [c.name if content.is_federated else c.spelled for c in content.categories]
    names_lib.require_distinct(spelled, str(content.path))
    return {category.id: category.name for category in content.categories}


def _categories(
    content: CocoFile, labelled: Sequence[LabelledImage], given_groups: Mapping[str, Names]
) -> list[Category]:
    counts = folder.image_counts(labelled, [category.name for category in content.categories])
    numbers = json_fields.number_ids([c.id for c in content.categories], -(2**31) + 1)
    return [
        Category(
            id=numbers[category.id],
            name=category.name,
            groups=_GROUPS[category.frequency]
            if category.frequency
            else given_groups.get(category.name, ()),
            frequency=float(counts[category.name]),
            given_id=_other_id(category.given_id, numbers[category.id]),
        )
        for category in content.categories
    ]


def _label(
    content: CocoFile, names: Mapping[Id, str], texts: Mapping[Id, tuple[str, ...]]
) -> tuple[list[LabelledImage], Counter[str], Counter[str], dict[str, str]]:
    """All images, what of them was dropped and what is odd, and where one of each is."""
    boxed: dict[Id, list[BoxEntry]] = {}
    for box in content.boxes:
        boxed.setdefault(box.image_id, []).append(box)
    numbers = json_fields.number_ids([image.id for image in content.images], 0)
    dropped, odd, examples = content.dropped.copy(), content.odd.copy(), dict(content.examples)
    images = []
    for entry in content.images:
        boxes = boxed.get(entry.id, [])
        image, proper = _labelled(
            entry, boxes, names, content.is_federated, numbers[entry.id], texts.get(entry.id, ())
        )
        images.append(image)
        dropped.update([box.fault for box in boxes if box.fault])
        dropped.update(proper.dropped)
        odd.update(proper.odd)
        odd[labelled_image.TWICE] += labelled_image.num_twice(
            [(box.category_id, box.corners, box.is_crowd) for box in boxes if box.corners]
        )
        if proper.dropped or proper.odd:
            _note_examples([box for box in boxes if box.corners], proper, image, examples)
    return images, dropped, odd, examples


def _note_examples(
    boxes: Sequence[BoxEntry], proper: Proper, image: LabelledImage, examples: dict[str, str]
) -> None:
    for box, is_kept in zip(boxes, proper.is_kept.tolist(), strict=True):
        if not is_kept and box.corners:
            (reason,) = labelled_image.reasons(np.array([box.corners]))
            examples.setdefault(reason, f"annotations[{box.index}]")
    for what in proper.odd:
        examples.setdefault(what, f"one of {image.files[0]}")


def _labelled(
    entry: ImageEntry,
    boxes: Sequence[BoxEntry],
    names: Mapping[Id, str],
    is_federated: bool,
    image_id: int,
    captions: tuple[str, ...],
) -> tuple[LabelledImage, Proper]:
    """The labels of an image, with what was dropped of them."""
    read = [box for box in boxes if box.corners is not None]
    negatives, not_exhaustive = None, ()
    if is_federated:
        negatives = _named(entry, "neg_category_ids", names)
        not_exhaustive = _named(entry, "not_exhaustive_category_ids", names)
    faulty = [names[box.category_id] for box in boxes if box.fault and box.fault not in _AGAIN]
    return folder.labelled(
        files=_files(entry),
        image_id=image_id,
        boxes_xyxy=np.array([box.corners for box in read], np.float64).reshape(-1, 4),
        names=[names[box.category_id] for box in read],
        is_crowd=[box.is_crowd for box in read],
        size=json_fields.size(entry.fields),
        areas=np.array([box.area for box in read], np.float32),
        negatives=negatives,
        not_exhaustive=(*not_exhaustive, *faulty),
        captions=captions,
        given_id=_other_id(entry.given_id, image_id),
    )


def _other_id(given: Any, number: int) -> int | float | str | None:
    """The id of the file where results must name it because it is not `number`."""
    return None if given == number else given


def _files(entry: ImageEntry) -> tuple[str, ...]:
    """Where the image may be.

    LVIS 1 has only `coco_url`, whose tail is `<folder>/<file>`; LVIS 0.5 has file names of COCO
    2014 although its images are those of 2017.
    """
    fields = entry.fields
    named = isinstance(fields.get("file_name"), str) and fields["file_name"]
    files = [json_fields.text(fields, "file_name", entry.where)] if named else []
    if isinstance(fields.get("coco_url"), str) and fields["coco_url"]:
        *_, parent, file = ("", *fields["coco_url"].split("/"))
        files += [file, f"{parent}/{file}"]
    if not files:
        raise DataError(f"{entry.where}: has neither file_name nor coco_url")
    return tuple(dict.fromkeys(files))


def _named(entry: ImageEntry, key: str, names: Mapping[Id, str]) -> Names:
    given = json_fields.items(entry.fields, key, entry.where)
    ids = [json_fields.as_id(i) for i in given]
    for i, category_id in zip(given, ids, strict=True):
        if category_id is None:
            raise DataError(f"{entry.where}: {key}: {json_fields.shown(i)} is no category id")
        if category_id not in names:
            raise DataError(f"{entry.where}: no category has the id {i} of {key}")
    return tuple(names[category_id] for category_id in ids if category_id is not None)


def _warn_of_shared_files(name: str, images: Sequence[LabelledImage]) -> None:
    by_files: dict[tuple[str, ...], list[LabelledImage]] = {}
    for image in images:
        by_files.setdefault(image.files, []).append(image)
    shared = [same for same in by_files.values() if len(same) > 1]
    if shared:
        ids = ", ".join(
            str(i.image_id if i.given_id is None else i.given_id) for i in shared[0][:5]
        )
        logging.warning(
            "%s: %d files belong to several images, such as %s to the images %s: each has labels "
            "of its own, and what one image has the other seems to lack",
            name,
            len(shared),
            shared[0][0].files[0],
            ids,
        )
