"""Trainings that are stopped, started twice, started again: real processes, real signals."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from owl_det.errors import ExitCode
from tests import training_command as training

pytestmark = pytest.mark.slow
Start = Callable[..., subprocess.Popen[str]]
ENDLESS = ("--config.num_steps=100000", "--config.log.every_steps=1")


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts runs; those that still run at the end of a test are killed."""
    processes: list[subprocess.Popen[str]] = []

    def begin(workdir: Path, *flags: str) -> subprocess.Popen[str]:
        processes.append(training.start(workdir, *flags))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, ExitCode.UNFINISHED), (signal.SIGINT, ExitCode.INTERRUPTED)],
)
def test_a_signal_saves_and_the_same_command_goes_on(
    number: signal.Signals, code: ExitCode, tmp_path: Path, start: Start
) -> None:
    workdir = tmp_path / "run"
    process = start(workdir, *ENDLESS)
    training.wait_for(lambda: len(training.steps_logged(workdir)) > 2, process)
    process.send_signal(number)
    assert process.wait(120) == code
    (step,) = training.steps_saved(workdir)
    assert step >= training.steps_logged(workdir)[-1]
    last = training.said(workdir).splitlines()[-1]
    assert f"saved step {step}; the same command goes on from there" in last
    assert not (workdir / "lease").exists()
    again = training.run(workdir, f"--config.num_steps={step + 1}")
    assert again.returncode == 0, again.stderr[-2000:]
    assert f"Resumed at step {step}" in again.stderr
    assert training.steps_saved(workdir)[-1] == step + 1


def test_a_signal_before_the_first_step_ends_at_once_and_leaves_nothing(
    tmp_path: Path, start: Start
) -> None:
    workdir = tmp_path / "made" / "run"
    workdir.parent.mkdir()
    process = start(workdir, *ENDLESS)
    training.wait_for(lambda: "eval shapes: " in training.said(workdir), process)
    process.send_signal(signal.SIGTERM)
    started = time.time()
    assert process.wait(120) == ExitCode.UNFINISHED
    assert time.time() - started < 60
    assert "Traceback" not in training.said(workdir)
    assert training.steps_saved(workdir) == []
    assert not (workdir / "lease").exists()


def test_an_evaluation_is_left_after_the_batch_at_hand(tmp_path: Path, start: Start) -> None:
    workdir = tmp_path / "run"
    flags = ("--config.num_steps=3", "--config.data.eval.shapes.num_images=20000")
    process = start(workdir, *flags)
    training.wait_for(lambda: training.steps_saved(workdir) == [3], process)
    time.sleep(5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == ExitCode.UNFINISHED
    assert "saved step 3" in training.said(workdir).splitlines()[-1]
    assert not (workdir / "eval" / "summary.json").exists()
    done = training.run(workdir, "--config.num_steps=3")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((workdir / "eval" / "summary.json").read_text())["step"] == 3


def test_the_second_run_of_a_workdir_is_refused_and_the_first_goes_on(
    tmp_path: Path, start: Start
) -> None:
    workdir = tmp_path / "run"
    first = start(workdir, *ENDLESS)
    training.wait_for(lambda: bool(training.steps_logged(workdir)), first)
    second = training.run(workdir, *ENDLESS)
    assert second.returncode == ExitCode.REFUSED
    last = second.stderr.splitlines()[-1]
    assert f"is in use by process {first.pid} on " in last and "owl_det/main.py" in last
    assert "Traceback" not in second.stderr
    reached = training.steps_logged(workdir)[-1]
    training.wait_for(lambda: training.steps_logged(workdir)[-1] > reached, first)
    first.kill()
    first.wait()
    assert (workdir / "lease").exists()  # as a killed run leaves it
    third = training.run(workdir, "--config.num_steps=1")
    assert third.returncode == 0, third.stderr[-2000:]
    assert f"process {first.pid}" in third.stderr and not (workdir / "lease").exists()


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    flags = ("--config.num_steps=3", "--config.checkpoint.every_steps=0")
    assert training.run(tmp_path, *flags).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for num_steps, said in ((3, "at 3 of 3 steps"), (2, "at 3 of 2 steps")):
        again = training.run(tmp_path, f"--config.num_steps={num_steps}")
        assert again.returncode == 0 and said in again.stderr.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    changed = training.run(tmp_path, "--config.num_steps=9", "--config.batch_size=4")
    assert changed.returncode == ExitCode.REFUSED
    assert "config.batch_size is 8 there and 4 now" in changed.stderr.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_two_processes_of_one_run_share_the_lease(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    command = training.command(workdir, *ENDLESS)
    launch = [sys.executable, "launch/local.py", "--num_processes", "2", "--", *command]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            launch, cwd=training.ROOT, env=training.environment(), stdout=log, stderr=log, text=True
        )
    training.wait_for(lambda: len(training.steps_logged(workdir)) > 2, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == ExitCode.INTERRUPTED
    (step,) = training.steps_saved(workdir)
    assert f"saved step {step}" in (tmp_path / "log").read_text()
    assert not (workdir / "lease").exists()
