"""A profile of some steps of a training, for TensorBoard's profiler."""

from pathlib import Path

import jax

from owl_det.config import LogConfig
from owl_det.types import TrainState


class StepProfile:
    """Records the steps that `config.log.profile_*` name."""

    def __init__(self, config: LogConfig, workdir: Path):
        self._first = config.profile_start + 1
        self._num_steps = config.profile_steps
        self._folder = workdir / "profile"
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
