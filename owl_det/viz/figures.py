"""What all plots share (Matplotlib): the look of their axes, and how they are written."""

import os

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from owl_det import files
from owl_det.viz.colors import GRID

MAX_PIXELS = 1600  # of a plot's width


def tidy(axes: Axes) -> None:
    """A faint grid below the data, and no frame above and to the right."""
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a PNG cut to its content, at most 1,600 pixels wide, once it is complete."""
    FigureCanvasAgg(figure).draw()
    box = figure.get_tightbbox()
    dpi = min(120.0, (MAX_PIXELS - 30) / (box.width + 0.2))
    with files.atomic(path) as partial:
        figure.savefig(partial, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.1)
