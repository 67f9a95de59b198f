"""The benchmark against transformers."""

import json

import pytest

from benchmarks import inference as benchmark


def test_useless_arguments_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--threads", "100000"]) == 2
    assert "--threads: 100000 asked for" in capsys.readouterr().err
    assert benchmark.main(["--repeats", "0"]) == 2
    assert "must be positive" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "dtype", "bound"),
    [("forward", "float32", 1e-4), ("gradient", "float32", 1e-4), ("forward", "bfloat16", 0.1)],
)
def test_peers_agree(
    task: str, dtype: str, bound: float, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch", reason="needs the extra parity")
    pytest.importorskip("transformers", reason="needs the extra parity")
    flags = ["--models", "tiny", "--peers", "owl_det", "sdpa", "--repeats", "1", "--queries", "2"]
    flags += ["--task", task, "--dtype", dtype, "--batch_size", "2"]
    assert benchmark.main(flags) == 0
    found = json.loads(capsys.readouterr().out)["models"]["tiny"]["theirs_over_ours"]["sdpa"]
    assert max(found["max_abs_difference"].values()) < bound
    assert found["cpu"] > 0 and found["running_bytes"] > 0
