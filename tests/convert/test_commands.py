"""`owl-det convert` and `owl-det models`."""

import json
import re
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from owl_det import cli, path_rules
from owl_det.checkpoints.adapt import adapt
from owl_det.checkpoints.load import load_model, save_model
from owl_det.convert import clip_vocabulary, formats, models
from owl_det.errors import CheckpointError
from owl_det.types import LoadedModel
from tests import tiny
from tests.convert import hf_folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ours with random weights."""
    config = tiny.config()
    shapes = models.parameter_shapes(config.model, config.preprocess)
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    model = LoadedModel(
        params=path_rules.unflatten(values),
        config=config.model,
        preprocess=config.preprocess,
        eval_prompts="none",
        step=5,
    )
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    save_model(path, model)
    return path


def test_there_and_back(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there, back = str(tmp_path / "hf"), str(tmp_path / "back")
    assert cli.main(["convert", str(saved), there, "--from", "owl_det", "--to", "hf"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["wrote"] == there and said["image_size"] == 32
    assert cli.main(["convert", there, back, "--from", "hf", "--eval_prompts", "none"]) == 0
    before, after = load_model(saved), load_model(back)
    assert before.eval_prompts == after.eval_prompts == "none"
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    # Converted weights start a training, of what transformers computes.
    theirs = {"model__head_activation": "gelu", "model__merge_norm_epsilon": 1e-5}
    params = adapt(after, tiny.config(**theirs))
    with pytest.raises(CheckpointError, match=r"model\.head_activation is 'gelu' there"):
        adapt(after, tiny.config())
    jax.tree.map(np.testing.assert_array_equal, params, before.params)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SAVED", "FULL", "--from", "owl_det"], "is not empty; name a new folder"),
        (["nowhere", "NEW", "--from", "hf"], "nowhere: not a folder with config.json"),
        (["nowhere", "NEW", "--from", "scenic"], "nowhere: no such file or folder"),
        (["SAVED", "NEW", "--from", "torch"], "--from torch: is not one of scenic, hf"),
        (["SAVED", "NEW", "--from", "owl_det", "--to", "tf"], "--to tf: is not one of owl_det"),
        (["SAVED", "NEW", "--from", "hf"], "config.json: no such file"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    places = {"SAVED": str(saved), "FULL": str(full), "NEW": str(tmp_path / "new")}
    assert cli.main(["convert", *(places.get(a, a) for a in arguments)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.count("\n") == 0
    assert not (tmp_path / "new").exists()
    assert (full / "file").read_text() == "mine"


def test_without_a_connection_the_hub_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["convert", "google/owlvit-base-patch32", str(tmp_path / "new"), "--from", "hf"]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert cli.main(command) == 2
    assert "pip install huggingface_hub" in capsys.readouterr().err

    def offline(*arguments: Any, **options: Any) -> str:
        raise ConnectionError("no route\nto host")

    hub = types.SimpleNamespace(snapshot_download=offline)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert cli.main(command) == 2
    error = capsys.readouterr().err.strip()
    assert "the hub does not give it (no route to host)" in error and "\n" not in error


def test_the_hub_is_asked_for_a_revision_and_for_no_pickle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def download(name: str, *, revision: Any, allow_patterns: Any) -> str:
        asked.append((name, revision))
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        (tmp_path / "snapshot" / "config.json").write_text("{}")
        return str(tmp_path / "snapshot")

    hub = types.SimpleNamespace(snapshot_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    for source in ("openai/clip-vit-base-patch16", "openai/clip-vit-base-patch16@refs/pr/7"):
        assert cli.main(["convert", source, str(tmp_path / "new"), "--from", "clip"]) == 2
        error = capsys.readouterr().err
        assert "pickles (pytorch_model.bin) are not read" in error
        assert "openai/clip-vit-base-patch16@refs/pr/N" in error
    name = "openai/clip-vit-base-patch16"
    assert asked == [(name, None), (name, "refs/pr/7")]


def test_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    text = capsys.readouterr().out
    assert "owl-det convert google/owlv2-large-patch14-ensemble models/owlv2-l14-ensemble" in text
    assert cli.main(["models", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in lines if line["kind"] == "detector"]
    assert len({row["name"] for row in rows}) == len({row["hub"] for row in rows}) == 9
    for row in rows:
        patch_size = int(row["name"].split("-")[1][1:])
        assert row["image_size"] % patch_size == 0
    towers = [line for line in lines if line["kind"] == "towers"]
    assert len({row["command"] for row in towers}) == len(towers) > 20
    for row in towers:
        patch = re.search(r"patch(\d+)", row["source"])
        assert patch and row["image_size"] % int(patch[1]) == 0, row
        assert row["command"].split(" --from ")[1] in formats.readers()


def test_openai_s_own_archive_is_refused_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(tmp_path / "RN50.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("archive/code/__torch__.py", "raise SystemExit(7)")
    arguments = ["convert", str(tmp_path / "RN50.pt"), str(tmp_path / "new")]
    assert cli.main([*arguments, "--from", "clip_resnet"]) == 2
    said = capsys.readouterr().err.strip()
    assert "RN50.pt" in said and "safetensors" in said and "\n" not in said, said


def test_vocabulary_is_clip_s() -> None:
    words = clip_vocabulary.tokens(clip_vocabulary.read_merges())
    assert len(words) == len(set(words)) == clip_vocabulary.SIZE
    assert words[0] == "!" and words[320] == "a</w>" and words[2368] == "cat</w>"
    assert words[clip_vocabulary.START] == "<|startoftext|>"


@pytest.mark.parametrize("is_folder", [False, True])
def test_weights_of_others_given_as_a_checkpoint_are_pointed_to_convert(
    is_folder: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", "--out", "images", "--num_images", "1"]) == 0
    name = "google/owlv2-base-patch16"
    if is_folder:
        hf_folder.write(tmp_path / name)
    capsys.readouterr()
    assert cli.main(["predict", "images", "--checkpoint", name, "--query", "cat"]) == 2
    error = capsys.readouterr().err.strip()
    assert f"owl-det convert {name} DST --from hf" in error and "\n" not in error
