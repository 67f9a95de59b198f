"""The training loop: resume, batch, step, log, evaluate, save."""

import contextlib
import errno
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import jax
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from data_pipelines.input import TrainInput
from owl_det import config as config_lib
from owl_det import files, sharding
from owl_det.checkpoints.store import Checkpoints
from owl_det.config import Config
from owl_det.config.resolve import check_attention
from owl_det.errors import ExitCode, UserError
from owl_det.stop_signal import Stopped, StopSignal
from owl_det.training import memory, train_step
from owl_det.training.device_batches import device_batches, with_first
from owl_det.training.evaluation import Evaluations
from owl_det.training.initial_state import initial_state
from owl_det.training.lease import Lease, leased
from owl_det.training.metric_log import MetricLog
from owl_det.training.progress import Progress
from owl_det.training.start_checks import (
    check_before_reading,
    check_data,
    is_done,
    is_due,
    lacks_evaluation,
)
from owl_det.training.step_profile import StepProfile
from owl_det.types import Batch

if TYPE_CHECKING:
    from data_pipelines.teacher_cache import CacheRequest
    from owl_det.distillation.branch import Teachers

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
    check_before_reading(config, sharding.num_data_shards(mesh))
    if is_done(config, folder):
        return ExitCode.DONE
    with leased(folder) as lease:
        stop.before_leaving = lease.release if lease else lambda: None
        return _Training(config, folder, mesh, stop, lease).run()


class _Training:
    """One run, opened and checked; nothing is written before `run`."""

    def __init__(
        self, config: Config, folder: Path, mesh: Mesh, stop: StopSignal, lease: Lease | None
    ):
        self._config, self._folder, self._stop, self._lease = config, folder, stop, lease
        self._data = TrainInput(config, _cache_request(config))
        self._evaluations = Evaluations(config, mesh, stop.check)
        check_data(config, self._data, self._evaluations.sources)
        opened = _open_teachers(config, mesh)
        ids = opened.teacher_ids if opened else ()
        self._checkpoints = Checkpoints(folder, config, ids, self._data.names)
        self._state = initial_state(config, mesh, self._checkpoints, self._data.version, opened)
        self._first_step = int(self._state.step)
        self._step_fn = train_step.jit_train_step(config, mesh, self._state, opened)
        self._batches = device_batches(self._data, self._first_step, config, mesh)

    def run(self) -> ExitCode:
        is_first = jax.process_index() == 0
        to_train = self._first_step < self._config.num_steps
        is_unevaluated = self._first_step > 0 and lacks_evaluation(
            self._config, self._folder, self._first_step
        )
        with contextlib.ExitStack() as stack:
            # TensorFlow's threads must be gone before the interpreter is: they call back into it.
            stack.callback(self._batches.close)
            # Made before anything is written: data that cannot be read is met here.
            batches = with_first(self._batches) if to_train else iter(())
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
            if is_unevaluated:  # killed between the save and its end
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
            if is_due(step, config.checkpoint.every_steps) or is_last or is_stopped:
                self._save()
            is_evaluated = is_due(step, config.evaluation.every_steps) or is_last
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


def _cache_request(config: Config) -> "CacheRequest | None":
    if not config.distill.active():
        return None
    from owl_det.distillation.cache_request import cache_request

    return cache_request(config)


def _open_teachers(config: Config, mesh: Mesh) -> "Teachers | None":
    if not config.distill.active():
        return None
    from owl_det.distillation.teachers import open_teachers

    return open_teachers(config, mesh)
