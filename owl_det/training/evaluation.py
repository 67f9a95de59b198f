"""The evaluations of a training: every set measured, with summary, results and pictures."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from absl import logging
from jax.sharding import Mesh

from data_pipelines.open_source import open_source
from owl_det import files
from owl_det.config import Config
from owl_det.evaluation import data_check
from owl_det.modeling import build
from owl_det.training.metric_log import MetricLog
from owl_det.types import TrainState

if TYPE_CHECKING:
    from owl_det.evaluation.evaluator import Evaluator


class Evaluations:
    """The sets of `config.data.eval`, opened; what measures them is made when it is first due.

    `before_batch` is called before every batch; what it raises ends the evaluation. Raises
    `DataError` if a data set is missing, malformed or empty.
    """

    def __init__(
        self, config: Config, mesh: Mesh, before_batch: Callable[[], None] = lambda: None
    ) -> None:
        self._config, self._mesh, self._before_batch = config, mesh, before_batch
        self.sources = {
            name: open_source(entry, config.data.path) for name, entry in config.data.eval.items()
        }
        for source in self.sources.values():
            data_check.require_files(source, config.evaluation.max_images)
        self._evaluators: list[Evaluator] = []

    def measure(
        self, state: TrainState, workdir: Path, log: MetricLog, *, is_last: bool
    ) -> dict[str, dict[str, Any]]:
        """Measures every set; writes summary, results and pictures, and plots if `is_last`.

        Returns the summaries by set (on process 0).
        """
        self._evaluators = self._evaluators or self._made()
        summaries: dict[str, dict[str, Any]] = {}
        (workdir / "eval").mkdir(exist_ok=True)
        (workdir / "pictures").mkdir(exist_ok=True)
        for evaluator in self._evaluators:
            entry = _measure(evaluator, state, workdir, log, is_last)
            if entry is not None:
                summaries[evaluator.name] = entry
        if summaries:
            _write(summaries, workdir, is_last)
        return summaries

    def _made(self) -> "list[Evaluator]":
        """One evaluator for each set."""
        config = self._config
        make = _evaluator_class(config.has_heads)
        detector = build.make_detector(config)
        settings = dataclasses.replace(
            config.evaluation, batch_size=config.evaluation.batch_size or config.batch_size
        )
        evaluators = [
            make(
                detector,
                source,
                self._mesh,
                name,
                settings=settings,
                eval_prompts=config.data.eval_prompts,
                tokenizer_file=config.data.tokenizer,
            )
            for name, source in self.sources.items()
        ]
        for evaluator in evaluators:
            evaluator.loader.before_batch = self._before_batch
        return evaluators


def _evaluator_class(has_heads: bool) -> "Callable[..., Evaluator]":
    """Only what a detector, or towers, need is imported."""
    if has_heads:
        from owl_det.evaluation.evaluate import DetectionEvaluator

        return DetectionEvaluator
    from owl_det.evaluation.image_text import ImageTextEvaluator

    return ImageTextEvaluator


def _measure(
    evaluator: "Evaluator", state: TrainState, workdir: Path, log: MetricLog, is_last: bool
) -> dict[str, Any] | None:
    """The summary of one set; results and pictures go to the workdir. None beyond process 0."""
    from owl_det.evaluation.evaluator import summary

    started, step, name = time.time(), int(state.step), evaluator.name
    measurement = evaluator(build.model_params(state.params))
    if jax.process_index() != 0:
        return None
    scalars = measurement.scalars()
    entry = summary(evaluator, measurement, step, time.time() - started)
    log.scalars(step, {f"eval/{name}/{key}": value for key, value in scalars.items()})
    picture = measurement.write(workdir, name, step, with_plots=is_last)
    if picture is not None:
        log.picture(step, f"pictures/{name}", picture)
    logging.info("Step %d, %s: %s", step, name, measurement.headline())
    return entry


def _write(summaries: dict[str, dict[str, Any]], workdir: Path, is_last: bool) -> None:
    """Writes eval/summary.json; after the last step also the curve, and what training changed."""
    first = next(iter(summaries.values()))
    text = json.dumps({**first, "datasets": summaries}, indent=2) + "\n"
    files.write_atomic(workdir / "eval" / "summary.json", text)
    if not is_last:
        return
    from owl_det.evaluation import comparison
    from owl_det.viz import plots

    log = workdir / "metrics.jsonl"
    if log.exists():
        plots.plot_training_curve(workdir / "pictures" / "training_curve.png", log)
    comparison.write_table(workdir, summaries)
