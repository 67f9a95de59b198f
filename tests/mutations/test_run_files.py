"""What a checkpoint says of itself, mutated: its run file."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from owl_det.checkpoints import run_file, step_folders
from owl_det.checkpoints.load import load_detector, parameter_shapes, save_model
from owl_det.types import LoadedModel
from tests import tiny
from tests.mutations import harness, raw, trees
from tests.mutations.harness import Case
from tests.mutations.test_configs import _check_contained

_RUN = "run/metadata"
_LOADED = 50  # of every so many inputs the parameters are read too


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("saved") / "checkpoint")


def _save(folder: Path) -> Path:
    """A whole checkpoint of a tiny detector."""
    config = tiny.config()
    described = LoadedModel(
        params={},
        config=config.model,
        preprocess=config.preprocess,
        eval_prompts="none",
        step=5,
    )
    shapes = parameter_shapes(described)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    save_model(folder, dataclasses.replace(described, params=params))
    return folder


@harness.COUNTS
def test_mutated_run_files(count: int, tmp_path: Path, saved: Path) -> None:
    harness.check(lambda rng, folder: _case(rng, folder, saved), count, tmp_path / "data")


def _reproduce(seed: int) -> Any:
    saved = _save(Path(tempfile.mkdtemp()) / "checkpoint")
    return harness.reproduce(lambda rng, folder: _case(rng, folder, saved), seed)


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
        described = run_file.describe(step_folders.find(folder))
        return load_detector(folder) if is_loaded else described

    def verify(model: LoadedModel, lines: list[str]) -> None:
        said = json.loads(content)
        for key, settings in (("model", model.config), ("preprocess", model.preprocess)):
            _check_contained(said[key], dataclasses.asdict(settings), key)
        assert (model.step, model.eval_prompts) == (said["step"], said["eval_prompts"])

    return Case(read=read, verify=verify, names=[str(folder)])
