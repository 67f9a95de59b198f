"""The benchmark of accelerators, on a CPU."""

import json
from typing import Any

import jax
import pytest

from benchmarks import accelerator

ARGUMENTS = ["--models", "tiny", "--allow_cpu", "--dtype", "float32", "--matrix_side", "64"]


def test_shares_are_of_the_measured_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch of 16 does not fit, one of 8 does."""

    def step(model: str, variant: str, scope: str, size: int, _: Any) -> Any:
        if size > 8:
            return None, "RESOURCE_EXHAUSTED"
        speed = {"dense": 1.0, "dropped": 2.5}[variant] * (0.8 if scope == "shared_text" else 1)
        return {"images_per_second": speed, "flops_per_second": 30.0}, ""

    monkeypatch.setattr(accelerator, "_step", step)
    device = {"machine": {}, "matrix_flops_per_second": 60.0}
    monkeypatch.setattr(accelerator, "_device", lambda side, dtype, allow_cpu: device)
    assert accelerator.main([*ARGUMENTS, "--batch_sizes", "8", "16"]) == 0
    found = json.loads(capsys.readouterr().out)["models"]["tiny"]
    assert found["dense"]["mfu"] == 0.5 and found["dense"]["batch_size"] == 8
    assert found["dense"]["failed"] == {"16": "RESOURCE_EXHAUSTED"}
    assert found["dropped_over_dense"] == 2.5
    assert found["per_example_over_global_seconds"] == pytest.approx(1.25)


def test_rate_counts_multiplications_and_additions(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(accelerator.time, "perf_counter", lambda: float(next(ticks)))
    assert accelerator.matrix_rate(8, "float32") == 2 * 8**3


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is an accelerator")
def test_a_cpu_is_refused_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accelerator, "_step", lambda *_: pytest.fail("a step was tried"))
    assert accelerator.main(["--models", "tiny"]) == 2  # the largest products by default
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and not printed.out
    assert "no accelerator" in printed.err and "--allow_cpu" in printed.err


def test_a_setting_that_runs_at_no_batch_size_is_a_loss(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(model: str, variant: str, scope: str, size: int, _: Any) -> Any:
        if scope == "shared_text":
            return None, "RuntimeError: out of memory"
        return {"images_per_second": 1.0, "flops_per_second": 30.0}, ""

    monkeypatch.setattr(accelerator, "_step", step)
    device = {"machine": {}, "matrix_flops_per_second": 60.0}
    monkeypatch.setattr(accelerator, "_device", lambda side, dtype, allow_cpu: device)
    assert accelerator.main([*ARGUMENTS, "--batch-sizes", "8"]) == 1
    printed = capsys.readouterr()
    assert "ran at no batch size: tiny dropped_per_example" in printed.err
    found = json.loads(printed.out)["models"]["tiny"]["dropped_per_example"]
    assert found["failed"] == {"8": "RuntimeError: out of memory"}


@pytest.mark.nightly
def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert accelerator.main([*ARGUMENTS, "--batch_sizes", "2", "--steps", "1"]) == 0
    found = json.loads(capsys.readouterr().out)["models"]["tiny"]
    assert all(found[name]["mfu"] > 0 for name, _, _ in accelerator.SETTINGS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "huge"], "--models: huge unknown"),
        ([*ARGUMENTS, "--batch_sizes", "0"], "--batch_sizes: must be positive"),
        ([*ARGUMENTS[:-1], "0"], "--matrix_side: must be positive"),
    ],
)
def test_useless_arguments_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert accelerator.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
