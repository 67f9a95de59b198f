"""The study of distillation: its commands are ones that the programs take, and its readers fit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines import panoptic_world, shapes_world
from owl_det import cli
from owl_det import config as config_lib
from owl_det.checkpoints.load import save_model
from owl_det.config import Config
from owl_det.types import LoadedModel
from studies import arm_metrics, distillation, teacher_quality
from studies.distillation import STUDY
from tests import tiny, tiny_distillation
from tests.studies.resolved import resolved

TRAININGS = [arm for arm in STUDY.arms if arm.commands[0][0] == "owl_det.main"]
DETECTORS = [arm.name for arm in TRAININGS if "annotator_shapes" in arm.commands[0][1]]
TOWERS = tiny_distillation.towers_config()
MEASURED = [arm for arm in STUDY.arms if arm.read is arm_metrics.read_towers]


@pytest.fixture(scope="module")
def configs() -> dict[str, Config]:
    """The configs as the commands of the trainings leave them."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return {arm.name: resolved(arm, monkeypatch) for arm in TRAININGS}


def test_towers_start_from_their_teacher(configs: dict[str, Config]) -> None:
    assert all(config.seed == 7 for config in configs.values())
    for name in configs.keys() - {"teacher", *DETECTORS}:
        config = configs[name]
        assert config.checkpoint.init_from == config.distill.teacher == "/teacher"
        assert config.checkpoint.image_size == distillation.SIDE
        # The student's own tokens would have nothing to teach it.
        assert config.distill.dense_teacher == ("/clipself" if "densevlm" in name else "")


def test_detectors_go_on_from_one_with_the_teachers_texts(configs: dict[str, Config]) -> None:
    for name in DETECTORS:
        config, is_first = configs[name], name == "start"
        assert config.model.image_size == distillation.SIDE
        assert config.distill.teacher == "/teacher"
        assert config.checkpoint.init_from == ("/teacher" if is_first else "/start")
        assert config.checkpoint.fresh == (("^image/",) if is_first else ())
        # The text tower stays the teacher's, so that queries and captions share its space.
        assert config.optimizer.frozen == ("^text/",)


def test_teachers_are_shared_by_all_seeds() -> None:
    shared = {arm.name for arm in STUDY.arms if arm.is_shared}
    assert shared == {"teacher", "crops", "crops_plain", "before"}


def test_compared_trainings_differ_in_distillation_alone(configs: dict[str, Config]) -> None:
    """So steps, batches, data and rates are the same, but for the share of negatives."""

    def rest(name: str) -> Config:
        same = {"distill": config_lib.DistillConfig(), "loss": config_lib.LossConfig(), "name": ""}
        return dataclasses.replace(configs[name], **same)

    assert all(rest(name) == rest("detector") for name in DETECTORS if name != "start")
    assert rest("clipself") == rest("clipself_whole")
    assert rest("densevlm") == rest("densevlm_all") == rest("densevlm_separate")


@pytest.mark.parametrize(
    ("name", "branches", "differs"),
    [
        ("detector", [], {}),
        ("gridclip_shuffled", ["gridclip_image"], {"shuffle_targets": True}),
        ("gkd_shuffled", ["hierkd_global"], {"shuffle_targets": True}),
        ("ikd_few_negatives", ["hierkd_instance"], {}),
        ("regions", ["clipself"], {}),
        ("clipself", ["clipself"], {}),
        ("densevlm_all", ["densevlm"], {}),
    ],
)
def test_arms_have_the_branches_of_their_names(
    name: str, branches: list[str], differs: dict[str, Any], configs: dict[str, Config]
) -> None:
    distill = configs[name].distill
    assert list(distill.active()) == branches
    assert distill.shuffle_targets == differs.get("shuffle_targets", False)


