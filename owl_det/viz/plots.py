"""Plots of metrics (Matplotlib). No global state changes and no display is needed."""

import json
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from owl_det import files
from owl_det.errors import DataError
from owl_det.viz.colors import GRID, LINES
from owl_det.viz.figures import save, tidy

MAX_NAMES = 120  # of a confusion matrix: more cannot be read
_MAX_LINES = 12  # of AP50 over the steps
_MAX_LABEL = 32  # characters


class PrecisionCurve(NamedTuple):
    """Precision over recall at IoU 0.5, of one group of categories or of all."""

    name: str
    AP50: float
    precision: Float[np.ndarray, " r"]


def plot_precision_recall(
    path: str | os.PathLike[str],
    recall: Float[np.ndarray, " r"],
    groups: Sequence[PrecisionCurve],
    every: PrecisionCurve,
    note: str,
) -> None:
    """Precision over recall at IoU 0.5: a line for each group, and a thick one for all categories.

    `note` is the second line of the title.
    """
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for index, curve in enumerate(groups):
        label = f"{shorten(_words(curve.name))}  (AP50 {curve.AP50:.3f})"
        color = LINES[index % len(LINES)]
        axes.plot(recall, curve.precision, label=label, linewidth=1.5, color=color)
    label = f"{every.name}  (AP50 {every.AP50:.3f})"
    axes.plot(recall, every.precision, label=label, linewidth=3, color="black")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.set_title(f"Precision and recall at IoU 0.5\n{note}", fontsize=11)
    tidy(axes)
    # Beside the axes where many lines would cover the curves.
    if len(groups) > 5:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9, frameon=False)
    else:
        axes.legend(loc="best", fontsize=9)
    save(figure, path)


def plot_confusion_matrix(
    path: str | os.PathLike[str],
    matrix: Int[np.ndarray, "d d"],
    names: Sequence[str],
    *,
    score: float,
    iou: float,
) -> None:
    """Colours are shares of each true category (row); counts are written in where they fit.

    `matrix` counts the detections that score at least `score`, matched at `iou`: its last row and
    column are background and missed, so it is one larger than `names`. Of more than 120 categories
    those with the most mistakes are drawn. Raises `ValueError` if the sizes do not fit.
    """
    if matrix.shape != (len(names) + 1,) * 2:
        raise ValueError(
            f"plot_confusion_matrix: {len(names)} names need a {len(names) + 1} x "
            f"{len(names) + 1} matrix, got {matrix.shape}"
        )
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    shown = _most_confused(matrix)
    title = f"Detections that score {score:g}, matched at IoU {iou:g}"
    if len(shown) < len(names):
        title += f"\nthe {len(shown)} of {len(names):,} classes with the most mistakes"
    rows = np.append(shown, len(names))
    matrix, share = matrix[np.ix_(rows, rows)], share[np.ix_(rows, rows)]
    size = len(rows)
    inches = float(np.clip(0.55 * size, 3, 11))
    figure = Figure(figsize=(inches + 1.5, inches + 0.6), layout="constrained")
    axes = figure.subplots()
    # The root makes rare confusions visible: with many categories most shares are a few percent.
    picture = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    # One cell in points, and a font that leaves neighbouring names apart.
    font = float(np.clip(72 * 0.66 * inches / size, 3.5, 10))
    short = [shorten(names[int(i)]) for i in shown]
    axes.set_xticks(range(size), [*short, "missed"], rotation=90, fontsize=font)
    axes.set_yticks(range(size), [*short, "background"], fontsize=font)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=11)
    axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=GRID, linewidth=0.3)
    axes.tick_params(which="both", length=0)
    # The corner between background and missed holds nothing.
    axes.axhline(size - 1.5, color="#666666", linewidth=0.8)
    axes.axvline(size - 1.5, color="#666666", linewidth=0.8)
    if size <= 25:
        _write_counts(axes, matrix, share, font)
    figure.colorbar(picture, ax=axes, shrink=0.6, label="share of the row")
    save(figure, path)


def _most_confused(matrix: Int[np.ndarray, "d d"]) -> Int[np.ndarray, " k"]:
    """Positions of the categories to show, in order."""
    wrong = matrix - np.diag(np.diag(matrix))
    mistakes = (wrong.sum(axis=0) + wrong.sum(axis=1))[:-1]
    return np.sort(np.argsort(-mistakes, kind="stable")[:MAX_NAMES])


