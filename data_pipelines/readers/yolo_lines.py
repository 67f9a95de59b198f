"""The lines of YOLO label files: boxes, polygons and poses, and what is wrong with others."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

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
_MIN_TRIANGLES = 4  # some look like poses of one point; so many that all do are poses
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
        shown = " ".join(columns[1:5])
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
        self._lengths: set[int] = set()
        self._num_lines = self._num_held = self._num_signs = self._num_tracks = 0
        self._first = ""

    def add(self, text: str, where: str) -> None:
        """Takes the text of a line that has more than 5 columns."""
        values = np.array(text.split()[1:], np.float64)
        is_held = _is_held_by_box(values)
        self._lengths.add(len(values))
        self._num_lines += 1
        self._num_held += is_held
        self._num_signs += is_held and not _is_small_polygon(values)
        self._num_tracks += len(values) == 6 and _is_track(values.tolist())
        self._first = self._first or where

    def refuse(self) -> None:
        """Raises `DataError` if the lines look like poses, or boxes that all have track 1.

        Poses are all of one length, and nearly all boxes hold their points. Polygons are of many
        lengths, and those that would pass for poses are small.
        """
        if self._num_tracks == self._num_lines > 1:
            raise DataError(f"{self._first}: expected 5 columns, got 7 columns; {_TRACK}")
        few = self._num_held < 0.9 * self._num_lines or self._num_signs < 0.1 * self._num_lines
        if few or len(self._lengths) != 1 or not self._num_signs:
            return
        (length,) = self._lengths
        if length == 6 and self._num_lines < _MIN_TRIANGLES:
            return
        shapes = [[(length - 4) // d, d] for d in (3, 2) if (length - 4) % d == 0]
        told = " or ".join(f"`kpt_shape: {shape}`" for shape in shapes)
        raise DataError(
            f"{self._first}: looks like a pose: its first four numbers are a box that holds the "
            f"other points, as in {self._num_held} of {self._num_lines} lines; add {told} to "
            "data.yaml, or, if these are polygons, `kpt_shape: [0, 2]`"
        )


def _is_held_by_box(values: Float[np.ndarray, " n"]) -> bool:
    """True if the first four numbers are a box in the image that holds the points that follow."""
    cx, cy, width, height = values[:4]
    box = np.array([cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2])
    if not (width > 0 and height > 0 and (box > -0.02).all() and (box < 1.02).all()):
        return False
    rest = values[4:]
    # The third number of a key point says whether it is seen.
    dimensions = 3 if len(rest) % 3 == 0 and np.isin(rest[2::3], (0, 1, 2)).all() else 2
    if len(rest) % dimensions:
        return False
    points = rest.reshape(-1, dimensions)[:, :2]
    points = points[points.any(axis=1)]  # those that are not labelled are 0 0
    slack = 0.05 * (box[2:] - box[:2])
    return bool(((points >= box[:2] - slack) & (points <= box[2:] + slack)).all())


def _is_small_polygon(values: Float[np.ndarray, " n"]) -> bool:
    """True if all points are close together, compared to the box that the first two would make.

    The first two corners of a small polygon make a box of about the size of its distance from the
    image's edges, which holds the polygon whatever it is.
    """
    if len(values) % 2:
        return False
    points = values.reshape(-1, 2)
    return bool((np.ptp(points, axis=0) < 0.51 * points[1]).all())


def duplicates(lines: Iterable[Line]) -> int:
    """How many lines say what another has said already."""
    said = Counter((line.class_number, line.corners) for line in lines if not line.fault)
    return sum(count - 1 for count in said.values())
