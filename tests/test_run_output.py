"""What a training says: our lines alone, readable in a log file; one line for a full disk."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from owl_det.checkpoints.load import load_model
from owl_det.errors import ExitCode
from tests import training_command as training

pytestmark = pytest.mark.slow
OURS = re.compile(r"\d\d:\d\d:\d\d \S.*|(train|evaluate shapes): \d+ of \d+, .*")


def test_a_log_holds_our_lines_alone_and_no_control_characters(tmp_path: Path) -> None:
    done = training.run(tmp_path / "run", "--config.num_steps=3")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stderr.splitlines()
    assert [line for line in lines if not OURS.fullmatch(line)] == []
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", done.stderr)
    assert done.stdout == ""
    for wanted in ("train shapes: 64 images", "Compiling the training step", "Compiled in"):
        assert wanted in done.stderr
    assert any(line.startswith("train: 3 of 3, ") and " loss " in line for line in lines)
    again = training.run(tmp_path / "run", "--config.num_steps=4")
    assert [line for line in again.stderr.splitlines() if not OURS.fullmatch(line)] == []


def test_a_refused_start_leaves_nothing(tmp_path: Path) -> None:
    workdir = tmp_path / "made" / "run"
    done = training.run(workdir, "--config.checkpoint.init_from=nowhere")
    assert done.returncode == ExitCode.REFUSED
    assert "nowhere: no checkpoint there" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_short_run_says_that_it_ends_within_the_warm_up(tmp_path: Path) -> None:
    flags = ("--config.num_steps=2", "--config.schedule.warmup_steps=10")
    done = training.run(tmp_path, *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "warning: config.schedule.warmup_steps: the warm-up of 10 steps" in done.stderr
    assert "never exceeds 0.0002" in done.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB: room for a few checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"cannot mount a file system here ({error})")
    if done.returncode:
        pytest.skip(f"cannot mount a file system here ({done.stderr.strip()})")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _is_one_line_and_names(done: subprocess.CompletedProcess[str], reason: str) -> None:
    last = done.stderr.splitlines()[-1]
    assert done.returncode == ExitCode.REFUSED, done.stderr[-3000:]
    assert last.startswith("owl_det: ") and reason in last, last
    assert "Traceback" not in done.stderr


def test_a_disk_that_fills_up_keeps_what_was_saved(small_disk: Path) -> None:
    workdir = small_disk / "run"
    flags = ("--config.num_steps=40", "--config.checkpoint.every_steps=2")
    done = training.run(workdir, *flags, "--config.checkpoint.keep=50")
    _is_one_line_and_names(done, "No space left on device")
    steps = training.steps_saved(workdir)
    assert steps and f"checkpoints/{steps[-1]} stays" in done.stderr.splitlines()[-1]
    assert load_model(workdir).step == steps[-1]
    # Once there is room, the same command goes on from there.
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    done = training.run(workdir, *flags, "--config.checkpoint.keep=1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"Resumed at step {steps[-1]}" in done.stderr
    assert not list((workdir / "checkpoints").glob("*tmp*"))
    assert json.loads((workdir / "eval" / "summary.json").read_text())["step"] == 40


def test_a_disk_that_is_full_at_the_start_or_in_the_evaluation(small_disk: Path) -> None:
    workdir = small_disk / "run"
    workdir.mkdir()
    filler = small_disk / "filler"
    filler.write_bytes(b"\0" * (12 * 2**20 - 4096 * 4))
    done = training.run(workdir, "--config.num_steps=2")
    _is_one_line_and_names(done, "cannot be written")
    assert training.steps_saved(workdir) == []
    # Room for the checkpoint, none for all the pictures after it.
    os.truncate(filler, filler.stat().st_size - 3_600_000)
    done = training.run(workdir, "--config.num_steps=2")
    if done.returncode:
        _is_one_line_and_names(done, "cannot be written")
    filler.unlink()
    done = training.run(workdir, "--config.num_steps=2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((workdir / "eval" / "summary.json").read_text())["step"] == 2


def test_a_read_only_disk_is_one_line_and_a_finished_run_needs_none(small_disk: Path) -> None:
    workdir = small_disk / "run"
    assert training.run(workdir, "--config.num_steps=1").returncode == 0
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = training.run(workdir, "--config.num_steps=1")
    assert done.returncode == 0 and "at 1 of 1 steps" in done.stderr
    _is_one_line_and_names(training.run(workdir, "--config.num_steps=2"), "Read-only file system")
    _is_one_line_and_names(
        training.run(small_disk / "other", "--config.num_steps=2"), "Read-only file system"
    )
