"""Metrics of each category: what is written of them, and the table that is printed."""

from collections.abc import Mapping, Sequence
from typing import Any

from owl_det.evaluation.metrics import Metrics

MAX_ROWS = 40  # beyond, the best and the worst are shown
NUM_ENDS = 10  # of these each

_KEYS = ("AP_by_category", "AP50_by_category", "instances_by_category")


def content(metrics: Metrics) -> dict[str, dict[str, float]]:
    """AP and AP50 in [0, 1] with 6 digits, and numbers of true boxes, by name.

    Categories without true boxes have no AP and are left out.
    """
    tables = (metrics.AP_by_category, metrics.AP50_by_category, metrics.instances_by_category)
    return {
        key: {name: round(value, 6) for name, value in table.items()}
        for key, table in zip(_KEYS, tables, strict=True)
    }


def rows(summary: Mapping[str, Any]) -> list[Sequence[str]]:
    """Cells of a table in percent, header first: all categories in order, or the two ends by AP."""
    ap, ap50, instances = (summary[key] for key in _KEYS)
    names = list(ap)
    is_cut = len(names) > MAX_ROWS
    if is_cut:
        ranked = sorted(names, key=lambda name: -ap[name])
        names = [*ranked[:NUM_ENDS], *ranked[-NUM_ENDS:]]
    cells: list[Sequence[str]] = [
        (name, f"{100 * ap[name]:.2f}", f"{100 * ap50[name]:.2f}", f"{instances[name]:,}")
        for name in names
    ]
    if is_cut:
        cells.insert(NUM_ENDS, (f"… {len(ap) - 2 * NUM_ENDS:,} more", "", "", ""))
    return [("class", "AP", "AP50", "instances"), *cells]
