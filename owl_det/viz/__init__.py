"""What people look at: pictures of detections and features, and plots of metrics.

Pictures need Pillow alone. Plots are in `owl_det.viz.plots`: import that where plots are drawn, as
Matplotlib takes half a second.
"""

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
