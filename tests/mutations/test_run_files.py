"""What a checkpoint says of itself, mutated: its run file, its folders, its tokeniser."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from owl_det import checkpoint
from owl_det.types import LoadedModel
from tests import tiny
from tests.mutations import harness, raw, trees
from tests.mutations.harness import Case
from tests.mutations.test_configs import _check_contained

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
_LOADED = 50  # of every so many inputs the parameters are read too


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint of a tiny detector."""
    config = tiny.config()
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    described = LoadedModel(
        params={},
        model=config.model,
        preprocess=config.preprocess,
        eval_prompts="none",
        step=5,
    )
    shapes = checkpoint.parameter_shapes(described)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    checkpoint.save_model(folder, dataclasses.replace(described, params=params))
    return folder


@harness.COUNTS
def test_mutated_run_files(count: int, tmp_path: Path, saved: Path) -> None:
    harness.check(lambda rng, folder: _case(rng, folder, saved), count, tmp_path / "data")


@harness.COUNTS
def test_mutated_step_folders(count: int, tmp_path: Path) -> None:
    harness.check(_folders_case, count, tmp_path / "data")


def _reproduce(seed: int) -> Any:
    return harness.reproduce(_folders_case, seed)


def _case(rng: np.random.Generator, folder: Path, saved: Path) -> Case:
    run = json.loads((saved / _RUN).read_text())
    for _ in range(rng.integers(0, 4)):
        if rng.random() < 0.7:
            part = trees.pick(rng, [k for k, v in run.items() if isinstance(v, dict) and v])
            run[part] = trees.mutated(run[part], rng)
        else:
            run = trees.mutated(run, rng)
    content = trees.as_json(run, rng).encode()
    content = raw.mutated(content, rng) if rng.random() < 0.2 else content
    (folder / "run").mkdir(parents=True)
    (folder / _RUN).write_bytes(content)
    (folder / "params").symlink_to(saved / "params")
    is_loaded = rng.integers(_LOADED) == 0

    def read() -> LoadedModel:
        described = checkpoint._describe(checkpoint.find(folder))
        return checkpoint.load_detector(folder) if is_loaded else described

    def verify(model: LoadedModel, lines: list[str]) -> None:
        said = json.loads(content)
        for key in ("model", "preprocess"):
            _check_contained(said[key], dataclasses.asdict(getattr(model, key)), key)
        assert (model.step, model.eval_prompts) == (said["step"], said["eval_prompts"])

    return Case(read=read, verify=verify, names=[str(folder)])


def _folders_case(rng: np.random.Generator, folder: Path) -> Case:
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
        found = checkpoint.find(folder)
        assert int(found.name) == max(whole), f"{found.name} of {whole}"

    def read() -> LoadedModel:
        return checkpoint._describe(checkpoint.find(folder))

    return Case(read=read, verify=verify, names=[str(folder)])


@functools.cache
def _run(step: int) -> str:
    return json.dumps(checkpoint._run_file(tiny.config(), step, "input"))
