"""Weight-space ensembles."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from data_pipelines.shapes_world import ShapesWorld
from owl_det import cli
from owl_det.checkpoints.load import load_model, save_model
from owl_det.errors import CheckpointError, ConfigError, DataError
from owl_det.evaluation import ensemble
from owl_det.types import LoadedModel
from tests import tiny


@pytest.fixture(scope="module")
def pair() -> tuple[LoadedModel, LoadedModel]:
    return tiny.loaded(step=1), tiny.loaded(seed=2, step=2, model__text__droplayer_rate=0.1)


@pytest.fixture(scope="module")
def saved(
    pair: tuple[LoadedModel, LoadedModel], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    for name, model in zip("ab", pair, strict=True):
        save_model(folder / name, model)
    return str(folder / "a"), str(folder / "b")


def test_weight_is_that_of_the_fine_tuned_model(pair: tuple[LoadedModel, LoadedModel]) -> None:
    mixed = ensemble.interpolate(*pair, 0.4)
    leaves = (jax.tree.leaves(m.params) for m in (*pair, mixed))
    for a, b, c in zip(*leaves, strict=True):
        np.testing.assert_allclose(c, 0.6 * a + 0.4 * b, rtol=1e-6, atol=1e-7)
    assert mixed.step == pair[1].step


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_ends_are_the_models_themselves(
    pair: tuple[LoadedModel, LoadedModel], weight: float
) -> None:
    mixed = ensemble.interpolate(*pair, weight)
    for a, b in zip(
        jax.tree.leaves(mixed.params), jax.tree.leaves(pair[int(weight)].params), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_another_architecture_is_named(pair: tuple[LoadedModel, LoadedModel]) -> None:
    other = tiny.loaded(seed=3, step=3, model__image__mlp_width=32)
    with pytest.raises(CheckpointError, match=r"model\.image\.mlp_width is 64"):
        ensemble.interpolate(pair[0], other, 0.5)
    changed = dataclasses.replace(pair[1].preprocess, pad_value=0.0)
    other = dataclasses.replace(pair[1], preprocess=changed)
    with pytest.raises(CheckpointError, match=r"preprocess\.pad_value"):
        ensemble.interpolate(pair[0], other, 0.5)
    with pytest.raises(ConfigError, match="--weight"):
        ensemble.interpolate(*pair, 1.5)


def test_command_writes_a_checkpoint(saved: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "mixed"
    command = ["ensemble", "--self-trained", saved[0], "--fine-tuned", saved[1]]
    command += ["--out", str(out)]
    assert cli.main([*command, "--weight", "0.4"]) == 0
    loaded = load_model(out)
    wanted = ensemble.interpolate(*map(load_model, saved), 0.4)
    for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(wanted.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert cli.main([*command, "--weight", "0.4"]) == 2  # nothing is overwritten
    assert cli.main(command) == 2


def test_sweep_measures_both_domains(saved: tuple[str, str], tmp_path: Path) -> None:
    source = "kind=shapes_world,split=test,image_size=32,num_images=24"
    points = ensemble.sweep(
        *saved,
        [0.0, 1.0],
        tmp_path,
        in_domain=f"{source},group=base",
        out_of_domain=f"{source},group=novel",
        max_images=0,
    )
    assert [point["weight"] for point in points] == [0.0, 1.0]
    assert json.loads((tmp_path / "sweep.json").read_text())["points"] == points
    assert (tmp_path / "trade_off.png").stat().st_size > 1000
    with pytest.raises(ConfigError, match="no group 'rarest'"):
        ensemble.sweep(
            *saved,
            [0.0],
            tmp_path,
            in_domain=f"{source},group=rarest",
            out_of_domain=source,
            max_images=0,
        )


def test_sweep_measures_the_mixture_of_each_weight(
    saved: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measure that returns a sum of parameters tells which model it was given, and for what."""

    def total(model: LoadedModel) -> float:
        return sum(float(np.asarray(x, np.float64).sum()) for x in jax.tree.leaves(model.params))

    class Measure:
        def __init__(self, model: LoadedModel, evaluations: dict[str, str], max_images: int):
            assert evaluations == {"in_domain": "kind=a", "out_of_domain": "kind=b"}

        def __call__(self, model: LoadedModel) -> dict[str, float]:
            value = total(model)
            return {"in_domain_AP": value, "out_of_domain_AP": -value}

    monkeypatch.setattr(ensemble, "_SweepEvaluation", Measure)
    points = ensemble.sweep(
        *saved, [0.0, 0.25, 1.0], tmp_path, in_domain="kind=a", out_of_domain="kind=b", max_images=3
    )
    first, last = (total(load_model(path)) for path in saved)
    assert abs(first - last) > 0.1
    wanted = [first, 0.75 * first + 0.25 * last, last]
    assert [point["in_domain_AP"] for point in points] == pytest.approx(wanted, abs=1e-3)
    assert [point["out_of_domain_AP"] for point in points] == pytest.approx(
        [-w for w in wanted], abs=1e-3
    )


