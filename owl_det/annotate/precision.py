"""How many pseudo-boxes are right, where the true boxes are known.

A pseudo-box is right if it overlaps a true box whose name is its phrase by an IoU of 0.5 or more.
Boxes that lie in a crowd of their name count as neither right nor wrong. The others choose in the
order of their scores, each the free true box it overlaps most; no true box is given twice.
Precision is the share of pseudo-boxes that are right, recall the share of true boxes that were
found, of all images: those without records count as well.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32

from data_pipelines import (
    label_ops,
    phrases,
    pseudo_records,
    shapes_names,
    source_text,
)
from data_pipelines.image_ops import UnreadableImage
from data_pipelines.open_source import open_source
from data_pipelines.readers import image_text_inputs, pseudo_boxes
from data_pipelines.readers.folder import FolderReader
from data_pipelines.shapes_world import ShapesWorld
from owl_det.config import CocoSource, VocSource, YoloSource
from owl_det.errors import DataError

IOU = 0.5
NO_NAME = "no name"  # phrases that are no name of the source, such as "circle and"
ALL = "all"
_COUNTS = ("pseudo_boxes", "right", "on_object", "holds_name", "true_boxes")
_FIRST = (1, 2, 5, 10, 20, 30)  # hard negatives


@dataclass(frozen=True)
class Truth:
    """All objects of one image."""

    boxes_xyxy: Float32[np.ndarray, "m 4"]  # pixels
    names: tuple[str, ...]
    # Regions that hold many objects of a name, none of them boxed.
    crowds_xyxy: Float32[np.ndarray, "k 4"] = field(
        default_factory=lambda: np.zeros((0, 4), np.float32)
    )
    crowd_names: tuple[str, ...] = ()


def measure(
    entries: Iterable[Mapping[str, Any]],
    truths: Mapping[str, Truth],
    groups: Mapping[str, str],
    *,
    min_box_score: float,
    min_image_score: float,
) -> dict[str, dict[str, Any]]:
    """Counts, precision and recall of each group of names, of `NO_NAME` and of `ALL`.

    `entries` are records (one of each image at most), `truths` the objects of every image by its
    key, `groups` the group of every name. Only boxes that training takes at these thresholds count.
    `on_object` counts the pseudo-boxes that overlap any true box so much, whatever its name;
    `holds_name` those of them whose phrase holds that box's name ("a red star in" of a red star).
    Precision and recall are None where there is nothing to count. Raises `DataError` if an entry
    belongs to no image of `truths`.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for truth in truths.values():
        counts.update((groups[name], "true_boxes") for name in truth.names)
    for entry in entries:
        if entry["key"] not in truths:
            raise DataError(f"record {entry['key']!r}: no image of the source has this key")
        kept = pseudo_records.kept_boxes(
            entry, min_box_score=min_box_score, min_image_score=min_image_score
        )
        _count_image(entry, kept, truths[entry["key"]], groups, counts)
    names = [*dict.fromkeys(groups.values()), NO_NAME]
    for kind in _COUNTS:
        counts[ALL, kind] = sum(counts[name, kind] for name in names)
    return {name: _row(name, counts) for name in (*names, ALL)}


def _count_image(
    entry: Mapping[str, Any],
    kept: list[int],
    truth: Truth,
    groups: Mapping[str, str],
    counts: Counter[tuple[str, str]],
) -> None:
    boxes = np.asarray(entry["boxes_xyxy"], np.float32).reshape(-1, 4)
    kept = [i for i in kept if not _lies_in_crowd(boxes[i], entry["phrases"][i], truth)]
    overlaps = label_ops.pairwise_iou(boxes[kept], truth.boxes_xyxy)
    phrases = [entry["phrases"][i] for i in kept]
    is_right = _right(overlaps, phrases, truth.names, np.asarray(entry["scores"])[kept])
    for row, phrase in enumerate(phrases):
        group = groups.get(phrase, NO_NAME)
        counts[group, "pseudo_boxes"] += 1
        counts[group, "right"] += int(is_right[row])
        under = np.flatnonzero(overlaps[row] >= IOU)
        counts[group, "on_object"] += int(under.size > 0)
        holds_name = any(_holds(phrase, truth.names[i]) for i in under)
        counts[group, "holds_name"] += int(holds_name)


