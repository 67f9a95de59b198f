"""The plot of how many boxes have which score (Matplotlib)."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from owl_det.viz.colors import LINES
from owl_det.viz.figures import save, tidy


def plot_score_histogram(
    path: str | os.PathLike[str], counts: Mapping[str, Sequence[int]], threshold: float
) -> None:
    """Numbers of boxes by score, one line for each entry; bins are equal parts of [0, 1]."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for index, (name, values) in enumerate(counts.items()):
        if not any(values):
            continue
        edges = np.linspace(0, 1, len(values) + 1)
        label = f"{name.replace('_', ' ')} ({sum(values):,})"
        axes.stairs(values, edges, label=label, color=LINES[index % len(LINES)], linewidth=1.5)
    axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label="threshold")
    axes.set(xlim=(0, 1), xlabel="score", ylabel="boxes")
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_ylim(0, 1.5 * max(1, *(max(values, default=0) for values in counts.values())))
    tidy(axes)
    axes.legend(fontsize=9)
    save(figure, path)
