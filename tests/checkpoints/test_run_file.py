"""What a run file may say, and what version 0.1 wrote into it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from owl_det.checkpoints import run_file
from owl_det.config import Config, ResNetConfig
from owl_det.errors import CheckpointError


def _described(folder: Path, **changes: Any) -> Any:
    config = Config()
    run = {
        "format": run_file.FORMAT,
        "step": 0,
        "model": json.loads(json.dumps(dataclasses.asdict(config.model))),
        "preprocess": json.loads(json.dumps(dataclasses.asdict(config.preprocess))),
        "eval_prompts": "none",
    }
    file = folder / "run" / "metadata"
    file.parent.mkdir()
    file.write_text(json.dumps(run | changes))
    return run_file.describe(folder)


def _former_model(resnet: Any) -> dict[str, Any]:
    model = dataclasses.asdict(Config().model)
    del model["family"], model["image"]["kind"]
    return {**model, "image_size": 224, "resnet": resnet}


@pytest.mark.parametrize("model", [[1], "vit", None, 3, True])
def test_a_model_that_is_no_group_of_keys_is_refused(tmp_path: Path, model: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.model: expected a group of keys"):
        _described(tmp_path, model=model)


@pytest.mark.parametrize("resnet", [[1], "rn50", 3])
def test_a_former_resnet_that_is_no_group_of_keys_is_refused(tmp_path: Path, resnet: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.model\.image: expected a group of keys"):
        _described(tmp_path, model=_former_model(resnet), kind="resnet")


def test_a_resnet_of_version_0_1_is_towers_with_one(tmp_path: Path) -> None:
    former = {"width": 32, "num_blocks": [1, 1, 1, 1], "num_heads": 16, "norm_epsilon": 1e-5}
    found = _described(tmp_path, model=_former_model(former), kind="resnet")
    assert (found.kind, found.is_resnet) == ("towers", True)
    assert found.config.image == ResNetConfig(width=32, num_blocks=(1, 1, 1, 1), num_heads=16)


def test_a_detector_of_version_0_1_has_a_vit(tmp_path: Path) -> None:
    found = _described(tmp_path, model=_former_model(dataclasses.asdict(ResNetConfig())))
    assert (found.kind, found.config.image.kind) == ("detector", "vit")
    assert found.config.family == "owl"
