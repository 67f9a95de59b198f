"""The one-machine launcher, on real processes."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).resolve().parents[2] / "launch" / "local.py"

# A shell's background jobs ignore SIGINT, and so would all that the tests start. Done in the new
# process: code between fork and exec would run in a copy of JAX's threads.
WITH_SIGINT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def launch(*arguments: str, script: str = "", **environment: str) -> subprocess.Popen[str]:
    command = ["--", sys.executable, "-c", textwrap.dedent(script)] if script else []
    return subprocess.Popen(
        [sys.executable, "-c", WITH_SIGINT, str(LAUNCHER), *arguments, *command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, list[str], str]:
    """Exit code, sorted lines of standard output (processes write in any order), errors."""
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, sorted(stdout.splitlines()), stderr


def wait_for_lines(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdout is not None
    return sorted(process.stdout.readline().strip() for _ in range(count))


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_each_process_gets_its_environment():
    script = """
        import os
        names = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
        print(*(os.environ["OWL_DET_" + name] for name in names))
    """
    code, lines, _ = finish(launch("--num_processes", "3", "--port", "12345", script=script))
    assert code == 0
    assert lines == [f"[{i}] 127.0.0.1:12345 3 {i}" for i in range(3)]


def test_devices_replace_an_inherited_count():
    script = "import os; print(os.environ['XLA_FLAGS'], os.environ['JAX_PLATFORMS'])"
    code, lines, _ = finish(
        launch(
            *("--num_processes", "1", "--devices_per_process", "4"),
            script=script,
            XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_cpu_enable_fast_math=false",
            JAX_PLATFORMS="cuda",
        )
    )
    assert code == 0
    assert lines == [
        "[0] --xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=4 cpu"
    ]


def test_every_line_is_printed_with_its_process():
    script = """
        import sys
        sys.stdout.write("10%\\r20%\\r")
        sys.stderr.write("an error line\\n")
        sys.stdout.write("no line end")
    """
    code, lines, _ = finish(launch("--num_processes", "1", script=script))
    assert code == 0
    assert {"[0] 10%", "[0] 20%", "[0] an error line", "[0] no line end"} == set(lines)


def test_a_failure_ends_the_others_and_gives_the_exit_code():
    script = """
        import os, sys, time
        if os.environ["OWL_DET_PROCESS_ID"] == "1":
            sys.exit(7)
        time.sleep(60)
    """
    started = time.monotonic()
    code, _, _ = finish(launch("--num_processes", "3", script=script))
    assert code == 7
    assert time.monotonic() - started < 10


def test_a_process_that_ignores_the_end_is_killed_after_the_grace():
    script = """
        import os, signal, time
        if os.environ["OWL_DET_PROCESS_ID"] == "0":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print(os.getpid())
            time.sleep(60)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    process = launch("--num_processes", "2", "--grace_seconds", "0.5", script=script)
    code, lines, _ = finish(process)
    assert code == 128 + signal.SIGKILL
    assert not is_alive(int(lines[0].removeprefix("[0] ")))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_process_and_each_may_finish(number: signal.Signals):
    script = """
        import signal, sys, time
        def save(number, frame):
            time.sleep(0.2)
            print("saved", number)
            sys.exit(0)
        signal.signal(signal.SIGTERM, save)
        signal.signal(signal.SIGINT, save)
        print("ready")
        time.sleep(60)
    """
    process = launch("--num_processes", "2", script=script)
    assert wait_for_lines(process, 2) == ["[0] ready", "[1] ready"]
    process.send_signal(number)
    code, lines, _ = finish(process)
    assert code == 0
    assert lines == [f"[{i}] saved {int(number)}" for i in range(2)]


def test_a_process_that_was_told_to_stop_ends_no_other():
    script = """
        import os, sys, time
        first = os.environ["OWL_DET_PROCESS_ID"] == "0"
        time.sleep(0 if first else 2)
        print("saved")
        sys.exit(75)
    """
    code, lines, _ = finish(launch("--num_processes", "2", "--grace_seconds", "0.1", script=script))
    assert (code, sorted(lines)) == (75, ["[0] saved", "[1] saved"])


def test_what_a_process_left_behind_is_ended():
    script = """
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(child.pid)
    """
    code, lines, _ = finish(launch("--num_processes", "1", script=script))
    assert code == 0
    assert not is_alive(int(lines[0].removeprefix("[0] ")))


def test_dry_run_prints_the_commands_and_runs_nothing(tmp_path: Path):
    mark = tmp_path / "mark"
    arguments = ("--num_processes", "2", "--port", "1234", "--dry_run", "--", "touch", str(mark))
    code, lines, _ = finish(launch(*arguments))
    shared = "OWL_DET_COORDINATOR_ADDRESS=127.0.0.1:1234 OWL_DET_NUM_PROCESSES=2"
    assert code == 0
    assert lines == [f"{shared} OWL_DET_PROCESS_ID={i} touch {mark}" for i in range(2)]
    assert not mark.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num_processes", "2"), "no command"),
        (("--num_processes", "0", "--", "true"), "must be positive, got 0"),
        (("--num_processes", "1", "--", "no-such-program"), "no-such-program does not start"),
    ],
)
def test_bad_calls_say_what_is_wrong(arguments: tuple[str, ...], message: str):
    code, lines, errors = finish(launch(*arguments))
    assert (code, lines) == (2, [])
    assert message in errors


def test_flags_are_spelt_with_either_sign() -> None:
    outputs = set()
    for flags in (
        ("--num_processes", "2", "--devices_per_process=3", "--port=5", "--dry_run"),
        ("--num-processes", "2", "--devices-per-process=3", "--port=5", "--dry-run"),
    ):
        code, lines, error = finish(launch(*flags, "--", "run", "--own-flag"))
        assert code == 0, error
        outputs.add(tuple(lines))
    assert len(outputs) == 1 and "--own-flag" in outputs.pop()[0]


@pytest.mark.parametrize(
    "flags",
    [("--num-processes", "x"), ("--num_processes", "0"), ("--no-such",), ("--grace-seconds=x",)],
)
def test_a_bad_flag_is_one_line(flags: tuple[str, ...]) -> None:
    code, lines, error = finish(launch(*flags, "--", "true"))
    assert code == 2 and not lines
    assert error.count("\n") == 1 and error.startswith("local.py: "), error
