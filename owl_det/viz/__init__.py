"""What people look at: pictures of detections and features, and plots of metrics.

Pictures need Pillow alone. Plots are in `owl_det.viz.plots`: import that where plots are drawn, as
Matplotlib takes half a second. What is named here is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from owl_det.viz.detections import choose, draw_best, draw_detections
    from owl_det.viz.features import draw_clusters, draw_heat, show
    from owl_det.viz.pictures import pair, picture_grid, save_png, titled, with_note

__all__ = [
    "choose",
    "draw_best",
    "draw_clusters",
    "draw_detections",
    "draw_heat",
    "pair",
    "picture_grid",
    "save_png",
    "show",
    "titled",
    "with_note",
]

_NAMES = {
    "detections": ("choose", "draw_best", "draw_detections"),
    "features": ("draw_clusters", "draw_heat", "show"),
    "pictures": ("pair", "picture_grid", "save_png", "titled", "with_note"),
}


def __getattr__(name: str) -> Any:
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
