"""The benchmark of a fresh start runs, and tells a user what is wrong."""

import json
from pathlib import Path

import pytest

from benchmarks import loading


@pytest.mark.nightly
def test_it_prints_seconds(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert loading.main([str(tiny_checkpoint)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert 0 < printed["detect_s"] < printed["first_detect_s"]  # the first call compiles
    assert loading.main([str(tmp_path / "nowhere")]) == 2
    assert "no checkpoint there" in capsys.readouterr().err
