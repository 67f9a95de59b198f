"""The lease of a workdir: one training writes into it at a time.

`<workdir>/lease` is locked by the run that trains there and says which one it is; the first of
several processes holds it for all. The operating system gives the lock back however a run ends. Not
every file system carries locks from one machine to another, so the run also touches the file every
few seconds; whether it still does is seen by watching, not by comparing clocks.
"""

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
from absl import logging

from owl_det import files
from owl_det.errors import UserError
from owl_det.training.processes import value_of_first_process

NAME = "lease"
BEAT_SECONDS = 5.0
WATCH_SECONDS = 30.0  # a file that nobody touches for so long belongs to a run that is gone
_SURELY_OLD_SECONDS = 86400  # no two clocks are so far apart
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Lease:
    """Holds a workdir from its making to `release`; a context manager that releases."""

    def __init__(self, workdir: Path):
        """Makes the folder where it is missing.

        Raises `UserError` if another run holds the workdir or nothing can be written there. What a
        run left that was killed is taken over; where only its silence tells that it is gone, this
        watches for `WATCH_SECONDS`.
        """
        self._path = workdir / NAME
        self._is_lost = False
        self._stopped = threading.Event()
        self._made: list[Path] = []
        try:
            self._make_folders(workdir)
            self._fd, is_locked = self._open()
            self._take(is_locked)
        except OSError as error:
            self._remove_folders()
            raise UserError(f"--workdir: {workdir} cannot be written ({error.strerror})") from None
        except BaseException:
            self._remove_folders()
            raise
        self._beat = threading.Thread(target=self._keep_alive, daemon=True, name="lease")
        self._beat.start()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self) -> None:
        """Raises `UserError` if the workdir was given to another run while this one stood still."""
        if self._is_lost:
            raise UserError(
                f"{self._path}: another run has taken this workdir over; this one stops, and what "
                "it saved stays"
            )

    def release(self) -> None:
        """Gives the workdir free; folders that this run made and left empty go too."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._beat.join()
        with contextlib.suppress(OSError):  # a folder that is gone: the lock goes all the same
            if self._is_ours():
                self._path.unlink()
        os.close(self._fd)
        self._remove_folders()

    def _open(self) -> tuple[int, bool]:
        """The file, and whether it is locked now. Raises `UserError` where another run locks it."""
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_locked = True
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    owner = _read(fd)
                    os.close(fd)
                    raise UserError(self._refusal(owner)) from None
                if error.errno not in _NO_LOCKS:
                    os.close(fd)
                    raise
                is_locked = False
            # The run before may have removed the file between our opening and locking it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), self._path.stat()):
                    return fd, is_locked
            os.close(fd)

    def _take(self, is_locked: bool) -> None:
        owner = _read(self._fd)
        try:
            self._write(owner, is_locked)
        except BaseException as error:
            if not owner and not isinstance(error, UserError):
                self._path.unlink(missing_ok=True)  # as before
            os.close(self._fd)
            raise

    def _write(self, owner: dict[str, Any], is_locked: bool) -> None:
        # With the lock in hand, what another run on this machine left is of a run that is gone.
        if owner and not (is_locked and owner.get("boot") == _boot()):
            self._watch(owner)
        if owner:
            logging.info("Takes %s over: %s is gone", self._path.parent, _described(owner))
        self._token = os.urandom(8).hex()
        content = {
            "token": self._token,
            "host": socket.gethostname(),
            "boot": _boot(),
            "pid": os.getpid(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "command": textwrap.shorten(shlex.join(sys.argv), 200, placeholder=" …"),
        }
        data = json.dumps(content, indent=2).encode() + b"\n"
        os.ftruncate(self._fd, 0)
        if os.pwrite(self._fd, data, 0) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self._fd)
        if not is_locked:  # two may have watched a silent file at once: the last one has it
            time.sleep(1)
            if not self._is_ours():
                raise UserError(self._refusal(_read(self._fd)))

    def _watch(self, owner: dict[str, Any]) -> None:
        """Returns when the file is silent for long. Raises `UserError` when it is touched."""
        last = self._path.stat().st_mtime_ns
        if self._now_ns() - last > _SURELY_OLD_SECONDS * 1e9:
            return
        logging.warning(
            "%s: looks for up to %.0f s whether %s still runs",
            self._path, WATCH_SECONDS, _described(owner),
        )  # fmt: skip
        deadline = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, WATCH_SECONDS))
            os.close(os.open(self._path, os.O_RDONLY))  # network file systems look anew
            if self._path.stat().st_mtime_ns != last:
                raise UserError(self._refusal(owner))

    def _now_ns(self) -> int:
        """The time now, as the file system writes it down."""
        probe = self._path.with_name(f".{NAME}.{os.urandom(8).hex()}")
        probe.touch()
        try:
            return probe.stat().st_mtime_ns
        finally:
            probe.unlink()

    def _refusal(self, owner: dict[str, Any]) -> str:
        return (
            f"--workdir: {self._path.parent} is in use by {_described(owner)}; wait for it, stop "
            f"it, or give another --workdir (if that run is gone for good, remove {self._path})"
        )

    def _keep_alive(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            try:
                if self._is_ours():
                    os.utime(self._fd)
                else:
                    self._is_lost = True
                    return
            except OSError as error:  # gone, full, unreachable: writing a checkpoint will tell
                logging.log_every_n_seconds(
                    logging.WARNING, "%s cannot be touched (%s)", 600, self._path, error.strerror
                )

    def _is_ours(self) -> bool:
        """True if the file is the one that this run opened, with what it wrote."""
        same = os.path.samestat(os.fstat(self._fd), self._path.stat())
        return same and _read(self._fd).get("token") == self._token

    def _make_folders(self, folder: Path) -> None:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            self._made.append(path)

    def _remove_folders(self) -> None:
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:  # it holds something
                return


def _read(fd: int) -> dict[str, Any]:
    """What the file says; empty where a run was killed before it wrote."""
    try:
        content = json.loads(os.pread(fd, 2**16, 0))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _described(owner: dict[str, Any]) -> str:
    if not owner:
        return "another run"
    keys = ("pid", "host", "started", "command")
    pid, host, started, command = (owner.get(key, "?") for key in keys)
    return f"process {pid} on {host} since {started} ({command})"


def _boot() -> str:
    """Of this machine since it was started; all its containers share it."""
    try:
        return files.read_text("/proc/sys/kernel/random/boot_id").strip()
    except OSError:  # no Linux
        return f"{socket.gethostname()} {_boot_time()}"


def _boot_time() -> int:
    import psutil

    return int(psutil.boot_time())


@contextlib.contextmanager
def leased(folder: Path) -> Generator[Lease | None, None, None]:
    """Holds the workdir, on process 0 for all. Raises `UserError` everywhere if it is taken."""
    lease, problem = None, ""
    if jax.process_index() == 0:
        try:
            lease = Lease(folder)
        except UserError as error:
            problem = str(error)
    if value_of_first_process(bool(problem)):
        raise UserError(problem or f"--workdir: {folder}: process 0 says why it is refused")
    with lease or contextlib.nullcontext():
        yield lease
