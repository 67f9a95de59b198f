"""The benchmark of detection with many queries."""

import json
from pathlib import Path

import pytest

from benchmarks import queries as benchmark


@pytest.mark.nightly
def test_command_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    flags = ["--model", "tiny", "--queries", "3", "700", "--repeats", "1", "--out", str(out)]
    assert benchmark.main(flags) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text())
    assert set(found["queries"]) == {"3", "700"} and found["over_first"]["3"]["cpu"] == 1
    assert all(entry["peak_bytes"] > 2**20 for entry in found["queries"].values())
    assert benchmark.main(["--queries", "0"]) == 2
    assert "--repeats and --queries: must be positive" in capsys.readouterr().err
