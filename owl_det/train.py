"""The training loop: resume, batch, step, log, evaluate, save."""

import dataclasses
import json
import signal
import time
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from data_pipelines import batching
from data_pipelines import source as source_lib
from data_pipelines.input import TrainInput
from owl_det import checkpoint, lesson, memory, optim, sharding, step_shapes, teachers, train_step
from owl_det import config as config_lib
from owl_det.checkpoint import Checkpoints
from owl_det.config import Config
from owl_det.errors import ConfigError, UserError
from owl_det.evaluation import comparison, image_text
from owl_det.evaluation.evaluate import Evaluate, summary
from owl_det.evaluation.image_text import EvaluateTowers
from owl_det.losses import branches
from owl_det.metric_log import MetricLog
from owl_det.resolve import check_attention
from owl_det.types import Batch, Teaching, TrainState, batch_of


class DivergedError(UserError):
    """The loss is no finite number."""


def run(config: Config, workdir: str) -> None:
    """Trains to `config.num_steps`, from the latest checkpoint in `workdir` if there is one.

    Raises `UserError` for what a user can mend. On SIGTERM, from this moment on, it finishes the
    step (or the first one), saves and returns.
    """
    if "://" in workdir:
        raise ConfigError(
            f"--workdir: {workdir} is an address; mount that storage and name the folder"
        )
    stop = _StopSignal()
    try:
        _train(config, Path(workdir), stop)
    finally:
        stop.restore()


def _train(config: Config, folder: Path, stop: "_StopSignal") -> None:
    check_attention(config.model, jax.default_backend())
    logging.info("Devices: %d x %s", jax.device_count(), jax.devices()[0].device_kind)
    mesh = sharding.make_mesh(config.mesh)
    _check_before_reading(config, sharding.num_data_shards(mesh))
    data = TrainInput(config)
    evaluations = _open_evaluations(config, mesh)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir: {folder}: {error.strerror}") from None
    teaching = teachers.open_teachers(config, mesh)
    checkpoints = Checkpoints(folder, config, teaching.teacher_ids if teaching else ())
    state = _start(config, mesh, checkpoints, data.version, teaching)
    first_step = int(state.step)
    if jax.process_index() == 0:
        (folder / "config.json").write_text(config_lib.to_json(config) + "\n")
    lacks_evaluation = first_step > 0 and _lacks_evaluation(config, folder, first_step)
    log = MetricLog(folder, first_step, jax.process_index() == 0)
    step_fn = train_step.jit_train_step(config, mesh, state, teaching)
    batches = _device_batches(data, first_step, config, mesh)
    progress = _Progress(config, log, first_step)
    profile = _Profile(config, folder)
    try:
        if config.evaluation.before_training and first_step == 0:
            before = evaluate(evaluations, state, folder, log, is_last=False)
            if jax.process_index() == 0:
                comparison.write_before(folder, before)
        if lacks_evaluation:  # killed between the save and its end
            evaluate(evaluations, state, folder, log, first_step >= config.num_steps)
        for step in range(first_step + 1, config.num_steps + 1):
            profile.before(step, state)
            batch, counts = next(batches)
            state, metrics = step_fn(state, batch)
            if step == first_step + 1:
                memory.give_back_freed()  # of the compiler
            progress.add(step, metrics, counts)
            is_last = step == config.num_steps
            # Saved first: what is evaluated may take longer than a preemption's notice.
            is_saved = _due(step, config.checkpoint.every_steps) or is_last
            if is_saved or stop.is_set(step):
                progress.flush()  # so that no state after a NaN is ever saved
                checkpoints.save(state, data.version)
            if stop.is_set(step):
                logging.info("SIGTERM: saved step %d; the same command goes on from there", step)
                return
            if _due(step, config.evaluation.every_steps) or is_last:
                progress.flush()
                evaluate(evaluations, state, folder, log, is_last)
                progress.restart_clock()
    finally:
        # TensorFlow's threads must be gone before the interpreter is: they call back into it.
        batches.close()
        progress.close()
        checkpoints.wait()
        checkpoints.close()
        log.close()
        profile.stop(state)