def test_arguments_are_checked() -> None:
    assert ensemble.parse_weights("0,0.5,1") == [0.0, 0.5, 1.0]
    for text in ("0,x", "", "0,1.5"):
        with pytest.raises(ConfigError, match="--sweep"):
            ensemble.parse_weights(text)


def test_a_group_without_objects_is_named(saved: tuple[str, str], tmp_path: Path) -> None:
    world = ShapesWorld(split="test", image_size=32, num_images=8192)
    groups = {category.name: category.groups for category in world.categories}
    there = {group for names in world[0].names for name in names for group in groups[name]}
    absent = next(group for group in ("rare", "common", "frequent") if group not in there)
    with pytest.raises(DataError, match=f"no object of group '{absent}'.*--max_images"):
        ensemble.sweep(
            *saved,
            [0.5],
            tmp_path / "out",
            in_domain=f"kind=shapes_world,split=test,group={absent},image_size=32",
            out_of_domain="kind=shapes_world,split=test,group=base,image_size=32",
            max_images=1,
        )


def _towers(seed: int, folder: Path, image_size: int, num_positions: int) -> str:
    saved = tiny.save(
        folder,
        kind="towers",
        seed=seed,
        step=seed,
        task="contrastive",
        model__contrastive="softmax",
        model__image_size=image_size,
        model__text__num_positions=num_positions,
        data__with_captions=True,
        optimizer__clip={"scope": "none"},
    )
    return str(saved)


@pytest.mark.nightly
def test_towers_of_another_size_are_averaged_with_a_student(tmp_path: Path) -> None:
    """CLIPSelf: the teacher's position grid grows to the student's, its last text positions go."""
    teacher = _towers(1, tmp_path / "teacher", 16, 12)
    student = _towers(2, tmp_path / "student", 32, 8)
    ensemble.save(teacher, student, 0.7, tmp_path / "mixed")
    mixed = load_model(tmp_path / "mixed")
    a, b = (load_model(path) for path in (teacher, student))
    assert mixed.kind == "towers" and mixed.config == b.config
    for name in ("patch_kernel", "class_embedding"):
        wanted = 0.3 * a.params["image"][name] + 0.7 * b.params["image"][name]
        np.testing.assert_allclose(mixed.params["image"][name], wanted, rtol=1e-5, atol=1e-7)
    first = a.params["text"]["position_embedding"][:8]
    wanted = 0.3 * first + 0.7 * b.params["text"]["position_embedding"]
    np.testing.assert_allclose(mixed.params["text"]["position_embedding"], wanted, rtol=1e-5)
    grid = jax.image.resize(
        a.params["image"]["position_embedding"][1:].reshape(2, 2, -1), (4, 4, 32), "linear"
    )
    wanted = 0.3 * grid.reshape(16, -1) + 0.7 * b.params["image"]["position_embedding"][1:]
    np.testing.assert_allclose(
        mixed.params["image"]["position_embedding"][1:], wanted, rtol=1e-4, atol=1e-6
    )


def test_towers_and_a_detector_do_not_mix(saved: tuple[str, str], tmp_path: Path) -> None:
    towers = _towers(1, tmp_path / "towers", 32, 8)
    with pytest.raises(CheckpointError, match="two detectors or two pairs of towers"):
        ensemble.save(towers, saved[0], 0.5, tmp_path / "mixed")
