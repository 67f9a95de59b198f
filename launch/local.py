"""Runs one command as several processes on this machine, as if each were a host of its own.

    python launch/local.py --num_processes 2 --devices_per_process 4 -- \
        python -m owl_det.main --config=configs/quickstart.py --workdir=runs/two_processes

Every process gets three environment variables, which `owl_det.main` hands to
`jax.distributed.initialize`: OWL_DET_COORDINATOR_ADDRESS (host:port), OWL_DET_NUM_PROCESSES and
OWL_DET_PROCESS_ID. Output lines carry the id of the process that wrote them. SIGINT, SIGTERM and
SIGHUP reach every process; when one process fails, the others are ended, unless it was told to stop
(75, or 130 after Ctrl-C). The exit code is that of the first process that failed (128 + n where
signal n ended it), else 0.

One process already drives all accelerators of a machine: this launcher is for trying out runs of
several processes on CPU devices.
"""

import argparse
import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

import command_line

_POLL_SECONDS = 0.05
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STOPPED = (75, 130)  # told to stop, and saved: the others are about to end likewise
_DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"


def main(argv: Sequence[str]) -> int:
    options, command = parse(argv)
    environments = process_environments(
        options.num_processes, options.devices_per_process, options.port or _free_port(), os.environ
    )
    if options.dry_run:
        for environment in environments:
            assignments = [f"{key}={shlex.quote(value)}" for key, value in environment.items()]
            print(" ".join([*assignments, shlex.join(command)]))
        return 0
    return run(command, environments, options.grace_seconds)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits the launcher's own flags from the command that follows `--`."""
    own, command = command_line.split(argv)
    parser = command_line.Parser(
        prog="local.py",
        usage="local.py --num_processes N [flags] -- command …",
        description=__doc__,
    )
    parser.add_argument("--num_processes", type=command_line.positive, required=True)
    parser.add_argument(
        "--devices_per_process",
        type=command_line.positive,
        help="CPU devices that JAX shows to each process; without it JAX chooses the devices",
    )
    parser.add_argument(
        "--port", type=command_line.positive, help="of the coordinator (default: a free one)"
    )
    parser.add_argument(
        "--grace_seconds",
        type=float,
        default=10.0,
        help="from the first failure to killing what still runs (%(default)s)",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands, run nothing")
    options = parser.parse_args(own)
    if not command:
        parser.error("no command: write it after `--`, as in `-- python -m owl_det.main …`")
    return options, command


def process_environments(
    num_processes: int, devices_per_process: int | None, port: int, base: Mapping[str, str]
) -> list[dict[str, str]]:
    """The variables that each process gets on top of `base`."""
    shared = {
        "OWL_DET_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "OWL_DET_NUM_PROCESSES": str(num_processes),
    }
    if devices_per_process is not None:
        others = re.sub(rf"{_DEVICE_COUNT_FLAG}=\S*", "", base.get("XLA_FLAGS", "")).split()
        shared["XLA_FLAGS"] = " ".join([*others, f"{_DEVICE_COUNT_FLAG}={devices_per_process}"])
        shared["JAX_PLATFORMS"] = "cpu"
    return [{**shared, "OWL_DET_PROCESS_ID": str(index)} for index in range(num_processes)]


def run(
    command: Sequence[str], environments: Sequence[Mapping[str, str]], grace_seconds: float
) -> int:
    """Runs `command` once per environment; returns the launcher's exit code."""
    processes: list[subprocess.Popen[str]] = []
    with _forwarded_signals(processes):
        try:
            for environment in environments:
                processes.append(_start(command, environment))
            readers = [_copy_lines(index, process) for index, process in enumerate(processes)]
            exit_code = _wait(processes, grace_seconds)
        except OSError as error:
            print(f"local.py: {command[0]} does not start: {error}", file=sys.stderr)
            return 2
        finally:
            # Also ends what the processes themselves started and left behind.
            _signal_groups(processes, signal.SIGKILL, finished_too=True)
        for reader in readers:
            reader.join(timeout=5)
    return exit_code


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env={"PYTHONUNBUFFERED": "1", **os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a terminal's Ctrl-C then reaches it once, through this launcher
    )


def _wait(processes: Sequence[subprocess.Popen[str]], grace_seconds: float) -> int:
    """Waits for all processes; after the first failure only as long as the grace allows."""
    first_failure = 0
    deadline = float("inf")
    while any(process.poll() is None for process in processes):
        if not first_failure and (first_failure := _first_failure(processes, but=_STOPPED)):
            # The others may be waiting for the dead one for ever.
            _signal_groups(processes, signal.SIGTERM)
            deadline = time.monotonic() + grace_seconds
        if time.monotonic() > deadline:
            _signal_groups(processes, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
    return first_failure or _first_failure(processes)


def _first_failure(processes: Sequence[subprocess.Popen[str]], but: Sequence[int] = ()) -> int:
    codes = [process.poll() for process in processes]
    failures = [code if code > 0 else 128 - code for code in codes if code and code not in but]
    return failures[0] if failures else 0


def _signal_groups(
    processes: Sequence[subprocess.Popen[str]], number: int, *, finished_too: bool = False
) -> None:
    for process in processes:
        if finished_too or process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)


@contextlib.contextmanager
def _forwarded_signals(processes: Sequence[subprocess.Popen[str]]) -> Iterator[None]:
    """Hands SIGINT, SIGTERM and SIGHUP on to the processes instead of ending the launcher."""

    def forward(number: int, frame: FrameType | None) -> None:
        _signal_groups(processes, number)

    # A signal that the caller has switched off (nohup) stays off.
    numbers = [n for n in _FORWARDED if signal.getsignal(n) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _copy_lines(index: int, process: subprocess.Popen[str]) -> threading.Thread:
    """Starts a thread that prints the output of `process`, each line with its id."""

    def copy() -> None:
        assert process.stdout is not None
        # One write per line, so that lines of different processes do not mix. A progress bar's
        # carriage returns count as line ends.
        for line in process.stdout:
            sys.stdout.write(f"[{index}] {line.rstrip()}\n")
            sys.stdout.flush()

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
