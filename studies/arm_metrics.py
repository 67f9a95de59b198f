"""What finished arms leave in their folders, as the numbers that a result keeps of it."""

import json
import statistics
from pathlib import Path

from studies.study import Metrics

KEPT = (  # of every evaluation, for curves
    *("AP_base", "AP50_base", "AP50_novel", "AP50_novel_combination", "AP50_novel_word"),
    *("region_top1_base", "region_top1_novel_combination", "region_top1_novel_word"),
)


def read_training(folder: Path) -> Metrics:
    """The last evaluation, the curve up to it, and the median rate of training."""
    summary = json.loads((folder / "eval" / "summary.json").read_text())["datasets"]["shapes"]
    curve: dict[int, Metrics] = {}
    rates: list[float] = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "images_per_second" in entry:
            rates.append(entry["images_per_second"])
        kept = {key: entry[f"eval/shapes/{key}"] for key in KEPT if f"eval/shapes/{key}" in entry}
        if kept:
            curve.setdefault(entry["step"], {}).update(
                {key: round(value, 4) for key, value in kept.items()}
            )
    return {
        **_numbers(summary),
        "images_per_second": round(statistics.median(rates), 2) if rates else 0.0,
        "curve": [{"step": step, **values} for step, values in sorted(curve.items())],
    }


def _numbers(summary: Metrics) -> Metrics:
    return {key: value for key, value in summary.items() if isinstance(value, int | float)}


def read_annotation(folder: Path) -> Metrics:
    """Counts of the job, and how many of its boxes and hard negatives are right."""
    counts = json.loads((folder / "records" / "report.json").read_text())
    precision = json.loads((folder / "precision.json").read_text())
    keys = ("images", "recorded_images", "recorded_boxes", "kept_images", "kept_boxes")
    return {
        **{key: counts[key] for key in (*keys, "kept_by_space", "encoded_queries")},
        "groups": precision["groups"],
        "hard_negatives": precision["hard_negatives"],
    }


def read_sweep(folder: Path) -> Metrics:
    """The points, and how far the best lies above the straight line between the two ends."""
    points = json.loads((folder / "sweep.json").read_text())["points"]
    first, last = points[0], points[-1]

    def above(point: Metrics) -> float:
        w = point["weight"]
        return sum(
            point[f"{side}_AP50"] - (1 - w) * first[f"{side}_AP50"] - w * last[f"{side}_AP50"]
            for side in ("in_domain", "out_of_domain")
        )

    best = max(points[1:-1], key=above)
    return {"points": points, "best_weight": best["weight"], "above_line": round(above(best), 4)}


def read_evaluation(folder: Path) -> Metrics:
    """The numbers of `owl-det evaluate`."""
    return _numbers(json.loads((folder / "metrics.json").read_text()))


def read_towers(folder: Path) -> Metrics:
    """Accuracies of dense features by kind of region, and of whole pictures of single objects."""
    regions = json.loads((folder / "regions.json").read_text())
    whole = json.loads((folder / "whole.json").read_text())
    kept = {key: x for key, x in regions.items() if "_top" in key and isinstance(x, float)}
    return {**kept, "whole_top1": whole["recall_at_1"]}


def read_quality(folder: Path) -> Metrics:
    """What `studies.teacher_quality` wrote."""
    return json.loads((folder / "quality.json").read_text())


def read_teacher(folder: Path) -> Metrics:
    """Of both evaluation sets of the pretraining."""
    sets = json.loads((folder / "eval" / "summary.json").read_text())["datasets"]
    return {"zero_shot_top1": sets["image_text"]["zero_shot_top1"]}