def evaluate(
    evaluations: Sequence[Evaluate | EvaluateTowers],
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
        if isinstance(measure, EvaluateTowers):
            entry = _measure_towers(measure, state, log)
        else:
            entry = _measure_detection(measure, state, folder, log, is_last)
        if jax.process_index() == 0:
            summaries[measure.name] = entry
    if summaries and jax.process_index() == 0:
        first = next(iter(summaries.values()))
        text = json.dumps({**first, "datasets": summaries}, indent=2) + "\n"
        temporary = folder / "eval" / "summary.json.tmp"
        temporary.write_text(text)
        temporary.replace(folder / "eval" / "summary.json")
        if is_last and (folder / "metrics.jsonl").exists():
            plots.plot_training_curve(
                folder / "pictures" / "training_curve.png", folder / "metrics.jsonl"
            )
        if is_last:
            comparison.write_table(folder, summaries)
    return summaries


def _measure_towers(measure: EvaluateTowers, state: TrainState, log: MetricLog) -> dict[str, Any]:
    started = time.time()
    values = measure(lesson.model_params(state.params))
    step = int(state.step)
    log.scalars(step, {f"eval/{measure.name}/{key}": value for key, value in values.items()})
    shown = [f"{key} {value:.3f}" for key, value in values.items() if "top1" in key or "_r1" in key]
    logging.info("Step %d, %s: %s", step, measure.name, ", ".join(shown))
    return image_text.summary(measure, values, step, time.time() - started)


def _measure_detection(
    measure: Evaluate, state: TrainState, folder: Path, log: MetricLog, is_last: bool
) -> dict[str, Any]:
    """The summary of one set, on process 0; results and pictures go to the workdir."""
    from owl_det import viz
    from owl_det.evaluation import pictures

    started, step, name = time.time(), int(state.step), measure.name
    result = measure(lesson.model_params(state.params))
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


def _open_evaluations(config: Config, mesh: Mesh) -> list[Evaluate | EvaluateTowers]:
    detector = train_step.make_detector(config)
    settings = dataclasses.replace(
        config.evaluation, batch_size=config.evaluation.batch_size or config.batch_size
    )
    make = Evaluate if config.task == "detection" else EvaluateTowers
    return [
        make(
            detector,
            source_lib.build(entry, config.data.path),
            mesh,
            name,
            settings=settings,
            eval_prompts=config.data.eval_prompts,
            tokenizer_file=config.data.tokenizer,
        )
        for name, entry in config.data.eval.items()
    ]


def _start(
    config: Config,
    mesh: Mesh,
    checkpoints: Checkpoints,
    input_version: str,
    teaching: Teaching | None,
) -> TrainState:
    """The state to train from: the latest checkpoint, other weights, or fresh ones."""
    teacher_dim = teaching.teacher_dim if teaching else 0
    init_state = partial(train_step.init_state, config, teacher_dim=teacher_dim)
    shapes = jax.eval_shape(init_state)
    placement = sharding.state_shardings(shapes, shapes.params, mesh)
    optim.groups(shapes.params, config.optimizer)
    if checkpoints.latest_step is not None:
        template = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placement
        )
        state = checkpoints.restore(template, input_version)
        logging.info("Resumed at step %d", int(state.step))
        return state
    params = None
    if config.checkpoint.init_from:
        loaded = checkpoint.load_model(config.checkpoint.init_from)
        params = jax.tree.map(np.asarray, checkpoint.adapt(loaded, config))
        logging.info("Starts from %s, step %d", config.checkpoint.init_from, loaded.step)
    if teaching is not None:
        teachers.check_same_text(teaching, params, config)
    if params is not None:
        return jax.jit(lambda p: init_state(params=p), out_shardings=placement)(params)
    return jax.jit(init_state, out_shardings=placement)()


