"""The benchmark of a fresh start runs, and tells a user what is wrong."""

import json
from pathlib import Path

import jax
import pytest

from benchmarks import loading
from owl_det.checkpoints.load import save_model
from owl_det.modeling import build
from owl_det.types import LoadedModel
from tests import tiny


@pytest.mark.nightly
def test_it_prints_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny.config()
    model = LoadedModel(
        params=jax.jit(lambda key: build.init_params(config, key))(jax.random.key(1)),
        config=config.model,
        preprocess=config.preprocess,
        eval_prompts="none",
        step=5,
    )
    save_model(tmp_path / "model", model)
    assert loading.main([str(tmp_path / "model")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert 0 < printed["detect_s"] < printed["first_detect_s"]  # the first call compiles
    assert loading.main([str(tmp_path / "nowhere")]) == 2
    assert "no checkpoint there" in capsys.readouterr().err
