"""NaN and infinity are refused wherever parameters come in."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import serialization

from owl_det import cli, files, path_rules
from owl_det.checkpoints import finite
from owl_det.checkpoints.load import load_model, save_model
from owl_det.errors import CheckpointError
from owl_det.inference import export, export_folder, stablehlo
from owl_det.types import LoadedModel
from tests import tiny
from tests.convert import hf_folder
from tests.convert import test_scenic as scenic_files

BAD = (np.nan, np.inf, -np.inf)


def _model(**bad: float) -> LoadedModel:
    """A tiny detector; the first value of each named parameter (`__` for `/`) is replaced."""
    config = tiny.config()
    params = jax.tree.map(np.array, tiny.params(config, seed=1))
    flat = path_rules.flatten(params)
    for name, value in bad.items():
        flat[name.replace("__", "/")].flat[0] = value
    return LoadedModel(
        params=params,
        config=config.model,
        preprocess=config.preprocess,
        eval_prompts="none",
        step=0,
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_value_is_counted(dtype: Any) -> None:
    values = np.full((3, 50), 3e38 if dtype != np.float16 else 6e4).astype(dtype)
    assert finite.count_not_finite(values) == 0  # though their sum is infinite
    values[0, :3] = BAD
    values[2, 4] = np.nan
    assert finite.count_not_finite(values) == 4
    assert finite.count_not_finite(np.zeros((0, 3), dtype)) == 0
    assert finite.count_not_finite(np.array(np.nan, dtype)) == 1


def test_integers_are_finite() -> None:
    assert finite.count_not_finite(np.array([2**63 - 1] * 3)) == 0


@pytest.mark.parametrize("value", BAD)
def test_a_checkpoint_is_refused_by_every_command(
    value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = tmp_path / "bad", tmp_path / "good"
    save_model(bad, _model(box_head__dense_1__kernel=value))
    save_model(good, _model())
    assert cli.main(["sample", "--out", str(tmp_path / "images"), "--num_images", "1"]) == 0
    mixed, out = str(tmp_path / "mixed"), str(tmp_path / "out")
    for command in (
        ["predict", str(tmp_path / "images"), "--checkpoint", str(bad), "--query", "cat"],
        ["ensemble", "--self_trained", str(good), "--fine_tuned", str(bad), "--weight", "0.5"]
        + ["--out", mixed],
        ["convert", str(bad), out, "--from", "owl_det", "--to", "hf"],
        ["export", str(bad), out],
    ):
        capsys.readouterr()
        assert cli.main(command) == 2, command
        error = capsys.readouterr().err.strip()
        assert "1 of the 1024 values of box_head/dense_1/kernel are NaN or infinite" in error
        assert "\n" not in error and str(bad) in error
    assert not Path(mixed).exists() and not Path(out).exists()
    load_model(good)


def _hf(folder: Path, value: float) -> tuple[Path, str]:
    weights = hf_folder.tensors()
    weights["box_head.dense0.bias"][:2] = value
    return hf_folder.write(folder / "hf", weights=weights), "box_head.dense0.bias"


def _scenic(folder: Path, value: float) -> tuple[Path, str]:
    tree = scenic_files.parameters(True)
    tree["class_head"]["Dense_0"]["bias"][:2] = value
    file = folder / "scenic"
    file.write_bytes(serialization.msgpack_serialize({"params": tree}))
    return file, "class_head/Dense_0/bias"


@pytest.mark.parametrize(("kind", "make"), [("hf", _hf), ("scenic", _scenic)])
def test_files_of_others_are_refused(
    kind: str,
    make: Callable[[Path, float], tuple[Path, str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for value in BAD:
        source, name = make(tmp_path, value)
        assert cli.main(["convert", str(source), str(tmp_path / "new"), "--from", kind]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "2 of the " in error and f"tensor {name} are NaN or infinite" in error, error
        assert not (tmp_path / "new").exists()


def test_an_export_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model", _model())
    export.export(tmp_path / "model", tmp_path / "export")
    file = tmp_path / "export" / stablehlo.PARAMS
    params = safetensors.numpy.load_file(file)
    params["box_head/dense_2/bias"][1] = np.nan
    safetensors.numpy.save_file(params, file)
    metadata = json.loads((tmp_path / "export" / export_folder.METADATA).read_text())
    metadata["sha256"][stablehlo.PARAMS] = files.sha256(file)
    (tmp_path / "export" / export_folder.METADATA).write_text(json.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"1 of the 4 values of box_head/dense_2/bias"):
        stablehlo.load(tmp_path / "export")