def plot_training_curve(
    path: str | os.PathLike[str], metrics_jsonl_path: str | os.PathLike[str]
) -> None:
    """Losses (every `train/…loss…`) above AP50 (every `eval…/AP50`, by group), over the steps.

    The file holds one JSON object a line, each with `step`; where a step occurs twice (after a
    restart), the later line counts. Raises `DataError` on a malformed line or if no loss is there.
    """
    curves = _read_curves(Path(metrics_jsonl_path))
    losses = {key: curve for key, curve in curves.items() if _is_loss(key)}
    scores = _scores(curves)
    if not losses:
        raise DataError(
            f"{metrics_jsonl_path}: no line holds a loss (a key such as train/loss); "
            "let the training log once before it is plotted"
        )
    rows = 2 if scores else 1
    figure = Figure(figsize=(7.2, 3.4 * rows + 0.2), layout="constrained")
    axes = figure.subplots(rows, sharex=True, squeeze=False)[:, 0]
    _plot_curves(axes[0], losses, ylabel="loss", marker="")
    if all(value > 0 for curve in losses.values() for value in curve.values()):
        _scale_log(axes[0], [value for curve in losses.values() for value in curve.values()])
    if scores:
        _plot_curves(axes[1], scores, ylabel="AP50", marker="o")
        highest = max(value for curve in scores.values() for value in curve.values())
        axes[1].set_ylim(0, max(0.02, 1.06 * highest))  # room for the highest marker
    axes[-1].set_xlabel("step")
    # 1, 2, 2.5 and 5: steps are round numbers.
    axes[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    save(figure, path)


def _scale_log(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic scale with some labels at least, however narrow the range."""
    low, high = min(values), max(values)
    if high < 1.5 * low:
        return  # a linear one says the same
    subs = (1.0, 2.0, 5.0) if high > 10 * low else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def plot_trade_off(
    path: str | os.PathLike[str],
    points: Sequence[tuple[str, float, float]],
    xlabel: str,
    ylabel: str,
) -> None:
    """Points (label, x, y) on a line in their order; filled where no other beats them on both."""
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    x, y = ([point[axis] for point in points] for axis in (1, 2))
    axes.plot(x, y, color="#999999", linewidth=1, zorder=1)
    for index, (_, px, py) in enumerate(points):
        is_beaten = any(
            qx >= px and qy >= py and (qx > px or qy > py)
            for other, (_, qx, qy) in enumerate(points)
            if other != index
        )
        face = "white" if is_beaten else LINES[0]
        axes.scatter(px, py, s=50, zorder=2, edgecolors=LINES[0], linewidths=1.5, facecolors=face)
    axes.margins(0.1)
    axes.set(xlabel=_wrapped(xlabel, 60), ylabel=_wrapped(ylabel, 44))
    axes.set_title("Filled: no other weight is better on both", fontsize=11)
    tidy(axes)
    label_points(axes, points)
    save(figure, path)


def label_points(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Writes each label beside its point: on no other label, and on no marker."""
    FigureCanvasAgg(_figure(axes)).draw()  # sets the scale
    renderer = FigureCanvasAgg(_figure(axes)).get_renderer()
    marks = [axes.transData.transform((x, y)) for _, x, y in points]
    taken = [Bbox.from_extents(x - 7, y - 7, x + 7, y + 7) for x, y in marks]
    for text, x, y in points:
        note = axes.annotate(text, (x, y), textcoords="offset points", xytext=(0, 0), fontsize=9)
        for distance in (1, 2, 3, 4):
            if _settle(note, distance, taken, axes, renderer):
                break
        taken.append(note.get_window_extent(renderer))


_SIDES = (
    *(((7, 3), "left"), ((-7, 3), "right"), ((7, -11), "left"), ((-7, -11), "right")),
    *(((0, 8), "center"), ((0, -16), "center")),
)


def _settle(note, distance: int, taken: Sequence[Bbox], axes: Axes, renderer) -> bool:  # pyright: ignore
    """Moves a label to the first free side at a distance; False if all are taken."""
    for offset, alignment in _SIDES:
        note.set(ha=alignment)
        note.xyann = (offset[0] * distance, offset[1] * distance)
        extent = note.get_window_extent(renderer)
        inside = axes.bbox.contains(extent.x0, extent.y0) and axes.bbox.contains(
            extent.x1, extent.y1
        )
        if inside and not extent.count_overlaps(taken):
            return True
    return False


def _figure(axes: Axes) -> Figure:
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return figure


def _wrapped(text: str, width: int) -> str:
    """At most two lines; of a path its last part."""
    short = re.sub(r"=[^,]*/([^,/]+)", r"=…/\1", text).replace(",", ", ")
    return "\n".join(textwrap.wrap(short, width, max_lines=2, placeholder=" …"))


def shorten(label: str, length: int = _MAX_LABEL) -> str:
    """At most so many characters, and no markup: Matplotlib would read formulas between $."""
    short = label if len(label) <= length else f"{label[: length - 1].rstrip()}…"
    return short.replace("$", r"\$")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _read_curves(path: Path) -> dict[str, dict[int, float]]:
    """Per key, the value at each step."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; name the metrics that a training run wrote")
    curves: dict[str, dict[int, float]] = {}
    with files.open_read(path) as file:
        for number, line in enumerate(file, start=1):
            step, values = _parse_line(line.decode(), f"{path}, line {number}")
            for key, value in values.items():
                curves.setdefault(key, {})[step] = value
    return curves


def _parse_line(line: str, where: str) -> tuple[int, dict[str, float]]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: no JSON ({error}); remove the line") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise DataError(f"{where}: `step` is missing or no whole number; remove the line")
    numbers = {k: float(value) for k, value in row.items() if isinstance(value, int | float)}
    return row["step"], numbers


def _is_loss(key: str) -> bool:
    return key.startswith("train/") and "loss" in key


def _scores(curves: Mapping[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    """AP50 of each evaluation set, and of its groups while these are few enough to tell apart."""
    totals = {k: v for k, v in curves.items() if k.startswith("eval") and k.endswith("/AP50")}
    groups = {k: v for k, v in curves.items() if k.startswith("eval") and "/AP50_" in k}
    return totals if len(totals) + len(groups) > _MAX_LINES else {**totals, **groups}


def _plot_curves(
    axes: Axes, curves: Mapping[str, Mapping[int, float]], ylabel: str, marker: str
) -> None:
    """The total is black and bold. One line alone is named above the axes, more in a legend."""
    totals = [key for key in curves if key == "train/loss" or key.endswith("/AP50")]
    is_bold = {key: len(totals) == 1 and key in totals for key in curves}
    for index, (key, curve) in enumerate(curves.items()):
        steps = sorted(curve)
        axes.plot(
            steps,
            [curve[step] for step in steps],
            label=_curve_name(key, curves),
            color="black" if is_bold[key] else LINES[(index - 1) % len(LINES)],
            linewidth=2.5 if is_bold[key] else 1.5,
            marker=marker if len(steps) > 1 else "o",  # a line of one point is not seen
            markersize=4,
            zorder=3 if is_bold[key] else 2,
        )
    axes.set_ylabel(ylabel)
    tidy(axes)
    if len(curves) > 1:
        axes.legend(loc="best", fontsize=8, ncols=2 if len(curves) > 4 else 1, framealpha=0.7)
    elif (label := str(axes.lines[0].get_label())) != ylabel:
        axes.set_title(label, fontsize=10)


def _curve_name(key: str, curves: Mapping[str, object]) -> str:
    """The key without what all curves have in common."""
    parts = key.split("/")
    sets = {other.split("/")[1] for other in curves if other.startswith("eval")}
    is_of_one = len(curves) > 1 and len(sets) == 1
    return _words(parts[-1] if is_of_one else "/".join(parts[1:]))


def _write_counts(
    axes: Axes, matrix: Int[np.ndarray, "d d"], share: Float[np.ndarray, "d d"], font: float
) -> None:
    for row, column in np.argwhere(matrix):
        color = "white" if share[row, column] > 0.4 else "black"
        text = f"{matrix[row, column]}"
        # Long counts shrink to stay in their cell.
        size = font * min(1.0, 5 / len(text))
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=size)
