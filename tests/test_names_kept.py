"""A fine-tuned model keeps the names it was trained to find, wherever its weights go."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from data_pipelines.features import Category
from data_pipelines.input import MAX_NAMES, TrainInput
from owl_det import cli
from owl_det.checkpoints.load import load_model, save_model
from owl_det.checkpoints.store import Checkpoints
from owl_det.inference.predictor import Predictor
from owl_det.training import train_step
from tests import tiny
from tests.convert import hf_folder

NAMES = ("red circle", "chien à poil")


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that may be written for transformers, with names."""
    folder = tmp_path_factory.mktemp("named")
    theirs = hf_folder.write(folder / "theirs", "owlv2")
    assert cli.main(["convert", str(theirs), str(folder / "bare"), "--from", "hf"]) == 0
    bare = load_model(folder / "bare")
    assert bare.names == ()
    save_model(folder / "named", dataclasses.replace(bare, names=NAMES))
    return folder / "named"


def test_transformers_is_told_the_names_and_gives_them_back(named: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    assert cli.main(["convert", str(named), str(there), "--from", "owl_det", "--to", "hf"]) == 0
    config = json.loads((there / "config.json").read_text())
    assert config["id2label"] == {"0": NAMES[0], "1": NAMES[1]}
    assert config["label2id"] == {NAMES[0]: 0, NAMES[1]: 1}
    assert cli.main(["convert", str(there), str(back), "--from", "hf"]) == 0
    assert load_model(back).names == NAMES


def test_labels_that_transformers_makes_up_are_no_names(tmp_path: Path) -> None:
    labels = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}
    theirs = hf_folder.write(tmp_path / "theirs", "owlv2", changed=labels)
    assert cli.main(["convert", str(theirs), str(tmp_path / "ours"), "--from", "hf"]) == 0
    assert load_model(tmp_path / "ours").names == ()


def test_exports_and_ensembles_keep_them(named: Path, tmp_path: Path) -> None:
    assert cli.main(["export", str(named), str(tmp_path / "export")]) == 0
    assert Predictor.load(tmp_path / "export").names == NAMES
    metadata = tmp_path / "export" / "export.json"
    content = json.loads(metadata.read_text())
    assert content["names"] == list(NAMES)
    del content["names"]  # as older exports
    metadata.write_text(json.dumps(content))
    assert Predictor.load(tmp_path / "export").names == ()
    both = ["--self_trained", str(named), "--fine_tuned", str(named)]
    assert cli.main(["ensemble", *both, "--weight", "0.5", "--out", str(tmp_path / "mean")]) == 0
    assert load_model(tmp_path / "mean").names == NAMES


def test_a_training_saves_them_and_they_may_change(tmp_path: Path) -> None:
    config = tiny.config()
    state = jax.jit(lambda: train_step.init_state(config))()
    checkpoints = Checkpoints(tmp_path, config, names=NAMES)
    checkpoints.begin()
    checkpoints.save(state, "input")
    checkpoints.wait()
    checkpoints.close()
    assert load_model(tmp_path).names == NAMES
    others = Checkpoints(tmp_path, config, names=["cat"])
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state)
    assert int(others.restore(template, "input").step) == 0
    others.close()


def test_names_are_those_of_lists_and_each_is_one() -> None:
    data = TrainInput(
        tiny.config(
            data__train={
                "one": {"kind": "shapes_world", "image_size": 32, "num_images": 4},
                "two": {"kind": "shapes_world", "image_size": 32, "num_images": 4},
                "many": {"kind": "shapes_world", "image_size": 32, "num_images": 4},
            }
        )
    )
    first, second, many = data.sources
    first.categories = _categories(["Dog", "cat"])
    second.categories = _categories(["dog", "red fox"])
    many.categories = _categories([f"thing {i}" for i in range(MAX_NAMES + 1)])
    assert data.names == ("Dog", "cat", "red fox")


def _categories(names: list[str]) -> tuple[Category, ...]:
    return tuple(Category(id=index, name=name) for index, name in enumerate(names))
