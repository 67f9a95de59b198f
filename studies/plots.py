"""Plots of a study: values of arms by seed, drawn as those of owl_det.viz."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from owl_det.viz.colors import LINES, PLAIN
from owl_det.viz.figures import save, tidy

Curve = Mapping[int, Sequence[float]]  # step → a value a seed
LineStyle = Literal["-", "--"]
Kind = Literal["main", "variant", "control"]

_BARS: Mapping[str, tuple[str, str]] = {
    "main": (LINES[0], "main arms"),
    "variant": (PLAIN, "variants"),
    "control": ("#bbbbbb", "controls"),
}
_TONES = {  # of a verdict: colour, whether the dot is filled, meaning
    "good": (LINES[2], True, "held"),
    "bad": (LINES[1], True, "not held"),
    "unsure": ("#888888", True, "within noise"),
    "good-open": (LINES[2], False, "held, noise unknown"),
    "bad-open": (LINES[1], False, "not held, noise unknown"),
}


@dataclass(frozen=True)
class Bar:
    label: str
    kind: Kind
    values: Sequence[float]  # one a seed


@dataclass(frozen=True)
class Margin:
    """How far a claim's difference lies above its bound, in percentage points."""

    label: str
    tone: str
    middle: float
    width: float | None  # half of the 95 % confidence interval; None where noise is unknown


def plot_bars(path: Path, bars: Sequence[Bar], xlabel: str) -> None:
    """A bar an arm, from the top down: the mean of its seeds, with a dot for each."""
    figure = Figure(figsize=(9.6, 1.2 + 0.28 * len(bars)), layout="constrained")
    axes = figure.subplots()
    rows = range(len(bars))
    colors = [_BARS[bar.kind][0] for bar in bars]
    axes.barh(rows, [mean(bar.values) for bar in bars], color=colors, height=0.7)
    for row, bar in enumerate(bars):
        axes.scatter(bar.values, [row] * len(bar.values), s=14, color="black", zorder=3)
    kinds = [kind for kind in _BARS if any(bar.kind == kind for bar in bars)]
    handles = [
        Line2D([], [], color=_BARS[kind][0], linewidth=6, label=_BARS[kind][1]) for kind in kinds
    ]
    handles.append(
        Line2D([], [], color="black", marker="o", markersize=4, linestyle="", label="one seed")
    )
    axes.set_yticks(rows, [bar.label for bar in bars], fontsize=8.5)
    axes.margins(x=0.05, y=0.02)
    axes.invert_yaxis()
    axes.set_xlim(0, None)
    axes.set_xlabel(xlabel)
    tidy(axes)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=9, frameon=False)
    save(figure, path)


def plot_margins(path: Path, margins: Sequence[Margin]) -> None:
    """A dot a claim, with its confidence interval: right of the line it held."""
    figure = Figure(figsize=(9.6, 1.3 + 0.25 * len(margins)), layout="constrained")
    axes = figure.subplots()
    for row, margin in enumerate(margins):
        color, is_filled, _ = _TONES[margin.tone]
        axes.errorbar(
            margin.middle,
            row,
            xerr=margin.width,
            fmt="o",
            markersize=6,
            color=color,
            markerfacecolor=color if is_filled else "white",
            linewidth=1.5,
        )
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(margins)), [margin.label for margin in margins], fontsize=8)
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=2, linscale=0.5)
    axes.xaxis.set_major_locator(FixedLocator([-50, -20, -10, -5, -2, 0, 2, 5, 10, 20, 50]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:+g}" if x else "0")
    ends = [m.middle + sign * (m.width or 0) for m in margins for sign in (-1, 1)]
    axes.set_xlim(1.3 * min(-1, *ends), 1.3 * max(1, *ends))
    axes.tick_params(axis="x", labelsize=9)
    axes.set_xlabel("difference less the claim's bound (percentage points)")
    tidy(axes)
    tones = [tone for tone in _TONES if any(margin.tone == tone for margin in margins)]
    handles = [
        Line2D([], [], color=color, marker="o", linestyle="", label=label, mfc=face)
        for color, is_filled, label in (_TONES[tone] for tone in tones)
        for face in (color if is_filled else "white",)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, fontsize=9, frameon=False)
    save(figure, path)


def plot_curves(
    path: Path,
    curves: Mapping[str, Mapping[str, Curve]],
    styles: Mapping[str, LineStyle],
    ylabel: str,
) -> None:
    """Per arm and metric the mean over seeds by step, in a band from the least to the greatest.

    An arm has one colour, a metric one line style.
    """
    figure = Figure(figsize=(8.4, 5), layout="constrained")
    axes = figure.subplots()
    for color, (_, by_metric) in zip(LINES, curves.items(), strict=False):
        for metric, curve in by_metric.items():
            steps = sorted(curve)
            low, high = ([f(curve[step]) for step in steps] for f in (min, max))
            middle = [mean(curve[step]) for step in steps]
            axes.plot(steps, middle, styles[metric], color=color, linewidth=1.8, marker="o", ms=3)
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    handles = [
        Line2D([], [], color=color, linewidth=4, label=name)
        for color, name in zip(LINES, curves, strict=False)
    ]
    handles += [
        Line2D([], [], color="black", linestyle=style, label=metric.replace("_", " "))
        for metric, style in styles.items()
    ]
    axes.set(xlabel="step", ylabel=ylabel, ylim=(0, None))
    tidy(axes)
    figure.legend(handles=handles, loc="outside upper left", ncols=1, fontsize=8.5, frameon=False)
    save(figure, path)


def plot_thresholds(
    path: Path,
    lines: Mapping[str, Mapping[float, Sequence[float]]],
    xlabel: str,
    ylabel: str,
    *,
    is_log: bool = False,
) -> None:
    """A line through the means, with a dot for each seed."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for color, (name, by_threshold) in zip(LINES, lines.items(), strict=False):
        thresholds = sorted(by_threshold)
        means = [mean(by_threshold[threshold]) for threshold in thresholds]
        axes.plot(thresholds, means, color=color, linewidth=1.8, label=name)
        for threshold in thresholds:
            dots = by_threshold[threshold]
            axes.scatter([threshold] * len(dots), dots, s=18, color=color, zorder=3)
    if is_log:
        axes.set_xscale("log")
    ticks = sorted({t for by_threshold in lines.values() for t in by_threshold})
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    tidy(axes)
    axes.legend(fontsize=9)
    save(figure, path)
