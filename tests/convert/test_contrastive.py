"""What only contrastive training uses survives conversions, and is missed where there is none."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from owl_det import cli, path_rules
from owl_det.checkpoints.adapt import adapt
from owl_det.checkpoints.load import load_model, save_model
from owl_det.convert import formats, scenic
from owl_det.evaluation import ensemble
from owl_det.inference.predictor import Predictor
from owl_det.modeling.owl import OwlDetector
from owl_det.modeling.vit import ImageTower
from owl_det.types import LoadedModel
from tests import tiny
from tests.convert import hf_folder
from tests.convert import test_scenic as scenic_files

OURS = ("logit_scale", "image/visual_projection/kernel")
THEIR_HEADS = {"model__head_activation": "gelu", "model__merge_norm_epsilon": 1e-5}
SIZES: dict[str, Any] = {
    "model__image__mlp_width": 64,
    "model__text__mlp_width": 32,
    "model__image__num_heads": 4,
    "model__text__num_heads": 2,
    "model__image__num_layers": 2,
    "model__text__num_layers": 2,
}


@pytest.fixture(scope="module", params=["owlvit", "owlv2"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def converted(kind: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(their folder, our checkpoint)"""
    folder = tmp_path_factory.mktemp(kind)
    theirs = hf_folder.write(folder / "theirs", kind)
    assert cli.main(["convert", str(theirs), str(folder / "ours"), "--from", "hf"]) == 0
    return theirs, folder / "ours"


def test_every_tensor_comes_back_bit_by_bit(
    converted: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    theirs, ours = converted
    capsys.readouterr()
    back = tmp_path / "back"
    assert cli.main(["convert", str(ours), str(back), "--from", "owl_det", "--to", "hf"]) == 0
    assert "as transformers starts them" not in capsys.readouterr().err
    before, after = (load_file(folder / "model.safetensors") for folder in (theirs, back))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].tobytes() == value.tobytes() and after[name].shape == value.shape, name


def test_the_converted_model_compares_whole_images_with_texts(
    converted: tuple[Path, Path],
) -> None:
    loaded = load_model(converted[1])
    assert loaded.config.contrastive == "softmax" and loaded.kind == "detector"
    theirs = load_file(converted[0] / "model.safetensors")
    (projection,) = (v for n, v in theirs.items() if n.endswith("visual_projection.weight"))
    detector = OwlDetector(loaded.config, loaded.preprocess)
    image = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8))
    variables = {"params": loaded.params}
    tower = ImageTower(loaded.config, loaded.preprocess)
    class_token = np.asarray(tower.apply({"params": loaded.params["image"]}, image)[0])
    found = np.asarray(detector.apply(variables, image, method="embed_image"))
    np.testing.assert_allclose(found, class_token @ projection.T, atol=1e-5)
    assert np.ptp(found) > 0.1


def test_detection_does_not_change(kind: str, converted: tuple[Path, Path], tmp_path: Path) -> None:
    """The same boxes and scores with and without them."""
    loaded = load_model(converted[1])
    weights = load_file(converted[0] / "model.safetensors")
    without = {name: x for name, x in weights.items() if "visual_projection" not in name}
    hf_folder.write(tmp_path / "bare", kind, without)
    formats.convert(str(tmp_path / "bare"), tmp_path / "ours", "hf", "owl_det")
    other = load_model(tmp_path / "ours")
    names = path_rules.flatten(loaded.params).keys()
    assert other.config.contrastive == "none"
    assert path_rules.flatten(other.params).keys() == names - set(OURS)
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    found = [
        Predictor.load(path).detect([image], ["cat", "dog"], threshold=0)[0]
        for path in (converted[1], tmp_path / "ours")
    ]
    np.testing.assert_array_equal(found[0].boxes, found[1].boxes)
    np.testing.assert_array_equal(found[0].scores, found[1].scores)


def test_stand_ins_are_no_weights(
    tiny_model: LoadedModel,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A detector without them is written with transformers' start, and read without it again."""
    formats.convert(str(tiny_checkpoint), tmp_path / "theirs", "owl_det", "hf")
    written = load_file(tmp_path / "theirs" / "model.safetensors")
    assert any(name.endswith("visual_projection.weight") for name in written)
    formats.convert(str(tmp_path / "theirs"), tmp_path / "back", "hf", "owl_det")
    back = load_model(tmp_path / "back")
    assert back.config.contrastive == "none"
    jax.tree.map(np.testing.assert_array_equal, back.params, tiny_model.params)


def test_fine_tuning_leaves_them_out_and_says_so(
    converted: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_model(converted[1])
    changes = {
        "model__has_objectness_head": loaded.config.has_objectness_head,
        "checkpoint__init_from": "x",
    }
    config = tiny.config(**{**THEIR_HEADS, **SIZES, **changes})
    with caplog.at_level("INFO", logger="absl"):
        params = adapt(loaded, config)
    assert not set(OURS) & path_rules.flatten(params).keys()
    assert "Left out: logit_scale, image/visual_projection" in caplog.text
    kept = adapt(
        loaded, tiny.config(**{**THEIR_HEADS, **SIZES, **changes, "model__contrastive": "softmax"})
    )
    assert set(OURS) <= path_rules.flatten(kept).keys()


def test_an_ensemble_with_a_fine_tuned_model_has_the_parts_of_both(
    converted: tuple[Path, Path], tmp_path: Path
) -> None:
    loaded = load_model(converted[1])
    bare = path_rules.unflatten(
        {n: v + 1 for n, v in path_rules.flatten(loaded.params).items() if n not in OURS}
    )
    config = dataclasses.replace(loaded.config, contrastive="none")
    tuned = dataclasses.replace(loaded, params=bare, config=config)
    save_model(tmp_path / "tuned", tuned)
    for first, second in ((converted[1], tmp_path / "tuned"), (tmp_path / "tuned", converted[1])):
        ensemble.save(first, second, 0.5, tmp_path / "mixed")
        mixed = load_model(tmp_path / "mixed")
        assert mixed.config.contrastive == "none"
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b - 0.5, atol=1e-6), mixed.params, bare
        )
        (tmp_path / "mixed").rename(tmp_path / f"done_{first.name}")


def test_scenic_s_reach_transformers(tmp_path: Path) -> None:
    tree = scenic_files.parameters(True)
    projection = np.random.default_rng(1).normal(size=(scenic_files.WIDTH, 24)).astype(np.float32)
    tree["backbone"]["clip"]["visual"]["proj"] = {"kernel": projection}
    loaded = scenic.read(str(scenic_files.save(tmp_path / "file", "new", tree)))
    found = path_rules.flatten(loaded.params)
    np.testing.assert_array_equal(found["image/visual_projection/kernel"], projection)
    assert found["logit_scale"] == np.float32(4.6)
