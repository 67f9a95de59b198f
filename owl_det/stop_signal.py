"""SIGTERM and Ctrl-C during a training: the step at hand is finished and saved."""

import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from owl_det.errors import ExitCode

GRACE_SECONDS = 3.0  # then a compilation, which Python cannot break off, is left by force


class Stopped(BaseException):
    """Told to stop; no `Exception`, so that nobody on the way takes it for a failure."""


class StopSignal:
    """Remembers that the run was told to stop; several processes agree on when they do.

    A context manager: within it signals are caught, afterwards they do what they did before.
    Outside the main thread, where Python gets no signals, none is caught.
    """

    def __init__(self, *, ends_process: bool = False) -> None:
        """With `ends_process` what Python cannot break off is left by force.

        A second Ctrl-C does so at once; the first signal, a few seconds later, where `may_leave`.
        """
        self.code = ExitCode.UNFINISHED  # of a run that was stopped
        self.may_leave = True  # nothing has been computed yet that a checkpoint would keep
        self.before_leaving: Callable[[], None] = lambda: None
        self._ends_process = ends_process
        self._is_alone = True
        self._received = False
        self._agreed = False
        self._num_questions = 0
        self._previous: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as after nohup
                    self._previous[number] = signal.signal(number, self._receive)
            if self._ends_process:
                self._watch()
        return self

    def __exit__(self, *_: object) -> None:
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._pipe[1])  # ends the watching thread
            self._pipe = None
        for number, handler in self._previous.items():
            # JAX has taken SIGTERM where it joined other processes, and keeps it.
            if signal.getsignal(number) == self._receive:
                is_leaving = self._received and self._ends_process
                signal.signal(number, signal.SIG_IGN if is_leaving else handler)

    def join_processes(self) -> None:
        """To be called once JAX knows of the other processes: from now on they stop together."""
        import jax

        self._is_alone = jax.process_count() == 1

    def is_set(self) -> bool:
        """True from the step on at which the run shall stop; all processes must ask equally often.

        Of several processes SIGTERM is caught by JAX, which agrees on the question that is the
        first to be answered with yes.
        """
        if self._is_alone:
            return self._received
        if not self._agreed:
            from jax.experimental import multihost_utils

            self._num_questions += 1
            self._agreed = multihost_utils.reached_preemption_sync_point(self._num_questions)
        return self._agreed

    @property
    def breaks_off(self) -> bool:
        """True once a signal has ended what was going on; compiled code makes errors of that."""
        return self._received and self._is_alone and self.may_leave

    def check(self) -> None:
        """Raises `Stopped` if the run shall stop. Counts as a question, as `is_set` does."""
        if self.is_set():
            raise Stopped

    def _receive(self, number: int, _: Any) -> None:
        is_second = self._received
        self._received = True
        if number == signal.SIGINT:
            self.code = ExitCode.INTERRUPTED
            if is_second:
                raise KeyboardInterrupt
            if not self._is_alone:
                signal.raise_signal(signal.SIGTERM)  # which JAX tells the other processes
        if self.breaks_off:
            raise Stopped

    def _watch(self) -> None:
        """Starts a thread that sees signals even while the main thread is outside of Python."""
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(
            target=self._leave_by_force, args=(self._pipe[0],), daemon=True, name="signals"
        ).start()

    def _leave_by_force(self, pipe: int) -> None:
        interrupts, is_first = 0, True
        while numbers := os.read(pipe, 64):
            stops = [n for n in numbers if n in (signal.SIGINT, signal.SIGTERM)]
            interrupts += stops.count(signal.SIGINT)
            if interrupts > 1:
                self._exit(ExitCode.INTERRUPTED)
            if stops and is_first and self._is_alone:
                is_first = False
                code = ExitCode.INTERRUPTED if interrupts else ExitCode.UNFINISHED
                # More signals, or the end of the main thread's work, come through the pipe.
                if self.may_leave and not select.select([pipe], [], [], GRACE_SECONDS)[0]:
                    if self.may_leave:
                        self.before_leaving()
                        self._exit(code)
        os.close(pipe)

    def _exit(self, code: ExitCode) -> None:
        print("owl_det: stopped at once; what was saved stays", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code)
