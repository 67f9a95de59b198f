"""The benchmark of the assignment."""

import json

import numpy as np
import pytest

from benchmarks import matching as benchmark


@pytest.mark.parametrize("kind", benchmark.KINDS)
def test_all_solvers_find_the_optimum(kind: str) -> None:
    found = benchmark.measure(kind, num_tokens=36, num_instances=20, repeats=1)
    assert found["slots"] == 40  # more than tokens
    assert max(map(abs, found["excess"].values())) < 1e-4
    assert found["over_ours"]["owl_det"] == 1 and found["over_ours"]["scipy"] > 0


def test_copies_compete() -> None:
    """Most instances want the few tokens that fit them best."""
    cost = benchmark.costs("copies", 64, 32)[:, :32]
    assert len(set(np.argmin(cost, axis=0).tolist())) < 32


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--tokens", "35", "--instances", "4"]) == 2
    assert "--tokens: 35 is no square number" in capsys.readouterr().err
    flags = ["--tokens", "16", "--instances", "4", "16", "--repeats", "1"]
    assert benchmark.main(flags) == 0
    assert len(json.loads(capsys.readouterr().out)["cases"]) == len(benchmark.KINDS)
