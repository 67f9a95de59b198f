"""Where metrics go: a JSONL file always, TensorBoard through clu where it is installed."""

import json
import math
from pathlib import Path
from typing import Any

from absl import logging

from owl_det import files
from owl_det.errors import UserError
from owl_det.optional import is_installed


class MetricLog:
    """Writes scalars and pictures of the first process.

    Its methods raise `UserError` where nothing can be written, as on a full disk.
    """

    def __init__(self, workdir: Path, resumed_step: int, is_first: bool):
        """Lines after `resumed_step` in an older file belong to lost steps and are dropped."""
        self._workdir = workdir
        self._writer: Any = None
        self._file: Any = None
        if not is_first:
            return
        path = workdir / "metrics.jsonl"
        _truncate(path, resumed_step)
        self._file = files.open_append(path)
        if is_installed("clu") and is_installed("tensorflow"):
            from clu import metric_writers

            self._writer = self._written(metric_writers.SummaryWriter, str(workdir))
        else:
            logging.info("TensorFlow or clu is not installed: metrics go to %s only", path)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if self._file is None:
            return
        # NaN is no JSON; null keeps the line readable.
        line = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write((json.dumps({"step": step, **line}) + "\n").encode())
        self._file.flush()
        if self._writer is not None:
            self._written(self._writer.write_scalars, step, values)

    def picture(self, step: int, name: str, image: Any) -> None:
        if self._writer is not None:
            self._written(self._writer.write_images, step, {name: image[None]})

    def close(self) -> None:
        writer, file = self._writer, self._file
        self._writer = self._file = None
        try:
            if writer is not None:
                self._written(writer.close)
        finally:
            if file is not None:
                file.close()

    def _written(self, write: Any, *arguments: Any) -> Any:
        """Calls TensorFlow, which has errors of its own for a disk that takes nothing more."""
        try:
            return write(*arguments)
        except Exception as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{self._workdir}: TensorBoard's file cannot be written ({first}); what was saved "
                "stays, and the same command goes on from there"
            ) from error


def _truncate(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    before = files.read_text(path)
    lines = []
    for line in before.splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                lines.append(line)
        except (ValueError, KeyError, TypeError):
            break  # a kill cut the last line short
    kept = "".join(line + "\n" for line in lines)
    if kept != before:
        files.write_atomic(path, kept)
