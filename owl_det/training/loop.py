"""The training loop: resume, batch, step, log, evaluate, save."""

import contextlib
import errno
import itertools
import time
from collections.abc import Generator, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from data_pipelines import batching
from data_pipelines.input import TrainInput
from data_pipelines.source import Source
from owl_det import config as config_lib
from owl_det import files, sharding
from owl_det.checkpoints import step_folders
from owl_det.checkpoints.adapt import adapt
from owl_det.checkpoints.load import load_model
from owl_det.checkpoints.store import Checkpoints
from owl_det.config import Config
from owl_det.config.resolve import check_attention
from owl_det.distillation import branches
from owl_det.distillation.teachers import Teachers, check_same_text, open_teachers
from owl_det.errors import ExitCode, UserError
from owl_det.evaluation import data_check
from owl_det.modeling import build
from owl_det.stop_signal import Stopped, StopSignal
from owl_det.training import gradients, memory, optim, step_shapes, train_step
from owl_det.training.evaluation import Evaluations
from owl_det.training.lease import Lease
from owl_det.training.metric_log import MetricLog
from owl_det.training.progress import Progress
from owl_det.training.step_profile import StepProfile
from owl_det.types import Batch, TrainState, batch_of

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


def run(config: Config, workdir: str, stop: StopSignal | None = None) -> ExitCode:
    """Trains to `config.num_steps`, from the latest checkpoint in `workdir` if there is one.

    Returns `ExitCode.DONE`, also where that step was reached before; or the code of `stop` (by
    default one of its own): told to stop, by SIGTERM or Ctrl-C, it finishes the step at hand, saves
    and leaves. Before its first step it leaves at once. Raises `UserError` for what a user can
    mend; a start that is refused leaves nothing behind.
    """
    folder = files.local(workdir, "--workdir")
    with contextlib.ExitStack() as stack:
        if stop is None:
            stop = stack.enter_context(StopSignal())
            stop.join_processes()
        try:
            return _run(config, folder, stop)
        except Stopped:
            logging.info("Stopped before the first step; the same command starts again")
            return stop.code
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise UserError(
                f"--workdir: {error.filename or folder} cannot be written ({error.strerror}); what "
                "was saved stays, and the same command goes on from there"
            ) from error


def _run(config: Config, folder: Path, stop: StopSignal) -> ExitCode:
    check_attention(config.model, jax.default_backend())
    logging.info("Devices: %d x %s", jax.device_count(), jax.devices()[0].device_kind)
    mesh = sharding.make_mesh(config.mesh)
    _check_before_reading(config, sharding.num_data_shards(mesh))
    if _is_done(config, folder):
        return ExitCode.DONE
    with _leased(folder) as lease:
        stop.before_leaving = lease.release if lease else lambda: None
        return _Training(config, folder, mesh, stop, lease).run()


