"""Plots of a study: values of arms by seed, drawn as those of owl_det.viz."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

_COLORS = ("#0066ff", "#cc4400", "#008545", "#a100c2", "#d8114f", "#007a99")
_OTHER = "#9db8d9"  # arms that are no stage
_GRID = "#dddddd"

Curve = Mapping[int, Sequence[float]]  # step → a value a seed
LineStyle = Literal["-", "--"]


def plot_bars(
    path: Path, values: Mapping[str, Sequence[float]], main: Sequence[str], xlabel: str
) -> None:
    """A bar an arm, from the top down: the mean of its seeds, with a dot for each."""
    names = list(values)
    figure = Figure(figsize=(7.2, 1.2 + 0.28 * len(names)), layout="constrained")
    axes = figure.subplots()
    colors = [_COLORS[0] if name in main else _OTHER for name in names]
    axes.barh(names, [mean(values[name]) for name in names], color=colors, height=0.7)
    for row, name in enumerate(names):
        axes.scatter(values[name], [row] * len(values[name]), s=14, color="black", zorder=3)
    handles = [
        Line2D([], [], color=_COLORS[0], linewidth=6, label="stages"),
        Line2D([], [], color=_OTHER, linewidth=6, label="variants and controls"),
        Line2D([], [], color="black", marker="o", markersize=4, linestyle="", label="one seed"),
    ]
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.set_xlim(0, None)
    axes.set_xlabel(xlabel)
    _tidy(axes)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    figure.savefig(path, format="png", dpi=120)


def plot_curves(
    path: Path,
    curves: Mapping[str, Mapping[str, Curve]],
    styles: Mapping[str, LineStyle],
    ylabel: str,
) -> None:
    """Per arm and metric the mean over seeds by step, in a band from the least to the greatest.

    An arm has one colour, a metric one line style.
    """
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for color, (_, by_metric) in zip(_COLORS, curves.items(), strict=False):
        for metric, curve in by_metric.items():
            steps = sorted(curve)
            low, high = ([f(curve[step]) for step in steps] for f in (min, max))
            middle = [mean(curve[step]) for step in steps]
            axes.plot(steps, middle, styles[metric], color=color, linewidth=1.8, marker="o", ms=3)
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    handles = [
        Line2D([], [], color=color, linewidth=4, label=name)
        for color, name in zip(_COLORS, curves, strict=False)
    ]
    handles += [Line2D([], [], color="black", linestyle=s, label=m) for m, s in styles.items()]
    axes.set(xlabel="step", ylabel=ylabel, ylim=(0, None))
    _tidy(axes)
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=min(len(handles), 4),
        fontsize=9,
        frameon=False,
    )
    figure.savefig(path, format="png", dpi=120)


def plot_thresholds(
    path: Path, lines: Mapping[str, Mapping[float, Sequence[float]]], xlabel: str, ylabel: str
) -> None:
    """A line through the means, with a dot for each seed."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for color, (name, by_threshold) in zip(_COLORS, lines.items(), strict=False):
        thresholds = sorted(by_threshold)
        means = [mean(by_threshold[threshold]) for threshold in thresholds]
        axes.plot(thresholds, means, color=color, linewidth=1.8, label=name)
        for threshold in thresholds:
            dots = by_threshold[threshold]
            axes.scatter([threshold] * len(dots), dots, s=18, color=color, zorder=3)
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    axes.set_xticks(sorted({t for by_threshold in lines.values() for t in by_threshold}))
    _tidy(axes)
    axes.legend(fontsize=9)
    figure.savefig(path, format="png", dpi=120)


def _tidy(axes: Axes) -> None:
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
