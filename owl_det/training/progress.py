"""What a training shows of itself: metrics in the log, a progress bar, losses that are checked."""

import time

import jax
import numpy as np
import psutil
from absl import logging

from owl_det import console
from owl_det.config import Config
from owl_det.errors import UserError
from owl_det.training.metric_log import MetricLog

_SHOWN = ("loss", "class", "l1", "giou", "objectness", "accuracy")


class DivergedError(UserError):
    """The loss is no finite number."""


class Progress:
    """Gathers the metrics of steps, without waiting for them, and shows them now and then."""

    def __init__(self, config: Config, log: MetricLog, first_step: int):
        self._config, self._log = config, log
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._counts: dict[str, int] = {}
        self._since = time.time()
        self._bar = console.progress(
            total=config.num_steps,
            initial=first_step,
            label="train",
            unit="step",
            is_shown=jax.process_index() == 0,
        )

    def add(self, step: int, metrics: dict[str, jax.Array], counts: dict[str, int]) -> None:
        """Every `log.every_steps` steps this is a `flush`."""
        self._pending.append((step, metrics))
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0) + value
        every = self._config.log.every_steps
        if every and step % every == 0:
            self.flush()

    def restart_clock(self) -> None:
        """Leaves the time since the last steps out of their rate."""
        self._since = time.time()

    def flush(self) -> None:
        """Waits for all steps so far, checks their losses and logs their means.

        Raises `DivergedError` at the first loss or gradient that is not finite.
        """
        if not self._pending:
            return
        values = jax.device_get(self._pending)
        self._pending = []
        for step, metrics in values:
            _require_finite(step, metrics)
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
        shown = [f"{n} {means[f'train/{n}']:.3f}" for n in _SHOWN if f"train/{n}" in means]
        # The bar is drawn when it moves, at most once a second.
        self._bar.set_postfix_str(
            f"{' '.join(shown)} | {rate:.0f} img/s | {memory:.1f} GiB", refresh=False
        )
        self._bar.update(last - self._bar.n)

    def close(self) -> None:
        self._bar.close()
        left_out = {name: count for name, count in self._counts.items() if count}
        if left_out:
            logging.info("Left out of the training examples: %s", left_out)


def _require_finite(step: int, metrics: dict[str, np.ndarray]) -> None:
    # A bad gradient has already reached the parameters: nothing may be saved from here on.
    if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["gradient_norm"])):
        parts = ", ".join(f"{k} {float(v):.3g}" for k, v in sorted(metrics.items()))
        raise DivergedError(
            f"loss or gradient is not finite at step {step} ({parts}); the last checkpoint is from "
            "before. Lower the learning rate or look at that step's data"
        )


def _memory_gib() -> float:
    """Peak memory of the first device where it is known, else what this process holds now."""
    stats = jax.local_devices()[0].memory_stats()
    used = (stats or {}).get("peak_bytes_in_use") or psutil.Process().memory_info().rss
    return used / 2**30
