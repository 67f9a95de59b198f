"""The test session is as strict as it claims to be."""

import json
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from owl_det import boxes


def test_eight_cpu_devices():
    assert [device.platform for device in jax.devices()] == ["cpu"] * 8


def test_rank_promotion_raises():
    with pytest.raises(ValueError, match="rank"):
        jnp.ones((2, 3)) + jnp.ones(3)


def test_warnings_are_errors():
    with pytest.raises(UserWarning, match="unexpected"):
        warnings.warn("unexpected", stacklevel=1)


def test_shapes_are_checked_at_calls():
    with pytest.raises(TypeCheckError):
        boxes.cxcywh_to_xyxy(jnp.ones((2, 5)))


def test_every_test_runs_in_exactly_one_of_three_runs(repository_root: Path) -> None:
    """Default, slow (CI) and nightly; a test that is in none would never be run."""
    code = (
        "import json, sys, pytest\n"
        "class Markers:\n"
        "    def pytest_collection_finish(self, session):\n"
        "        found = [[m.name for m in item.iter_markers()] for item in session.items]\n"
        "        print('MARKERS ' + json.dumps(found))\n"
        "sys.exit(pytest.main(['-q', '--collect-only', '-n0', '-m', ''], plugins=[Markers()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository_root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("MARKERS ")]
    runs: Counter[str] = Counter()
    for markers in json.loads(line.removeprefix("MARKERS ")):
        run = {"slow", "nightly"} & set(markers)
        assert len(run) <= 1 and not (run and "fast" in markers), markers
        runs[min(run, default="default")] += 1
    assert min(runs[run] for run in ("default", "slow", "nightly")) > 0, runs
