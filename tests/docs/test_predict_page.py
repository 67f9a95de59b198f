"""Runs the examples of docs/predict.md."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from owl_det import checkpoint, cli
from owl_det.checkpoint import LoadedModel
from tests import tiny


def _blocks(page: str) -> list[str]:
    """Python blocks, and single commands, in order."""
    pattern = re.compile(r"^```python\n(.*?)^```$|^    (owl-det [^\n]*)$", re.MULTILINE | re.DOTALL)
    return [match.group(1) or match.group(2) for match in pattern.finditer(page)]


@pytest.mark.slow
def test_examples_run(
    repository_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny.config()
    model = LoadedModel(
        params=tiny.params(config, seed=1),
        model=config.model,
        preprocess=config.preprocess,
        eval_prompts="none",
        step=5,
    )
    monkeypatch.chdir(tmp_path)
    checkpoint.save_model(tmp_path / "RUN", model)
    blocks = _blocks((repository_root / "docs/predict.md").read_text())
    assert sum(block.startswith("owl-det") for block in blocks) == 5 and len(blocks) == 11
    scope: dict[str, Any] = {}
    for block in blocks:
        if block.startswith("owl-det"):
            assert cli.main(shlex.split(block)[1:]) == 0, block
        else:
            exec(compile(block, "docs/predict.md", "exec"), scope)
    assert len(scope["found"]) == 2 and len(scope["proposals"][0]) > 0
    assert (tmp_path / "collection").is_dir() and '"detections"' in capsys.readouterr().out
