"""The benchmark against transformers."""

import importlib
import json
import sys
import types

import jax
import pytest

from benchmarks import inference as benchmark


def test_useless_arguments_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark.command, "require", lambda *_: None)
    assert benchmark.main(["--threads", "100000"]) == 2
    assert "--threads: 100000 asked for" in capsys.readouterr().err
    assert benchmark.main(["--repeats", "0"]) == 2
    assert "must be positive" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["inference", "parity"])
def test_without_torch_it_says_what_to_install(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert importlib.import_module(f"benchmarks.{name}").main([]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "[parity]" in printed.err and not printed.out


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is a GPU")
def test_a_missing_gpu_is_said_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = types.SimpleNamespace(
        __version__="0", cuda=types.SimpleNamespace(is_available=lambda: False)
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(__version__="0"))
    for peers in (["owl_det"], ["sdpa"]):
        assert benchmark.main(["--device", "cuda", "--peers", *peers]) == 2
        error = capsys.readouterr().err
        assert "--device cuda" in error and error.count("\n") == 1


@pytest.mark.nightly
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
