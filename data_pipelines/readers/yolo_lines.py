"""The lines of YOLO label files: boxes, polygons and poses, and what is wrong with others."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Bool, Float

from owl_det.errors import DataError, SourceError

# Coordinates may so far leave [0, 1]: tools round, and boxes reach over the edge. Pixels are far.
_SLACK = 0.1
# Some lines are dropped and counted; more lines of one fault than this share are no accident.
_FEW, _FEW_SHARE = 3, 0.1
_FEW_UNNAMED_SHARE = 0.001  # a name that is missing in the list is no accident either
# Why lines are dropped: "3 of 42 boxes dropped: 2 …".
NO_NUMBERS = "that are not numbers"
WRONG_COLUMNS = "with a wrong number of columns"
NO_CLASS = "without a class number"
NO_NAME = "of classes without a name"
FAR_OUTSIDE = "with coordinates far outside 0 to 1"
# What predictions add at the end of a line, by how many numbers.
_OTHERS = {0: "", 1: "the confidence", 2: "the confidence and the track number"}
_MIN_TRIANGLES = 4  # some look like poses of one point; so many that all do are poses
_MIN_LOOSE = 20  # lines, to take them for poses whose points lie outside of their boxes
_TRACK = "leave out the confidence and the track number of predictions"
_SEPARATORS = {",": "a comma", ";": "a semicolon", "|": "a bar"}
_NOT_RELATIVE = (
    "YOLO's coordinates are relative to the image: divide pixels by its width and height"
)


class Line(NamedTuple):
    """One line of a label file."""

    class_number: int | None  # None = not told
    corners: tuple[float, float, float, float]  # x0, y0, x1, y1 relative to the image
    fault: str = ""  # why it is dropped; empty = it is not
    told: str = ""  # the fault in full


_NONE = (math.nan, math.nan, math.nan, math.nan)


def parse(text: str, num_names: int, keypoints: tuple[int, int] | None) -> Line:
    """Reads `class cx cy width height`, or `class` and the corners of a polygon, or a pose.

    Class numbers below `num_names` are known; a faulty line has one only if it is known. With
    `keypoints` (how many, and numbers of each) the four numbers of a box may be followed by those
    of key points, which are not used.
    """
    columns = text.split()
    number = _class_number(columns[0])
    if number is not None and number >= num_names:
        told = f"the class '{number}' is not a number from 0 to {num_names - 1}"
        return Line(None, _NONE, NO_NAME, told)
    try:
        values = [_number(column) for column in columns[1:]]
    except ValueError:
        return Line(number, _NONE, NO_NUMBERS, _no_numbers(text))
    if number is None and any(mark in columns[0] for mark in _SEPARATORS):
        return Line(None, _NONE, NO_NUMBERS, _no_numbers(text))
    if number is None:
        told = f"the class {columns[0][:40]!r} is no class number"
        return Line(None, _NONE, NO_CLASS, told)
    told = _wrong_columns(values, keypoints)
    if told:
        return Line(number, _NONE, WRONG_COLUMNS, told)
    is_box = len(values) == 4 or keypoints is not None
    given = values[:4] if is_box else values
    if all(map(math.isfinite, given)) and _is_far_outside(given, is_box):
        is_later = not is_box and not _is_far_outside(given[:4], False)
        shown = " ".join(columns[5:] if is_later else columns[1:5])[:60]
        return Line(number, _NONE, FAR_OUTSIDE, f"{shown}: {_NOT_RELATIVE}")
    return Line(number, _corners(given, is_box))


def _class_number(column: str) -> int | None:
    """`3`, or `3.0` as tables write it."""
    match = re.fullmatch(r"\+?(\d{1,9})(\.0*)?", column)
    return int(match[1]) if match else None


def _number(column: str) -> float:
    if "_" in column:  # which Python allows between digits
        raise ValueError(column)
    return float(column)


def _no_numbers(text: str) -> str:
    separator = next((mark for mark in _SEPARATORS if mark in text), "")
    if separator:
        return (
            f"{text[:60]!r} has {_SEPARATORS[separator]}; numbers have decimal points and spaces "
            "in between"
        )
    return f"expected numbers after the class, got {text[:60]!r}"


def _wrong_columns(values: Sequence[float], keypoints: tuple[int, int] | None) -> str:
    """What is wrong with how many numbers follow the class; empty = nothing."""
    count = len(values) + 1
    expected = "expected 5 columns (`class cx cy width height`)"
    if keypoints is not None:
        length = 5 + keypoints[0] * keypoints[1]
        if count in (5, length):
            return ""
        return f"{expected}, or {length} as kpt_shape {list(keypoints)} says; got {count} columns"
    if count == 5:
        return ""
    if count == 6:
        return f"{expected}, got 6 columns; leave out the confidence of predictions"
    # A 1 at the end may be a coordinate; `PolygonDoubts` looks at all lines.
    if count == 7 and values[-1] != 1 and _is_track(values):
        return f"{expected}, got 7 columns; {_TRACK}"
    if count < 7 or count % 2 == 0:
        pose = (
            "; for poses, data.yaml needs `kpt_shape: [number of key points, 2 or 3]`"
            if count > 7
            else ""
        )
        return f"{expected} or `class` and at least three points, got {count} columns{pose}"
    return ""


def _is_track(values: Sequence[float]) -> bool:
    """True for a box, a confidence in [0, 1] and a number that counts tracks."""
    *_, width, height, confidence, track = values
    return track.is_integer() and abs(track) >= 1 and 0 <= confidence <= 1 and width * height > 0


def _is_far_outside(values: Sequence[float], is_box: bool) -> bool:
    # Negative sides are no matter of place: such boxes have no area.
    placed = [*values[:2], *(max(0.0, value) for value in values[2:])] if is_box else values
    return not all(-_SLACK <= value <= 1 + _SLACK for value in placed)


def _corners(values: Sequence[float], is_box: bool) -> tuple[float, float, float, float]:
    if is_box:
        cx, cy, width, height = values
        return cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2
    xs, ys = values[0::2], values[1::2]
    if not all(map(math.isfinite, values)):
        return _NONE
    return min(xs), min(ys), max(xs), max(ys)


@dataclass
class Faults:
    """The faulty lines of a data set, by reason."""

    num_lines: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # reason → file, line and fault

    def add(self, line: Line, where: str) -> None:
        """Counts a line, whether it is faulty or not."""
        self.num_lines += 1
        if line.fault:
            self.counts[line.fault] += 1
            self.examples.setdefault(line.fault, f"{where}: {line.told}")

    def refuse_many(self) -> None:
        """Raises `DataError` if so many lines have one fault that the format is another."""
        for fault, count in self.counts.items():
            few = max(_FEW, _FEW_SHARE * self.num_lines)
            if fault == NO_NAME:
                few = _FEW_UNNAMED_SHARE * self.num_lines
            if count <= few and count < self.num_lines:
                continue
            told = f"{self.examples[fault]} ({count} of {self.num_lines} lines are so)"
            if fault != NO_NAME:
                raise DataError(told)
            raise SourceError(
                told,
                keys="mend the line, or complete the names in data.yaml or in the key `names`",
                flags="mend the line, or complete the names in data.yaml or classes.txt",
            )


class PolygonDoubts:
    """Whether lines that are read as polygons are poses or tracks: one line does not tell."""

    def __init__(self) -> None:
        self._rows: list[list[float]] = []
        self._has_several_lengths = False
        self._first = ""

    def add(self, text: str, where: str) -> None:
        """Takes the text of a line that has more than 5 columns."""
        if self._has_several_lengths:
            return
        values = [float(column) for column in text.split()[1:]]
        self._has_several_lengths = bool(self._rows) and len(values) != len(self._rows[0])
        self._rows.append(values)
        self._first = self._first or where

    def refuse(self) -> None:
        """Raises `DataError` if the lines look like poses, or boxes that all have a track.

        Poses are all of one length, and nearly all boxes hold their points. Polygons are of many
        lengths, and those that would pass for poses are small.
        """
        if self._has_several_lengths or not self._rows:
            return
        values = np.array(self._rows, np.float64)
        if _are_tracks(values):
            raise DataError(f"{self._first}: expected 5 columns, got 7 columns; {_TRACK}")
        if len(values) < _MIN_TRIANGLES and values.shape[1] == 6:
            return
        layouts = [layout for layout in _layouts(values.shape[1]) if _are_poses(values, layout)]
        if not layouts:
            self._warn_of_loose_poses(values)
            return
        fewest = min(layout.num_others for layout in layouts)
        layouts = [layout for layout in layouts if layout.num_others == fewest]
        told = " or ".join(f"`kpt_shape: [{k.num_points}, {k.dimensions}]`" for k in layouts)
        others = f" and leave out {_OTHERS[fewest]} at the end of each line" if fewest else ""
        raise DataError(
            f"{self._first}: looks like a pose: its first four numbers are a box that holds the "
            f"other points, as in nearly all of {len(values)} lines; add {told} to data.yaml"
            f"{others}, or, if these are polygons, `kpt_shape: [0, 2]`"
        )

    def _warn_of_loose_poses(self, values: Float[np.ndarray, "n k"]) -> None:
        """Points may be outside of their boxes; then it is less sure that they are poses."""
        layouts = [k for k in _layouts(values.shape[1]) if not k.num_others]
        is_sure = len(values) >= _MIN_LOOSE and _are_boxes(values).all()
        if is_sure and any(_are_poses(values, layout, slack=0.6) for layout in layouts):
            logging.warning(
                "%s: each of %d lines begins with what may be a box, and all have %d numbers: they "
                "are read as polygons; if they are poses, add `kpt_shape: [number of key points, "
                "2 or 3]` to data.yaml, else `kpt_shape: [0, 2]`",
                self._first,
                *values.shape,
            )


class _PoseLayout(NamedTuple):
    """What may follow the four numbers of a box."""

    num_points: int
    dimensions: int  # 2, or 3: whether a point is seen, or how sure that is
    num_others: int  # the confidence of a prediction, and its track number


def _layouts(length: int) -> list[_PoseLayout]:
    """The poses that lines with so many numbers can be."""
    return [
        _PoseLayout((length - 4 - others) // dimensions, dimensions, others)
        for others in _OTHERS
        for dimensions in (3, 2)
        if length - 4 - others > 0 and (length - 4 - others) % dimensions == 0
    ]


def _boxes(values: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n 4"]:
    """The corners of boxes whose center and sides the first four numbers are."""
    centers, sides = values[:, :2], values[:, 2:4]
    return np.concatenate([centers - sides / 2, centers + sides / 2], axis=1)


def _are_boxes(values: Float[np.ndarray, "n k"]) -> Bool[np.ndarray, " n"]:
    """Which lines begin with a box in the image."""
    boxes = _boxes(values)
    is_near = np.all((boxes > -0.02) & (boxes < 1.02), axis=1)
    return np.asarray(np.all(values[:, 2:4] > 0, axis=1) & is_near)


def _are_tracks(values: Float[np.ndarray, "n k"]) -> bool:
    """True if all lines are a box, a confidence and a whole number."""
    if values.shape[1] != 6 or len(values) < 2:
        return False
    confidences, tracks = values[:, 4:].T
    are_alike = _are_boxes(values) & (confidences >= 0) & (confidences <= 1)
    return bool((are_alike & (tracks == np.floor(tracks))).all())


def _are_poses(values: Float[np.ndarray, "n k"], layout: _PoseLayout, slack: float = 0.05) -> bool:
    """True if the boxes of nearly all lines hold their points, and not only since these are near.

    `slack` is how far points may be outside of a box, as a share of its sides. The first two
    corners of a small polygon make a box of about the size of its distance from the image's edges,
    which holds the polygon whatever it is.
    """
    end = 4 + layout.num_points * layout.dimensions
    points = values[:, 4:end].reshape(len(values), layout.num_points, layout.dimensions)
    is_seen = points[..., :2].any(axis=-1, keepdims=True)  # the others are 0 0
    boxes = _boxes(values)
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    are_boxes = _are_boxes(values)
    margin = slack * (high - low)
    is_inside = (points[..., :2] >= low - margin) & (points[..., :2] <= high + margin)
    is_held = are_boxes & (is_inside | ~is_seen).all(axis=(1, 2))
    if layout.num_others == 2:  # a track number is whole
        is_held &= values[:, -1] == np.floor(values[:, -1])
    is_sign = is_held & ~_are_small(values)
    return bool(is_held.mean() >= 0.9 and is_sign.mean() >= 0.1)


def _are_small(values: Float[np.ndarray, "n k"]) -> Bool[np.ndarray, " n"]:
    """Which polygons have all points close together, compared to a box of the first two."""
    corners = values.reshape(len(values), -1, 2)
    return (np.ptp(corners, axis=1) < 0.51 * corners[:, 1]).all(axis=1)
