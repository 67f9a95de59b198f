"""What a run that goes on may change, without a training."""

import json
from pathlib import Path
from typing import Any

import pytest

from owl_det.checkpoints import run_file, same_run
from owl_det.errors import CheckpointError
from tests import tiny


def _run_file(**changes: Any) -> dict[str, Any]:
    return run_file.of_training(tiny.config(**changes), 5, "input")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model__activation": "gelu"}, "model.activation"),
        ({"model__image__pre_norm": False}, "model.image.pre_norm"),
        ({"preprocess": {"pad_value": 0.0}}, "preprocess.pad_value"),
        ({"preprocess": {"mean": (0.0, 0.0, 0.0)}}, "preprocess.mean"),
    ],
)
def test_settings_that_no_shape_shows_may_not_change(changes: dict[str, Any], key: str) -> None:

    saved = json.loads(json.dumps(_run_file()))
    same_run.check_same_model(saved, _run_file(), Path("there"))
    with pytest.raises(CheckpointError, match=f"another architecture; config.{key}"):
        same_run.check_same_model(saved, _run_file(**changes), Path("there"))


def test_what_concerns_training_only_may_change() -> None:
    changed = _run_file(model__remat="full", model__text__droplayer_rate=0.3)
    same_run.check_same_model(_run_file(), changed, Path("there"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": "5"}, "step '5' is no number of steps"),
        ({"step": True}, "step 'True' is no number of steps"),
        ({"step": [5]}, "is no number of steps"),
        ({"step": -1}, "step '-1' is no number of steps"),
        ({"eval_prompts": None}, "eval_prompts 'None' is no text"),
        ({"eval_prompts": "best"}, "'best' is not one of"),
    ],
)
def test_a_malformed_run_file_is_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "metadata"
    file.write_text(json.dumps(_run_file()))
    assert run_file.describe(tmp_path).step == 5
    file.write_text(json.dumps(_run_file() | changes))
    with pytest.raises(CheckpointError, match=message) as error:
        run_file.describe(tmp_path)
    assert str(tmp_path / "run") in str(error.value)


def test_a_run_file_nested_without_end_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metadata").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="metadata: cannot be read"):
        run_file.describe(tmp_path)
