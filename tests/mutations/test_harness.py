"""The harness itself: each thing that a reader may not do fails the test, with its number."""

import os
import pickle
import resource
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from owl_det.errors import DataError
from tests.mutations import harness, weight_files
from tests.mutations.harness import Case


def _refuse(folder: Path) -> None:
    raise DataError("x.json: is wrong")


def _swallow(folder: Path) -> None:
    """A reader that hides what it did."""
    try:
        subprocess.run(["true"], check=False)
    except BaseException:
        return


def _allocate(folder: Path) -> None:
    """More than this process ever had."""
    used = psutil.Process().memory_info().rss
    _ = b"x" * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - used + 50 * 2**20)


def _warn(folder: Path) -> None:
    warnings.warn("careful", UserWarning, stacklevel=1)


def _write_outside(folder: Path) -> None:
    (folder.parent / "outside.txt").write_text("x")


def _unpickle(folder: Path) -> None:
    pickle.loads(pickle.dumps(weight_files.Payload(folder / "was_run")))


def _raise(error: Exception) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        raise error

    return read


def _lose(value: Any, lines: list[str]) -> None:
    raise AssertionError("3 boxes in the file, 2 used")


def _accept(value: Any, lines: list[str]) -> None:
    pass


def _check(bad: Callable[[Path], Any], folder: Path, verify: Callable[..., None] = _accept) -> None:
    """Input 7 of ten is read by `bad`; of the others every second is refused."""

    def make(rng: np.random.Generator, place: Path) -> Case:
        number = int(rng.integers(1000))
        is_bad = number == int(np.random.default_rng(7).integers(1000))
        read = bad if is_bad else _refuse if number % 2 else lambda place: None
        check = verify if is_bad else _accept
        return Case(read=lambda: read(place), verify=check, names=["x.json"])

    harness.check(make, 10, folder / "data")


def _compute(folder: Path) -> None:
    """Two seconds of CPU time."""
    started = time.process_time()
    while time.process_time() < started + 2:
        sum(range(1000))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (_raise(TypeError("no")), "TypeError in .*no"),
        (_raise(RecursionError()), "RecursionError"),
        (_raise(DataError("is wrong")), "no file or key is named by: is wrong"),
        (_raise(DataError(" ")), "not one line"),
        (lambda folder: os.system("true"), "Forbidden.*os.system"),
        (lambda folder: exec(compile("1", "<data>", "exec")), "Forbidden.*exec"),
        (lambda folder: eval("1 + 1"), "Forbidden.*exec"),
        (_swallow, "Forbidden.*subprocess.Popen"),
        (_unpickle, "Forbidden.*pickle.find_class"),
        (_write_outside, "Forbidden.*open.*outside.txt"),
        (lambda folder: os.remove("/nowhere/x"), "Forbidden.*os.remove"),
        (_warn, "UserWarning"),
        (_compute, "TooSlow"),
        (_allocate, "memory grew by more than"),
    ],
)
def test_what_is_forbidden_fails(
    bad: Callable[[Path], Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "SECONDS", 0.2)
    monkeypatch.setattr(harness, "MEGABYTES", 20)
    monkeypatch.setattr(harness, "_SHOWN", 2)
    with pytest.raises(pytest.fail.Exception, match=said) as error:
        _check(bad, tmp_path)
    assert "1 of 10 inputs" in str(error.value) and "_reproduce(7)" in str(error.value)
    assert not (tmp_path / "outside.txt").exists()


def test_a_loss_fails(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="lost in silence.*boxes in the file"):
        _check(lambda folder: None, tmp_path, _lose)
    with pytest.raises(pytest.fail.Exception, match="read, but KeyError"):
        _check(lambda folder: None, tmp_path, lambda value, lines: {}["x"])


def test_reading_and_writing_inside_the_folder_is_allowed(tmp_path: Path) -> None:
    def read(folder: Path) -> None:
        (folder / "a").write_text("x")
        (folder / "a").rename(folder / "b")

    _check(read, tmp_path)


def test_inputs_that_all_come_out_alike_test_nothing(tmp_path: Path) -> None:
    def make(rng: np.random.Generator, folder: Path) -> Case:
        return Case(read=lambda: None, verify=_accept, names=[])

    with pytest.raises(AssertionError, match="of 10 inputs"):
        harness.check(make, 10, tmp_path / "data")
