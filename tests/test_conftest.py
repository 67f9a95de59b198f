"""The test session is as strict as it claims to be."""

import ast
import json
import subprocess
import sys
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from data_pipelines import label_ops
from owl_det import boxes, scoring
from owl_det.inference import ranking
from owl_det.training import gradients
from tests import shape_checks


def test_eight_cpu_devices():
    assert [device.platform for device in jax.devices()] == ["cpu"] * 8


def test_rank_promotion_raises():
    with pytest.raises(ValueError, match="rank"):
        jnp.ones((2, 3)) + jnp.ones(3)


def test_warnings_are_errors():
    with pytest.raises(UserWarning, match="unexpected"):
        warnings.warn("unexpected", stacklevel=1)


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (boxes.cxcywh_to_xyxy, jnp.ones((2, 5))),
        (scoring.unit_length, jnp.ones((2, 5), jnp.int32)),
        (ranking.has_area, np.ones((2, 3), np.float32)),
        (partial(gradients.clip_factor, limit=1.0), jnp.ones(2, jnp.int32)),
        (partial(label_ops.flip_boxes, width=8), np.ones((2, 4), np.float64)),
    ],
    ids=["boxes", "scoring", "inference", "training", "data_pipelines"],
)
def test_shapes_and_dtypes_are_checked_at_calls(function: Any, argument: Any) -> None:
    with pytest.raises(TypeCheckError):
        function(argument)


def test_functions_that_name_arrays_are_those_checked() -> None:
    tree = ast.parse(
        "Boxes = Float[Array, 'n 4']\n"
        "def named(x: Boxes) -> None: ...\n"
        "def plain(x: int) -> str: ...\n"
        "class Holder:\n"
        "    boxes: Boxes\n"
        "    @property\n"
        "    def area(self) -> Float[Array, 'n']: ...\n"
    )
    lines = ast.unparse(shape_checks.with_checks(tree)).splitlines()
    decorator = "@_shape_checks.check"
    checked = [lines[i + 1].strip() for i, line in enumerate(lines) if line.strip() == decorator]
    assert [line.split("(")[0] for line in checked] == ["def named", "def area"]


@pytest.mark.slow
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
