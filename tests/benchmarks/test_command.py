"""What the benchmarks' commands share."""

import json
import os
from pathlib import Path

import jax
import pytest

from benchmarks import command
from owl_det.errors import DataError


def test_report_prints_and_writes_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    assert command.report("x", lambda: {"seconds": 1.5}, out) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text()) == {"seconds": 1.5}
    assert command.report("x", lambda: {}, None) == 0


def test_errors_of_the_user_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise DataError("--steps: must be positive")

    assert command.report("x", refuse, tmp_path / "never.json") == 2
    printed = capsys.readouterr()
    assert printed.err == "benchmarks.x: --steps: must be positive\n" and not printed.out
    assert not (tmp_path / "never.json").exists()
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        command.exit_code("x", lambda: 1 // 0)
    assert command.exit_code("x", lambda: 1) == 1


def test_spread() -> None:
    found = command.spread([4.0, 1.0, 2.0, 3.0, 5.0])
    assert found == {"median": 3, "quartile_1": 2, "quartile_3": 4, "min": 1, "max": 5}


def test_machine_is_this_one() -> None:
    found = command.machine()
    assert found["cpu_count"] == len(os.sched_getaffinity(0)) and found["cpu_model"]
    assert found["platform"] == jax.default_backend() and found["jax"] == jax.__version__
