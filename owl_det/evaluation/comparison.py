"""What a training changed: the metrics before the first step beside those after the last."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from owl_det import files

BEFORE = "before.json"  # in the folder eval of a workdir
TABLE = "before_after.json"

# Of a summary, what is no metric.
_FACTS = ("step", "num_images", "num_instances", "unreadable_images", "seconds")

Summaries = Mapping[str, Mapping[str, Any]]  # by evaluation set; metrics and facts by name


def write_before(workdir: Path, summaries: Summaries) -> None:
    """Keeps the metrics before the first step, so that a resumed run has them too."""
    _write(workdir / "eval" / BEFORE, summaries)


def write_table(workdir: Path, after: Summaries) -> None:
    """Logs and writes the comparison; nothing if nothing was measured before the first step."""
    file = workdir / "eval" / BEFORE
    if not file.exists():
        return
    rows = compare(json.loads(files.read_text(file)), after)
    _write(workdir / "eval" / TABLE, rows)
    for line in table(rows):
        logging.info("%s", line)


def compare(before: Summaries, after: Summaries) -> list[dict[str, Any]]:
    """One row for each metric that both have: dataset, metric, before, after, change."""
    return [
        {
            "dataset": dataset,
            "metric": name,
            "before": before[dataset][name],
            "after": value,
            "change": round(value - before[dataset][name], 6),
        }
        for dataset, summary in after.items()
        for name, value in summary.items()
        if isinstance(value, float) and name not in _FACTS and name in before.get(dataset, {})
    ]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of a Markdown table."""
    return [
        "| data set | metric | before | after | change |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {row['dataset']} | {row['metric']} | {row['before']:.3f} | {row['after']:.3f} | "
            f"{row['change']:+.3f} |"
            for row in rows
        ),
    ]


def _write(file: Path, value: Any) -> None:
    files.write_atomic(file, json.dumps(value, indent=2) + "\n")