def _check_before_reading(config: Config, num_shards: int) -> None:
    """Raises `ConfigError` for what only the devices and the parameters' names tell."""
    step_shapes.batch_shapes(config, num_shards)
    if config.optimizer.clip.scope in branches.PER_EXAMPLE:
        train_step.microbatch_size(config.optimizer.clip, config.batch_size // num_shards)
    params = jax.eval_shape(lambda: train_step.init_params(config, jax.random.key(0)))
    optim.groups(params, config.optimizer)


def _lacks_evaluation(config: Config, folder: Path, step: int) -> bool:
    """True if an evaluation of this step was due and is not in the log; the same everywhere."""
    is_last = step >= config.num_steps
    if not (is_last or _due(step, config.evaluation.every_steps)):
        return False
    lacks = np.array(True)
    if jax.process_index() == 0:
        file = folder / "metrics.jsonl"
        lines = file.read_text("utf-8").splitlines() if file.exists() else []
        entries = (line for line in lines if line.startswith(f'{{"step": {step},'))
        # A line that was cut short has no end; the evaluation is done again.
        is_logged = any('"eval/' in line and line.endswith("}") for line in entries)
        is_written = not is_last or (folder / "eval" / "summary.json").exists()
        lacks = np.array(not (is_logged and is_written))
    if jax.process_count() > 1:
        lacks = multihost_utils.broadcast_one_to_all(lacks)
    return bool(lacks)


def _device_batches(
    data: TrainInput, first_step: int, config: Config, mesh: Mesh
) -> Generator[tuple[Batch, dict[str, int]], None, None]:
    """Global batches on the mesh, and what was left out of this process's part."""
    placement = sharding.batch_sharding(mesh)
    host_batches = data.batches(
        first_step,
        num_shards=sharding.num_data_shards(mesh),
        process=jax.process_index(),
        num_processes=jax.process_count(),
    )
    try:
        for arrays in host_batches:
            totals = arrays["counts"].sum(0).tolist()
            batch = jax.tree.map(
                lambda x: jax.make_array_from_process_local_data(placement, x), batch_of(arrays)
            )
            yield batch, dict(zip(batching.COUNTS, totals, strict=True))
    finally:
        host_batches.close()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _Profile:
    """Records the steps that `config.log.profile_*` name, for TensorBoard's profiler."""

    def __init__(self, config: Config, folder: Path):
        self._first = config.log.profile_start + 1
        self._num_steps = config.log.profile_steps
        self._folder = folder / "profile"
        self._is_running = False

    def before(self, step: int, state: TrainState) -> None:
        """Starts before the first of the steps, stops before the one after the last."""
        if self._is_running and step >= self._first + self._num_steps:
            self.stop(state)
        if self._num_steps and step == self._first:
            jax.block_until_ready(state.step)
            jax.profiler.start_trace(str(self._folder))
            self._is_running = True

    def stop(self, state: TrainState) -> None:
        """Waits for the steps that run and writes the profile; nothing if there is none."""
        if self._is_running:
            if not state.step.is_deleted():  # as after a step that failed
                jax.block_until_ready(state.step)
            jax.profiler.stop_trace()
            self._is_running = False


class _StopSignal:
    """Remembers SIGTERM; several processes agree on the step they stop at."""

    def __init__(self) -> None:
        self._received = False
        self._is_alone = jax.process_count() == 1
        if self._is_alone:
            self._previous = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_: Any) -> None:
        self._received = True

    def is_set(self, step: int) -> bool:
        if self._is_alone:
            return self._received
        return self._received or self._agree(step)

    def _agree(self, step: int) -> bool:
        self._received = multihost_utils.reached_preemption_sync_point(step)
        return self._received

    def restore(self) -> None:
        if self._is_alone:
            signal.signal(signal.SIGTERM, self._previous)


class _Progress:
    """Gathers the metrics of steps, without waiting for them, and shows them now and then."""

    def __init__(self, config: Config, log: MetricLog, first_step: int):
        self._config, self._log = config, log
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._counts: dict[str, int] = {}
        self._since = time.time()
        self._bar = tqdm(
            total=config.num_steps,
            initial=first_step,
            unit="step",
            disable=jax.process_index() != 0,
            mininterval=1.0,
        )

    def add(self, step: int, metrics: dict[str, jax.Array], counts: dict[str, int]) -> None:
        self._pending.append((step, metrics))
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0) + value
        if _due(step, self._config.log.every_steps):
            self.flush()

    def restart_clock(self) -> None:
        """Leaves the time since the last steps out of their rate."""
        self._since = time.time()

    def flush(self) -> None:
        """Waits for all steps so far, checks their losses and logs their means."""
        if not self._pending:
            return
        values = jax.device_get(self._pending)
        self._pending = []
        for step, metrics in values:
            # A bad gradient has already reached the parameters: nothing may be saved from here on.
            if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["gradient_norm"])):
                parts = ", ".join(f"{k} {float(v):.3g}" for k, v in sorted(metrics.items()))
                raise DivergedError(
                    f"loss or gradient is not finite at step {step} ({parts}); the last checkpoint "
                    "is from before. Lower the learning rate or look at that step's data"
                )
        now = time.time()
        rate = len(values) * self._config.batch_size / max(now - self._since, 1e-9)
        self._since = now
        means = {
            f"train/{name}": float(np.mean([metrics[name] for _, metrics in values]))
            for name in values[-1][1]
        }
        last = values[-1][0]
        counts = {f"count/{name}": value for name, value in self._counts.items()}
        memory = _memory_gib()
        self._log.scalars(
            last, {**means, **counts, "images_per_second": rate, "memory_gib": memory}
        )
        self._bar.update(last - self._bar.n)
        self._bar.set_postfix_str(
            " ".join(
                f"{name} {means[f'train/{name}']:.3f}"
                for name in ("loss", "class", "l1", "giou", "objectness", "accuracy")
                if f"train/{name}" in means
            )
            + f" | {rate:.0f} img/s | {memory:.1f} GiB"
        )

    def close(self) -> None:
        self._bar.close()
        left_out = {name: count for name, count in self._counts.items() if count}
        if left_out:
            logging.info("Left out of the training examples: %s", left_out)


def _memory_gib() -> float:
    """Peak memory of the first device where it is known, else what this process holds now."""
    stats = jax.local_devices()[0].memory_stats()
    used = (stats or {}).get("peak_bytes_in_use") or psutil.Process().memory_info().rss
    return used / 2**30