def _lies_in_crowd(box: Float32[np.ndarray, "4"], phrase: str, truth: Truth) -> bool:
    """Half of the box or more is in a crowd of its phrase: nobody knows whether it is right."""
    crowds = truth.crowds_xyxy[[name == phrase for name in truth.crowd_names]]
    corners = np.minimum(box[2:], crowds[:, 2:]) - np.maximum(box[:2], crowds[:, :2])
    shared = corners.clip(min=0).prod(axis=1)
    return bool((shared >= IOU * (box[2:] - box[:2]).prod()).any())


def _right(
    overlaps: Float[np.ndarray, "p m"],
    phrases: list[str],
    names: tuple[str, ...],
    scores: Float[np.ndarray, " p"],
) -> Bool[np.ndarray, " p"]:
    is_right = np.zeros(len(phrases), bool)
    is_free = np.ones(len(names), bool)
    for row in np.argsort(-scores, kind="stable"):
        is_same = np.array([name == phrases[row] for name in names], bool)
        candidates = np.flatnonzero(is_free & is_same & (overlaps[row] >= IOU))
        if candidates.size:
            is_free[candidates[overlaps[row, candidates].argmax()]] = False
            is_right[row] = True
    return is_right


def _holds(phrase: str, name: str) -> bool:
    """True if the name's words stand next to each other in the phrase, punctuation aside."""
    words, of_name = (sum(phrases.split_words(text), []) for text in (phrase, name))
    starts = range(len(words) - len(of_name) + 1)
    return any(words[start : start + len(of_name)] == of_name for start in starts)


def _row(name: str, counts: Mapping[tuple[str, str], int]) -> dict[str, Any]:
    row: dict[str, Any] = {kind: counts[name, kind] for kind in _COUNTS}
    row["precision"] = _ratio(row["right"], row["pseudo_boxes"])
    row["recall"] = _ratio(row["right"], row["true_boxes"])
    return row


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def measure_hard_negatives(
    entries: Iterable[Mapping[str, Any]], truths: Mapping[str, Truth], min_image_score: float
) -> list[dict[str, Any]]:
    """Of the first 1, 5, 10 … hard negatives of every kept image, how many are really absent.

    One row for each number that an image has; none if no hard negatives were mined.
    """
    asked, absent = Counter[int](), Counter[int]()
    for entry in entries:
        if not len(entry["scores"]) or max(entry["scores"]) < min_image_score:
            continue
        truth = truths[entry["key"]]
        present = {*truth.names, *truth.crowd_names}
        mined = entry["hard_negatives"]
        for first in (count for count in _FIRST if count <= len(mined)):
            asked[first] += first
            absent[first] += sum(name not in present for name in mined[:first])
    return [
        {"first": n, "asked": asked[n], "absent": absent[n], "share": absent[n] / asked[n]}
        for n in sorted(asked)
    ]


# --- sources -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """What is known of the images that were annotated."""

    truths: dict[str, Truth]  # by the key of the record
    groups: dict[str, str]  # of every name


def open_truth(where: str, annotated: str) -> Known:
    """The truth of shapes world, or of a folder of labelled images.

    `where` is `shapes_world:SPLIT:NUM[:SIZE]`, or a source as in a config: `kind=coco,path=ROOT,
    annotations=FILE,images=FOLDER`, or kind voc or yolo. `annotated` is the job's --input: the same
    split and size, or the folder of images. Raises `UserError` if the source cannot be used or the
    two do not belong together.
    """
    if where == annotated and not where.startswith("shapes_world:"):
        raise DataError(
            "--source: give the true boxes of the images that were annotated, as "
            "kind=coco,path=ROOT,annotations=FILE,images=DIR"
        )
    if where.startswith("shapes_world:") and annotated.startswith("shapes_world:"):
        ours, theirs = (image_text_inputs.open_shapes_world(text) for text in (where, annotated))
        if (ours.split, ours.image_size) == (theirs.split, theirs.image_size):
            return _of_shapes_world(ours)
    elif "=" in where and not annotated.startswith("shapes_world:"):
        return _of_folder(where)
    raise DataError(
        f"--source: {where}, but the records were made of {annotated}; give the same split and "
        "size of shapes_world, or kind=…,path=… of a folder of images"
    )


