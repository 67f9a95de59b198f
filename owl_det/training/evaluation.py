"""The evaluations of a training: every set measured, with summary, results and pictures."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from data_pipelines.open_source import open_source
from owl_det import files
from owl_det.config import Config
from owl_det.evaluation import comparison, image_text
from owl_det.evaluation.evaluate import DetectionEvaluator, summary
from owl_det.evaluation.image_text import ImageTextEvaluator
from owl_det.modeling import build
from owl_det.training.metric_log import MetricLog
from owl_det.types import TrainState


def open_all(
    config: Config, mesh: Mesh, before_batch: Callable[[], None] = lambda: None
) -> list[DetectionEvaluator | ImageTextEvaluator]:
    """The evaluations of `config.data.eval`; each calls `before_batch` before a batch.

    Raises `DataError` if a data set is missing, malformed or empty.
    """
    detector = build.make_detector(config)
    settings = dataclasses.replace(
        config.evaluation, batch_size=config.evaluation.batch_size or config.batch_size
    )
    make = DetectionEvaluator if config.task == "detection" else ImageTextEvaluator
    evaluations = [
        make(
            detector,
            open_source(entry, config.data.path),
            mesh,
            name,
            settings=settings,
            eval_prompts=config.data.eval_prompts,
            tokenizer_file=config.data.tokenizer,
        )
        for name, entry in config.data.eval.items()
    ]
    for evaluation in evaluations:
        evaluation.loader.before_batch = before_batch
    return evaluations


def evaluate(
    evaluations: Sequence[DetectionEvaluator | ImageTextEvaluator],
    state: TrainState,
    folder: Path,
    log: MetricLog,
    is_last: bool,
) -> dict[str, dict[str, Any]]:
    """Measures every evaluation set; writes summary, results and pictures.

    Returns the summaries by evaluation set (on process 0).
    """
    from owl_det.viz import plots

    summaries: dict[str, dict[str, Any]] = {}
    (folder / "eval").mkdir(exist_ok=True)
    (folder / "pictures").mkdir(exist_ok=True)
    for measure in evaluations:
        if isinstance(measure, ImageTextEvaluator):
            entry = _measure_towers(measure, state, log)
        else:
            entry = _measure_detection(measure, state, folder, log, is_last)
        if jax.process_index() == 0:
            summaries[measure.name] = entry
    if summaries and jax.process_index() == 0:
        first = next(iter(summaries.values()))
        text = json.dumps({**first, "datasets": summaries}, indent=2) + "\n"
        files.write_atomic(folder / "eval" / "summary.json", text)
        if is_last and (folder / "metrics.jsonl").exists():
            plots.plot_training_curve(
                folder / "pictures" / "training_curve.png", folder / "metrics.jsonl"
            )
        if is_last:
            comparison.write_table(folder, summaries)
    return summaries


def _measure_towers(
    measure: ImageTextEvaluator, state: TrainState, log: MetricLog
) -> dict[str, Any]:
    started = time.time()
    values = measure(build.model_params(state.params))
    step = int(state.step)
    log.scalars(step, {f"eval/{measure.name}/{key}": value for key, value in values.items()})
    shown = [f"{key} {value:.3f}" for key, value in values.items() if "top1" in key or "_r1" in key]
    logging.info("Step %d, %s: %s", step, measure.name, ", ".join(shown))
    return image_text.summary(measure, values, step, time.time() - started)


def _measure_detection(
    measure: DetectionEvaluator, state: TrainState, folder: Path, log: MetricLog, is_last: bool
) -> dict[str, Any]:
    """The summary of one set, on process 0; results and pictures go to the workdir."""
    from owl_det import viz
    from owl_det.evaluation import pictures

    started, step, name = time.time(), int(state.step), measure.name
    result = measure(build.model_params(state.params))
    if jax.process_index() != 0:
        return {}
    evaluator = result.evaluator
    metrics = evaluator.compute()
    entry = summary(measure, result, metrics, step, time.time() - started)
    scalars = metrics.scalars() | (result.regions.scalars() if result.regions else {})
    log.scalars(step, {f"eval/{name}/{key}": value for key, value in scalars.items()})
    evaluator.write_results(folder / "eval" / f"results_{name}.json")
    if result.pictures:
        picture = pictures.sheet(result.pictures)
        viz.save_png(folder / "pictures" / f"{name}_{step:07d}.png", picture)
        log.picture(step, f"pictures/{name}", picture)
    logging.info("Step %d, %s: AP %.3f, AP50 %.3f", step, name, scalars["AP"], scalars["AP50"])
    if is_last:
        pictures.write_plots(folder / "pictures", name, evaluator, metrics)
    return entry
