"""What the benchmarks' commands share."""

import argparse
import importlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import jax
import pytest

import benchmarks
from benchmarks import command
from owl_det.errors import DataError

NAMES = sorted(path.stem for path in Path(benchmarks.__path__[0]).glob("[a-z]*.py"))
NAMES = [name for name in NAMES if name not in ("command", "hlo_collectives")]  # no commands


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


class _Captured(Exception):
    pass


def _parser_of(name: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser of a benchmark's command, which goes no further."""
    found: list[argparse.ArgumentParser] = []

    def parse_args(self: argparse.ArgumentParser, *_: Any) -> Any:
        found.append(self)
        raise _Captured

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(_Captured):
            importlib.import_module(f"benchmarks.{name}").main([])
    return found[0]


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_every_option_is_and_its_default(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    parser = _parser_of(name, monkeypatch)
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        assert action.help, action.option_strings
        if action.default not in (None, "", False):
            assert f"(default: {action.default})" in text, action.option_strings


def test_options_are_spelt_with_either_sign(capsys: pytest.CaptureFixture[str]) -> None:
    parser = command.parser(None)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--note")
    for flag in ("--batch_size=3", "--batch-size=3"):
        assert parser.parse_args([flag, "--note", "a-b"]) == argparse.Namespace(
            batch_size=3, note="a-b"
        )
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--batch-sice", "3"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1


def test_a_missing_package_is_one_line_with_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.exit_code("x", lambda: command.require("parity", "json", "no_such_package")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no_such_package" in error and "[parity]" in error


NOTICE = """--------------------
For simplicity, JAX has removed its internal frames from the traceback of the following exception.
"""


@pytest.mark.parametrize(
    ("code", "stderr", "expected"),
    [
        (1, f"Traceback …\nRuntimeError: out of memory\n{NOTICE}", "RuntimeError: out of memory"),
        (
            1,
            "jax._src.xla.XlaRuntimeError: RESOURCE_EXHAUSTED: 3 GiB\nAllocations:\n  12\n",
            "jax._src.xla.XlaRuntimeError: RESOURCE_EXHAUSTED: 3 GiB",
        ),
        (
            2,
            "W0000 noise\nbenchmarks.train_step: --steps: 0\n",
            "benchmarks.train_step: --steps: 0",
        ),
        (1, f"ValueError: first\n\nDuring …\n\nKeyError: 'b'\n{NOTICE}", "KeyError: 'b'"),
        (1, "no words known\n", "no words known"),
        (3, NOTICE, "exit code 3"),
        (-9, "", "ended by SIGKILL (too little memory?)"),
    ],
)
def test_the_reason_of_a_failure_is_its_last_error(code: int, stderr: str, expected: str) -> None:
    done = subprocess.CompletedProcess([], code, stderr=stderr)
    assert command.reason(done) == expected