def _of_shapes_world(world: ShapesWorld) -> Known:
    """All objects, also those that have no boxes in training."""
    names = [entry.name for entry in shapes_names.object_names()]
    truths: dict[str, Truth] = {}
    for index in range(len(world)):
        objects = world.scene(index).objects
        boxes = np.array([item.box for item in objects], np.float32).reshape(-1, 4)
        key = image_text_inputs.shapes_world_key(index)
        truths[key] = Truth(boxes, tuple(names[item.category] for item in objects))
    return Known(truths, {entry.name: entry.group for entry in shapes_names.object_names()})


def _of_folder(where: str) -> Known:
    """Boxes of images that lie in files; names in lower case, as label spaces have them."""
    described, _ = source_text.parse_source(where, "config.data.eval.truth")
    if not isinstance(described, CocoSource | VocSource | YoloSource):
        raise DataError(f"--source: kind={described.kind}, but expected coco, voc or yolo")
    source = open_source(described, "")
    assert isinstance(source, FolderReader)
    folder = source.image_folder
    truths: dict[str, Truth] = {}
    for index in range(len(source)):
        try:
            record = source[index]
        except UnreadableImage as error:
            raise DataError(f"--source: {error}") from None
        names = np.array([name.lower() for (name,) in record.names], object)  # one a box
        boxes, is_crowd = record.boxes_xyxy, record.is_crowd
        key = Path(record.source).relative_to(folder).as_posix()
        truths[key] = Truth(
            boxes[~is_crowd], tuple(names[~is_crowd]), boxes[is_crowd], tuple(names[is_crowd])
        )
    groups = {c.name.lower(): c.groups[0] if c.groups else "names" for c in source.categories}
    return Known(truths, groups)


def run(
    records: str,
    source: str = "",
    *,
    min_box_score: float | None = None,
    min_image_score: float | None = None,
) -> dict[str, Any]:
    """Measures the records of a folder, by default at the thresholds of their job.

    `source` is as for `open_truth`, by default the job's --input; of shapes world another number
    of images narrows or widens what recall is measured on. Raises `UserError` if the records or the
    source cannot be used.
    """
    folder = Path(records)
    job = pseudo_boxes.read_job(folder)
    annotated = str(job.get("input"))
    source = source or annotated
    known = open_truth(source, annotated)
    settings = {
        "min_box_score": _threshold(min_box_score, job, "min_box_score"),
        "min_image_score": _threshold(min_image_score, job, "min_image_score"),
    }

    def entries() -> Iterator[dict[str, Any]]:
        return (entry for _, entry in pseudo_boxes.read_entries(folder, int(job["num_shards"])))

    return {
        "format": pseudo_records.FORMAT,
        "records": records,
        "source": source,
        "images": len(known.truths),
        "iou": IOU,
        **settings,
        "groups": measure(entries(), known.truths, known.groups, **settings),
        "hard_negatives": measure_hard_negatives(
            entries(), known.truths, settings["min_image_score"]
        ),
    }


def _threshold(value: float | None, job: Mapping[str, Any], key: str) -> float:
    """A threshold, the job's by default. Raises `DataError` below the job's floor."""
    value = float(job[key]) if value is None else value
    floor = job["image_floor" if key == "min_image_score" else "floor"]
    if not floor <= value <= 1:
        raise DataError(f"--{key}: {value}, but the records hold scores from {floor} to 1")
    return value


def table(content: Mapping[str, Any]) -> str:
    """The groups as Markdown tables, precision and recall in percent."""
    lines = [
        "| group | pseudo-boxes | right | precision | on an object | holding its name "
        "| true boxes | recall |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in content["groups"].items():
        precision, recall = (_percent(row[key]) for key in ("precision", "recall"))
        lines.append(
            f"| {name} | {row['pseudo_boxes']:,} | {row['right']:,} | {precision} | "
            f"{row['on_object']:,} | {row['holds_name']:,} | {row['true_boxes']:,} | {recall} |"
        )
    if content["hard_negatives"]:
        lines += [
            "",
            "| first hard negatives | of all images | absent | share |",
            "|---|---|---|---|",
        ]
    lines += [
        f"| {row['first']} | {row['asked']:,} | {row['absent']:,} | {_percent(row['share'])} |"
        for row in content["hard_negatives"]
    ]
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
