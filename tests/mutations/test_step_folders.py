"""Folders of checkpoints: the one that is read is the latest, whatever else lies beside it."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from owl_det.checkpoints import run_file, step_folders
from owl_det.types import LoadedModel
from tests import tiny
from tests.mutations import harness, trees
from tests.mutations.harness import Case

_RUN = "run/metadata"
_STEPS = (
    "5",
    "10",
    "010",
    "0",
    "-1",
    "\u00b2",
    "\u0661",
    "5.tmp",
    "step_7",
    "9" * 200,
    " 8",
    "1e3",
)


@harness.COUNTS
def test_mutated_step_folders(count: int, tmp_path: Path) -> None:
    harness.check(_case, count, tmp_path / "data")


def _reproduce(seed: int) -> Any:
    return harness.reproduce(_case, seed)


def _case(rng: np.random.Generator, folder: Path) -> Case:
    """Folders of steps, some of them half written or of other programs."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = [-1]
    for name in {trees.pick(rng, _STEPS) for _ in range(rng.integers(0, 4))}:
        step = folder / "checkpoints" / name
        kind = trees.pick(rng, ("whole", "whole", "whole", "empty", "file"))
        (step / "run").mkdir(parents=True)
        if kind == "whole":
            (step / "params").mkdir()
            (step / _RUN).write_text(_run(len(whole)))
            whole += [int(name)] if name.isascii() and name.isdecimal() else []
        elif kind == "file":
            (step / "params").write_text("")

    def verify(model: LoadedModel, lines: list[str]) -> None:
        found = step_folders.find(folder)
        assert int(found.name) == max(whole), f"{found.name} of {whole}"

    def read() -> LoadedModel:
        return run_file.describe(step_folders.find(folder))

    return Case(read=read, verify=verify, names=[str(folder)])


@functools.cache
def _run(step: int) -> str:
    return json.dumps(run_file.of_training(tiny.config(), step, "input"))