def test_measuring_commands_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []

    def note(arguments: Any) -> int:
        seen.append((arguments.command, getattr(arguments, "split", "")))
        return 0

    for handler in ("ensemble._ensemble", "evaluate._evaluate_regions"):
        monkeypatch.setattr(f"owl_det.cli.{handler}", note)
    for arm in STUDY.arms:
        for module, *arguments in arm.commands:
            if module == "owl_det.cli":
                assert cli.main(arguments) == 0
    splits = ["panoptic_test", "image_text_test"] * len(MEASURED)
    assert [split for command, split in seen if command == "evaluate-regions"] == splits
    assert [command for command, _ in seen].count("ensemble") == 1
    assert "panoptic_test" in panoptic_world.SPLITS
    assert "image_text_test" in shapes_world.SPLITS


def test_reads_towers(tmp_path: Path) -> None:
    regions = {"boxes_top1": 0.25, "stuff_masks_top5": 0.5, "num_boxes": 3, "kind": "towers"}
    (tmp_path / "regions.json").write_text(json.dumps(regions))
    (tmp_path / "whole.json").write_text(json.dumps({"recall_at_1": 0.75, "boxes_top1": 0.1}))
    metrics = arm_metrics.read_towers(tmp_path)
    assert metrics == {"boxes_top1": 0.25, "stuff_masks_top5": 0.5, "whole_top1": 0.75}


@pytest.fixture
def quality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Measures eight scenes of 32 pixels with the towers at `tmp_path / "towers"`."""
    monkeypatch.setattr(teacher_quality, "IMAGE_SIZE", 32)
    monkeypatch.setattr(teacher_quality, "BATCH", 8)

    def measure() -> Any:
        argv = [f"--checkpoint={tmp_path / 'towers'}", "--num_images=8"]
        assert teacher_quality.main([*argv, f"--out={tmp_path / 'quality.json'}"]) == 0
        return arm_metrics.read_quality(tmp_path)

    return measure


def _towers(params: Any) -> LoadedModel:
    return LoadedModel(
        kind="towers",
        params=params,
        config=TOWERS.model,
        preprocess=TOWERS.preprocess,
        eval_prompts="none",
        step=0,
    )


def test_quality_of_a_teacher_that_knows_all(quality: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = panoptic_world.PanopticWorld(split="panoptic_test", image_size=32, num_images=8)
    names = [category.name for category in source.categories]

    def know(self: Any, params: Any, images: Any, boxes: Any) -> Any:
        """One-hot vectors of the things; of the scene, the sum of all that is there."""
        vectors = np.zeros((*boxes.shape[:2], len(names)), np.float32)
        for row in range(len(boxes)):
            found = source.regions(row)
            vectors[row, 0, [names.index(name) for name in found.present]] = 1
            for i in np.flatnonzero(found.is_thing):
                vectors[row, 1 + i, names.index(found.names[i])] = 1
        return vectors

    eye = np.eye(len(names), dtype=np.float32)
    monkeypatch.setattr(teacher_quality, "load_model", lambda path: _towers({}))
    monkeypatch.setattr(teacher_quality.Teacher, "embed_texts", lambda *_: eye)
    monkeypatch.setattr(teacher_quality.Teacher, "embed_boxes", know)
    monkeypatch.setattr(teacher_quality.jax, "jit", lambda function: function)
    metrics = quality()
    assert metrics["boxes_top1"] == 1.0 and metrics["recall_at_10"] == 1.0
    assert metrics["recall_fall"] == 0.0
    # All names of a scene are as near as each other, and ties count against them.
    assert metrics["recall"]["1 to 4 names"]["5"] == 1.0
    assert metrics["recall"]["7 names or more"]["5"] == 0.0


@pytest.mark.nightly
def test_quality_of_fresh_towers_is_chance(quality: Any, tmp_path: Path) -> None:
    save_model(tmp_path / "towers", _towers(tiny.params(TOWERS)))
    metrics = quality()
    assert metrics["num_images"] == 8 and metrics["boxes_top1"] < 0.2
    assert metrics["recall_at_1"] <= metrics["recall_at_10"] <= metrics["recall_at_100"] <= 1


def test_command_draws_without_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distillation, "STUDY", dataclasses.replace(STUDY, results=tmp_path))
    assert distillation.main(["--draw"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.md")
    assert distillation.main([]) == 2
    assert "--workdir: name a folder" in capsys.readouterr().err
