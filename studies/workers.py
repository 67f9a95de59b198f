"""Commands side by side, each on cores of its own; all end when one fails or the caller does.

Trainings as small as a study's keep two cores busy; on machines of more they do more in an hour
side by side.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

from owl_det.errors import UserError

Task = TypeVar("Task", bound=Hashable)

# glibc's malloc then takes huge pages: steps on a CPU are up to a third shorter.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class Workers:
    """`jobs` workers. Without a second one commands may use every core."""

    def __init__(self, jobs: int):
        """Raises `UserError` if there are fewer cores than jobs."""
        cores = _cores()
        if not 1 <= jobs <= len(cores):
            raise UserError(f"--jobs: must be from 1 to {len(cores)}, the cores here; got {jobs}")
        self.cores_each = len(cores) // jobs
        self._jobs = jobs
        self._shares: SimpleQueue[list[int]] = SimpleQueue()
        for share in range(jobs):
            self._shares.put(cores[share * self.cores_each : (share + 1) * self.cores_each])
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._is_stopped = False

    def run(
        self,
        tasks: Sequence[Task],
        needs: Mapping[Task, Sequence[Task]],
        work: Callable[[Task], None],
    ) -> None:
        """Calls `work` of every task, in order as far as workers are free and needs are done.

        Raises what the first failing task raised, once the commands of the others have ended.
        """
        waiting, done = list(tasks), set[Task]()
        running: dict[Future[None], Task] = {}
        with ThreadPoolExecutor(self._jobs) as pool:
            try:
                while waiting or running:
                    ready = [task for task in waiting if done.issuperset(needs[task])]
                    for task in ready[: self._jobs - len(running)]:
                        waiting.remove(task)
                        running[pool.submit(work, task)] = task
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        future.result()
                        done.add(running.pop(future))
            finally:
                self._stop()

    def call(self, arguments: Sequence[str], log: Path, folder: Path) -> None:
        """Runs `python -m …` in `folder`; its output goes to `log`.

        Raises `UserError` with the log's last lines if it fails or was stopped.
        """
        share = self._shares.get()
        try:
            returncode = self._wait(arguments, log, folder, share)
        finally:
            self._shares.put(share)
        if returncode or self._is_stopped:
            lines = log.read_text("utf-8", errors="replace").replace("\r", "\n").splitlines()
            tail = "\n".join(line for line in lines[-15:] if line.strip())
            raise UserError(f"python -m {shlex.join(arguments)} failed; {log} ends with:\n{tail}")

    def _wait(self, arguments: Sequence[str], log: Path, folder: Path, share: list[int]) -> int:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ python -m {shlex.join(arguments)}\n")
            file.flush()
            command = [sys.executable, "-m", *arguments]
            process = subprocess.Popen(
                command, stdout=file, stderr=file, cwd=folder, env=HUGE_PAGES | os.environ
            )
            if self._jobs > 1 and hasattr(os, "sched_setaffinity"):  # not on macOS
                os.sched_setaffinity(process.pid, share)
            self._processes.add(process)
            if self._is_stopped:
                process.terminate()
            returncode = process.wait()
            self._processes.discard(process)
        return returncode

    def _stop(self) -> None:
        """A training then saves its state and ends."""
        self._is_stopped = True
        for process in list(self._processes):
            process.terminate()


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
