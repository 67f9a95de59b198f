"""Who may write into a workdir: locks, runs that were killed, other machines, read-only folders."""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from owl_det.errors import UserError
from owl_det.training import lease
from owl_det.training.lease import Lease


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds become tenths."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "WATCH_SECONDS", 1.0)


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As file systems that know no locks."""

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)


def _elsewhere(file: Path) -> None:
    """As if the run of this lease were on another machine: same host name, same process id."""
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "boot": "another", "token": "another"}))


def test_one_run_holds_a_workdir_and_gives_it_back(tmp_path: Path) -> None:
    workdir = tmp_path / "a" / "b"
    with Lease(workdir) as held:
        held.check()
        with pytest.raises(UserError, match=rf"{workdir} is in use by process {os.getpid()} on"):
            Lease(workdir)
        assert (workdir / "lease").exists()
    assert list(tmp_path.iterdir()) == []
    Lease(workdir).release()


def test_folders_that_hold_something_stay(tmp_path: Path) -> None:
    with Lease(tmp_path / "run"):
        (tmp_path / "run" / "kept").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["kept"]


def test_what_a_killed_process_left_is_taken_over_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from owl_det.training.lease import Lease\n"
        "Lease(Path(sys.argv[1])); print('held', flush=True); time.sleep(100)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {process.pid} "):
        Lease(tmp_path)
    process.kill()
    process.wait()
    process.stdout.close()
    assert (tmp_path / "lease").exists()
    started = time.time()
    with Lease(tmp_path):
        assert time.time() - started < 5
        assert json.loads((tmp_path / "lease").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_lease_that_was_never_written_out_hinders_nobody(content: str, tmp_path: Path) -> None:
    (tmp_path / "lease").write_text(content)
    Lease(tmp_path).release()
    assert not (tmp_path / "lease").exists()


@pytest.mark.usefixtures("quick", "without_locks")
def test_without_locks_a_run_that_lives_is_seen(tmp_path: Path) -> None:
    with Lease(tmp_path), pytest.raises(UserError, match="is in use"):
        Lease(tmp_path)


@pytest.mark.usefixtures("quick")
def test_a_silent_run_of_another_machine_is_watched_and_taken_over(tmp_path: Path) -> None:
    Lease(tmp_path)._stopped.set()  # its heart stops
    file = tmp_path / "lease"
    content = file.read_text()
    file.unlink()
    file.write_text(content)  # a file that nobody locks
    _elsewhere(file)
    started = time.time()
    Lease(tmp_path).release()
    assert 0.9 < time.time() - started < 10


@pytest.mark.usefixtures("quick")
def test_a_lease_of_days_ago_is_taken_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lease"
    Lease(tmp_path).release()
    file.write_text(json.dumps({"pid": 1, "host": "h", "boot": "b", "token": "t"}))
    days_ago = time.time() - 2 * 86400
    os.utime(file, (days_ago, days_ago))
    monkeypatch.setattr(lease, "WATCH_SECONDS", 10.0)
    started = time.time()
    Lease(tmp_path).release()
    assert time.time() - started < 5


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("skew", [0.0, -7200.0, 7200.0])
def test_a_beating_run_of_another_machine_is_refused_whatever_its_clock(
    skew: float, tmp_path: Path
) -> None:
    """Where locks do not reach from one machine to another."""
    file = tmp_path / "lease"
    file.write_text(json.dumps({"pid": 7, "host": "far", "boot": "another", "token": "another"}))
    code = (
        "import os, sys, time\n"
        "for i in range(600):\n"
        "    now = time.time() + float(sys.argv[2]); os.utime(sys.argv[1], (now, now))\n"
        "    time.sleep(0.1)\n"
    )
    beating = subprocess.Popen([sys.executable, "-c", code, str(file), str(skew)])
    try:
        time.sleep(0.5)
        with pytest.raises(UserError, match="process 7 on far"):
            Lease(tmp_path)
    finally:
        beating.kill()
        beating.wait()


@pytest.mark.usefixtures("quick")
def test_a_run_that_stood_still_learns_that_it_was_taken_over(tmp_path: Path) -> None:
    with Lease(tmp_path) as held:
        (tmp_path / "lease").unlink()  # as the message offers
        with Lease(tmp_path):
            deadline = time.time() + 10
            while not held._is_lost:
                assert time.time() < deadline
                time.sleep(0.05)
            with pytest.raises(UserError, match="another run has taken this workdir over"):
                held.check()


def test_a_file_in_the_way_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        Lease(tmp_path / "file" / "run")
