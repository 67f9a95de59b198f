"""Where metrics go: a JSONL file always, TensorBoard through clu where it is installed."""

import json
import math
from pathlib import Path
from typing import Any

from absl import logging

from owl_det.optional import is_installed


class MetricLog:
    """Writes scalars and pictures of the first process."""

    def __init__(self, workdir: Path, resumed_step: int, is_first: bool):
        """Lines after `resumed_step` in an older file belong to lost steps and are dropped."""
        self._writer: Any = None
        self._file: Any = None
        if not is_first:
            return
        path = workdir / "metrics.jsonl"
        _truncate(path, resumed_step)
        self._file = path.open("a")
        if is_installed("clu") and is_installed("tensorflow"):
            from clu import metric_writers

            self._writer = metric_writers.SummaryWriter(str(workdir))
        else:
            logging.info("TensorFlow or clu is not installed: metrics go to %s only", path)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if self._file is None:
            return
        # NaN is no JSON; null keeps the line readable.
        line = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()
        if self._writer is not None:
            self._writer.write_scalars(step, values)

    def picture(self, step: int, name: str, image: Any) -> None:
        if self._writer is not None:
            self._writer.write_images(step, {name: image[None]})

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._file is not None:
            self._file.close()


def _truncate(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    lines = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                lines.append(line)
        except (ValueError, KeyError):
            break  # a kill cut the last line short
    path.write_text("".join(line + "\n" for line in lines))