class _Training:
    """One run, opened and checked; nothing is written before `run`."""

    def __init__(
        self, config: Config, folder: Path, mesh: Mesh, stop: StopSignal, lease: Lease | None
    ):
        self._config, self._folder, self._stop, self._lease = config, folder, stop, lease
        self._data = TrainInput(config)
        self._evaluations = Evaluations(config, mesh, stop.check)
        _check_data(config, self._data, self._evaluations.sources)
        opened = open_teachers(config, mesh)
        ids = opened.teacher_ids if opened else ()
        self._checkpoints = Checkpoints(folder, config, ids, self._data.names)
        self._state = _start(config, mesh, self._checkpoints, self._data.version, opened)
        self._first_step = int(self._state.step)
        self._step_fn = train_step.jit_train_step(config, mesh, self._state, opened)
        self._batches = _device_batches(self._data, self._first_step, config, mesh)

    def run(self) -> ExitCode:
        is_first = jax.process_index() == 0
        to_train = self._first_step < self._config.num_steps
        lacks_evaluation = self._first_step > 0 and _lacks_evaluation(
            self._config, self._folder, self._first_step
        )
        with contextlib.ExitStack() as stack:
            # TensorFlow's threads must be gone before the interpreter is: they call back into it.
            stack.callback(self._batches.close)
            # Made before anything is written: data that cannot be read is met here.
            batches = _with_first(self._batches) if to_train else iter(())
            if to_train and is_first:
                text = config_lib.to_json(self._config) + "\n"
                files.write_atomic(self._folder / "config.json", text)
            self._checkpoints.begin()
            stack.push(self._finish_saving)
            self._log = MetricLog(self._folder, self._first_step, is_first)
            stack.callback(self._log.close)
            self._profile = StepProfile(self._config.log, self._folder)
            stack.callback(lambda: self._profile.stop(self._state))
            self._progress = Progress(self._config, self._log, self._first_step)
            stack.callback(self._progress.close)
            if self._config.evaluation.before_training and self._first_step == 0:
                self._evaluate_before_training()
            if lacks_evaluation:  # killed between the save and its end
                self._evaluate(is_last=not to_train)
            code = self._steps(batches)
        if code != ExitCode.DONE:
            step = self._checkpoints.latest_step
            logging.info("Stopped: saved step %d; the same command goes on from there", step)
        return code

    def _steps(self, batches: Iterator[tuple[Batch, dict[str, int]]]) -> ExitCode:
        config = self._config
        for step in range(self._first_step + 1, config.num_steps + 1):
            self._profile.before(step, self._state)
            self._step(step, *next(batches))
            if self._lease:
                self._lease.check()
            is_last, is_stopped = step == config.num_steps, self._stop.is_set()
            # Saved first: what is evaluated may take longer than a preemption's notice.
            if _due(step, config.checkpoint.every_steps) or is_last or is_stopped:
                self._save()
            is_evaluated = _due(step, config.evaluation.every_steps) or is_last
            if is_stopped and not (is_last and not config.data.eval):
                return self._stopped()
            if is_evaluated:
                self._progress.flush()
                try:
                    self._evaluate(is_last)
                except Stopped:
                    self._save()
                    return self._stopped()
                self._progress.restart_clock()
        return ExitCode.DONE

    def _step(self, step: int, batch: Batch, counts: dict[str, int]) -> None:
        is_first = step == self._first_step + 1
        if is_first:
            logging.info("Compiling the training step, which takes minutes for a large model")
        started = time.perf_counter()
        self._state, metrics = self._step_fn(self._state, batch)
        if is_first:
            jax.block_until_ready(metrics)
            logging.info("Compiled in %.0f s", time.perf_counter() - started)
            memory.give_back_freed()  # of the compiler
            self._stop.may_leave = False
            self._progress.restart_clock()
        self._progress.add(step, metrics, counts)

    def _evaluate(self, is_last: bool) -> dict[str, dict[str, object]]:
        return self._evaluations.measure(self._state, self._folder, self._log, is_last=is_last)

    def _evaluate_before_training(self) -> None:
        from owl_det.evaluation import comparison

        summaries = self._evaluate(is_last=False)
        if jax.process_index() == 0:
            comparison.write_before(self._folder, summaries)

    def _save(self) -> None:
        self._progress.flush()  # so that no state after a NaN is ever saved
        self._checkpoints.save(self._state, self._data.version)

    def _stopped(self) -> ExitCode:
        self._checkpoints.wait()
        if jax.process_count() > 1:  # the launcher may end those that are not done when one is
            multihost_utils.sync_global_devices("stopped")
        return self._stop.code

    def _finish_saving(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Waits for what is being written; after another error, that one is reported."""
        del kind, traceback
        try:
            self._checkpoints.wait()
            self._checkpoints.close()
        except UserError as failure:
            if error is None:
                raise
            logging.warning("%s", failure)


# --- before a run --------------------------------------------------------------------------------


def _is_done(config: Config, folder: Path) -> bool:
    """True if the workdir is at the config's last step or beyond it, and has been evaluated."""
    latest = step_folders.latest_step(folder)
    step = _of_first_process(-1 if latest is None else latest)
    if step < config.num_steps:
        return False
    if step == config.num_steps and _lacks_evaluation(config, folder, step):
        return False
    logging.log(
        logging.INFO if step == config.num_steps else logging.WARNING,
        "%s is already at %s of %s steps: there is nothing to do; another run needs another "
        "--workdir, a longer one a larger config.num_steps",
        *(folder, f"{step:,}", f"{config.num_steps:,}"),
    )
    return True


@contextlib.contextmanager
def _leased(folder: Path) -> Generator[Lease | None, None, None]:
    """Holds the workdir, on process 0 for all. Raises `UserError` everywhere if it is taken."""
    lease, problem = None, ""
    if jax.process_index() == 0:
        try:
            lease = Lease(folder)
        except UserError as error:
            problem = str(error)
    if _of_first_process(bool(problem)):
        raise UserError(problem or f"--workdir: {folder}: process 0 says why it is refused")
    with lease or contextlib.nullcontext():
        yield lease


def _of_first_process(value: int) -> int:
    """The value that process 0 has; files may reach the others later."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.array(value, np.int32)))


def _check_data(config: Config, data: TrainInput, evaluated: Mapping[str, Source]) -> None:
    trained = dict(zip(config.data.train, data.sources, strict=True))
    data_check.log_what_was_read("train", trained)
    data_check.log_what_was_read("eval", evaluated)
    data_check.require_training_labels(config, trained)
    data_check.require_ground_truth(config, evaluated)
    schedule = config.schedule
    if schedule.warmup_steps >= config.num_steps:
        logging.warning(
            "config.schedule.warmup_steps: the warm-up of %d steps is no shorter than the run of "
            "%d: the learning rate never exceeds %.2g",
            *(schedule.warmup_steps, config.num_steps),
            config.optimizer.learning_rate * config.num_steps / schedule.warmup_steps,
        )


def _check_before_reading(config: Config, num_shards: int) -> None:
    """Raises `ConfigError` for what only branches, devices and the parameters' names tell."""
    branches.check(config)
    step_shapes.batch_shapes(config, num_shards)
    if config.optimizer.clip.scope in branches.PER_EXAMPLE:
        gradients.microbatch_size(config.optimizer.clip, config.batch_size // num_shards)
    params = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    optim.groups(params, config.optimizer)


def _lacks_evaluation(config: Config, folder: Path, step: int) -> bool:
    """True if an evaluation of this step was due and is not in the log; the same everywhere."""
    is_last = step >= config.num_steps
    if not config.data.eval or not (is_last or _due(step, config.evaluation.every_steps)):
        return False
    lacks = True
    if jax.process_index() == 0:
        file = folder / "metrics.jsonl"
        lines = files.read_text(file).splitlines() if file.exists() else []
        entries = (line for line in lines if line.startswith(f'{{"step": {step},'))
        # A line that was cut short has no end; the evaluation is done again.
        is_logged = any('"eval/' in line and line.endswith("}") for line in entries)
        is_written = not is_last or (folder / "eval" / "summary.json").exists()
        lacks = not (is_logged and is_written)
    return bool(_of_first_process(lacks))


# --- state and batches ---------------------------------------------------------------------------


def _start(
    config: Config,
    mesh: Mesh,
    checkpoints: Checkpoints,
    input_version: str,
    opened: Teachers | None,
) -> TrainState:
    """The state to train from: the latest checkpoint, other weights, or fresh ones."""
    teacher_dim = opened.teacher_dim if opened else 0
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
        loaded = load_model(config.checkpoint.init_from)
        params = jax.tree.map(np.asarray, adapt(loaded, config))
        logging.info("Starts from %s, step %d", config.checkpoint.init_from, loaded.step)
    if opened is not None:
        check_same_text(opened, params, config)
    if params is not None:
        return jax.jit(lambda p: init_state(params=p), out_shardings=placement)(params)
    return jax.jit(init_state, out_shardings=placement)()


def _device_batches(
    data: TrainInput, first_step: int, config: Config, mesh: Mesh
) -> Generator[tuple[Batch, dict[str, int]], None, None]:
    """Global batches on the mesh, and what was left out of this process's part."""
    placement = sharding.batch_sharding(mesh)
    host_batches = data.batches(
        first_step,
        num_data_shards=sharding.num_data_shards(mesh),
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


def _with_first(
    batches: Generator[tuple[Batch, dict[str, int]], None, None],
) -> Iterator[tuple[Batch, dict[str, int]]]:
    """The same batches, the first of which is made now."""
    first = next(batches)
    return itertools.chain([first], batches)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
