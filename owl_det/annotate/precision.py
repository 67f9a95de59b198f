"""How many pseudo-boxes are right, where the true boxes are known.

A pseudo-box is right if it overlaps a true box whose name is its phrase by an IoU of 0.5 or more.
Boxes of an image choose in the order of their scores, each the free true box it overlaps most, and
no true box is given twice. Precision is the share of pseudo-boxes that are right, recall the share
of true boxes that were found, of all images: those without records count as well.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32

from data_pipelines import label_ops, pseudo_records, shapes_world
from data_pipelines.readers import image_text, pseudo_boxes
from owl_det.annotate import label_spaces
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
        kept = kept_boxes(entry, min_box_score=min_box_score, min_image_score=min_image_score)
        _count_image(entry, kept, truths[entry["key"]], groups, counts)
    names = [*dict.fromkeys(groups.values()), NO_NAME]
    for kind in _COUNTS:
        counts[ALL, kind] = sum(counts[name, kind] for name in names)
    return {name: _row(name, counts) for name in (*names, ALL)}


def kept_boxes(
    entry: Mapping[str, Any], *, min_box_score: float, min_image_score: float
) -> list[int]:
    """Indices of a record's boxes that the two thresholds keep."""
    scores = entry["scores"]
    if not len(scores) or max(scores) < min_image_score:
        return []
    return [i for i, score in enumerate(scores) if score >= min_box_score]


def _count_image(
    entry: Mapping[str, Any],
    kept: list[int],
    truth: Truth,
    groups: Mapping[str, str],
    counts: Counter[tuple[str, str]],
) -> None:
    boxes = np.asarray(entry["boxes_xyxy"], np.float32).reshape(-1, 4)
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
    words, of_name = (sum(label_spaces.split_words(text), []) for text in (phrase, name))
    starts = range(len(words) - len(of_name) + 1)
    return any(words[start : start + len(of_name)] == of_name for start in starts)


def _row(name: str, counts: Mapping[tuple[str, str], int]) -> dict[str, Any]:
    row: dict[str, Any] = {kind: counts[name, kind] for kind in _COUNTS}
    row["precision"] = _share(row["right"], row["pseudo_boxes"])
    row["recall"] = _share(row["right"], row["true_boxes"])
    return row


def _share(part: int, whole: int) -> float | None:
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
        present = set(truths[entry["key"]].names)
        mined = entry["hard_negatives"]
        for first in (count for count in _FIRST if count <= len(mined)):
            asked[first] += first
            absent[first] += sum(name not in present for name in mined[:first])
    return [
        {"first": n, "asked": asked[n], "absent": absent[n], "share": absent[n] / asked[n]}
        for n in sorted(asked)
    ]


# --- records of shapes world ---------------------------------------------------------------------


def shapes_world_truths(where: str) -> dict[str, Truth]:
    """All objects of `shapes_world:SPLIT:NUM[:SIZE]`, also those without boxes, by record key.

    Raises `DataError` if `where` is not of this form.
    """
    world = image_text.open_shapes_world(where)
    names = [entry.name for entry in shapes_world.object_names()]
    truths: dict[str, Truth] = {}
    for index in range(len(world)):
        objects = world.scene(index).objects
        boxes = np.array([item.box for item in objects], np.float32).reshape(-1, 4)
        key = image_text.shapes_world_key(index)
        truths[key] = Truth(boxes, tuple(names[item.category] for item in objects))
    return truths


def run(
    records: str,
    source: str = "",
    *,
    min_box_score: float | None = None,
    min_image_score: float | None = None,
) -> dict[str, Any]:
    """Measures records of shapes world; by default all of their job's input at its thresholds.

    `source` is as the job's --input: another number of images of the same split and size narrows or
    widens what recall is measured on. Raises `DataError` if the records or the source cannot be
    used, or do not belong together.
    """
    folder = Path(records)
    job = pseudo_boxes.read_job(folder)
    source = source or str(job.get("input"))
    if _split_and_size(source) != _split_and_size(str(job.get("input"))):
        raise DataError(
            f"--source: {source}, but the records in {records} were made of {job.get('input')}"
        )
    settings = {
        "min_box_score": _given(min_box_score, job, "min_box_score"),
        "min_image_score": _given(min_image_score, job, "min_image_score"),
    }
    groups = {entry.name: entry.group for entry in shapes_world.object_names()}
    truths = shapes_world_truths(source)

    def entries() -> Iterator[dict[str, Any]]:
        return (entry for _, entry in pseudo_boxes.read_entries(folder, int(job["num_shards"])))

    return {
        "format": pseudo_records.FORMAT,
        "records": records,
        "source": source,
        "images": len(truths),
        "iou": IOU,
        **settings,
        "groups": measure(entries(), truths, groups, **settings),
        "hard_negatives": measure_hard_negatives(entries(), truths, settings["min_image_score"]),
    }


def _split_and_size(where: str) -> tuple[str, int]:
    world = image_text.open_shapes_world(where)
    return world.split, world.image_size


def _given(value: float | None, job: Mapping[str, Any], key: str) -> float:
    """A threshold, the job's by default. Raises `DataError` below the job's floor."""
    value = float(job[key]) if value is None else value
    if not job["floor"] <= value <= 1:
        raise DataError(f"--{key}: {value}, but the records hold scores from {job['floor']} to 1")
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
