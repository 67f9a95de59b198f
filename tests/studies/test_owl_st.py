"""The study of OWL-ST: its commands are ones that the programs take, and its readers fit them."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines import shapes_world
from owl_det import cli
from owl_det.annotate import label_spaces
from owl_det.annotate.run import settings_of
from owl_det.config import ShapesWorldSource
from studies import arm_metrics, claims, command, engine, owl_st, report
from studies.owl_st import STUDY
from studies.study import Arm
from tests.studies.resolved import resolved

TRAININGS = [arm for arm in STUDY.arms if arm.commands[0][0] == "owl_det.main"]
OTHERS = [arm for arm in STUDY.arms if arm not in TRAININGS]


def _name(arm: Arm) -> str:
    return arm.name


@pytest.mark.parametrize("arm", TRAININGS, ids=_name)
def test_trainings_resolve(arm: Arm, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolved(arm, monkeypatch)
    assert config.seed == 7
    starts = [needed for needed in arm.needs if config.checkpoint.init_from == f"/{needed}"]
    assert starts or config.checkpoint.init_from == ""
    assert config.checkpoint.class_head_from_projection == (starts == ["pretrain"])
    shapes = config.data.eval["shapes"]
    assert isinstance(shapes, ShapesWorldSource)
    assert (shapes.split, shapes.num_images) == ("test", owl_st.TEST_IMAGES)
    assert config.evaluation.max_images == 0
    if config.name == "selftrain_shapes":
        assert config.data.path in [f"/{needed}/records" for needed in arm.needs]


def test_compared_trainings_take_as_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = {arm.name: resolved(arm, monkeypatch) for arm in TRAININGS}
    size = {name: (config.num_steps, config.batch_size) for name, config in configs.items()}
    for claim in STUDY.claims:
        is_next_stage = claim.arm == "finetuned" or claim.control == "pretrain"
        if claim.arm in size and claim.control in size and not is_next_stage:
            assert size[claim.arm] == size[claim.control], claim.statement


@pytest.mark.parametrize("arm", OTHERS, ids=_name)
def test_commands_are_understood(arm: Arm, monkeypatch: pytest.MonkeyPatch) -> None:
    if any("noun_phrases" in argument for argument in arm.commands[0]):
        pytest.importorskip("textblob", reason="tags the words of noun phrases")
    seen: list[str] = []

    def note(arguments: Any) -> int:
        seen.append(arguments.command)
        if arguments.command == "annotate":
            settings = settings_of(arguments)
            label_spaces.make(settings.labels, settings.vocabularies)
        return 0

    for handler in (
        *("annotate._annotate", "annotate._annotate_precision"),
        *("ensemble._ensemble", "evaluate._evaluate"),
    ):
        monkeypatch.setattr(f"owl_det.cli.{handler}", note)
    for module, *arguments in arm.commands:
        assert module == "owl_det.cli"
        assert cli.main(arguments) == 0
    assert len(seen) == len(arm.commands)


def test_metrics_of_claims_are_of_shapes_world() -> None:
    groups = {
        group
        for world in shapes_world.ShapesWorld(split="test", num_images=1).categories
        for group in world.groups
    }
    known = {f"{metric}_{group}" for metric in ("AP50", "region_top1") for group in groups}
    known |= {"AP50", "images_per_second", "above_line"}
    metrics = {claim.metric.removeprefix("curve:") for claim in STUDY.claims}
    assert metrics <= known
    assert {key for key in arm_metrics.KEPT if key.startswith("AP50")} <= known


def test_first_images_of_the_test_split_are_those_of_trainings() -> None:
    """`owl-det evaluate` opens more and takes the first; trainings open as many as they take."""
    few, many = (
        shapes_world.ShapesWorld(split="test", num_images=n) for n in (owl_st.TEST_IMAGES, 1024)
    )
    assert few.categories == many.categories
    for index in (0, owl_st.TEST_IMAGES - 1):
        np.testing.assert_array_equal(np.asarray(few[index].image), np.asarray(many[index].image))
        np.testing.assert_array_equal(few[index].boxes_xyxy, many[index].boxes_xyxy)
        assert few[index].names == many[index].names


def test_reads_a_training(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    shapes = {"step": 20, "AP50_novel": 0.25, "dataset": "v1"}
    summary = {"step": 20, "AP": 0.9, "datasets": {"other": {"AP50_novel": 0.5}, "shapes": shapes}}
    (tmp_path / "eval" / "summary.json").write_text(json.dumps(summary))
    lines = [
        {"step": 10, "images_per_second": 5.0},
        {"step": 10, "eval/shapes/AP50_novel": 0.123456, "eval/other/AP50_novel": 0.5},
        {"step": 10, "eval/shapes/AP_base": 0.2, "eval/shapes/AP75": 0.1},
        {"step": 20, "images_per_second": 9.0, "eval/shapes/AP50_novel": 0.25},
        {"step": 20, "images_per_second": 7.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    metrics = arm_metrics.read_training(tmp_path)
    curve = [{"step": 10, "AP50_novel": 0.1235, "AP_base": 0.2}, {"step": 20, "AP50_novel": 0.25}]
    assert metrics == {"step": 20, "AP50_novel": 0.25, "images_per_second": 7.0, "curve": curve}
    assert claims.value_of(metrics, "curve:AP50_novel") == pytest.approx((0.1235 + 0.25) / 2)


def test_reads_a_sweep(tmp_path: Path) -> None:
    """The ends are (1, 0) and (0, 1); at 0.5 the line is at (0.5, 0.5)."""
    values = {0.0: (1.0, 0.0), 0.5: (0.6, 0.7), 0.75: (0.2, 0.8), 1.0: (0.0, 1.0)}
    points = [
        {"weight": w, "out_of_domain_AP50": out, "in_domain_AP50": within}
        for w, (out, within) in values.items()
    ]
    (tmp_path / "sweep.json").write_text(json.dumps({"points": points}))
    metrics = arm_metrics.read_sweep(tmp_path)
    assert (metrics["best_weight"], metrics["above_line"]) == (0.5, pytest.approx(0.3))


def test_command_draws_without_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(owl_st, "STUDY", dataclasses.replace(STUDY, results=tmp_path))
    assert owl_st.main(["--draw"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.md")
    assert owl_st.main([]) == 2
    assert "--workdir: name a folder" in capsys.readouterr().err


def test_a_run_without_report_leaves_the_committed_results_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[Path, list[str]]] = []
    monkeypatch.setattr(
        engine, "run", lambda study, names, *rest: ran.append((study.results, list(names)))
    )
    monkeypatch.setattr(command, "is_installed", lambda package: True)
    monkeypatch.setattr(report, "write", lambda study, workdir: study.results / "report.md")
    assert owl_st.main([f"--workdir={tmp_path}"]) == 0
    assert owl_st.main([f"--workdir={tmp_path}", "--report"]) == 0
    every = [arm.name for arm in STUDY.arms]
    assert ran == [(tmp_path / "results", list(STUDY.main)), (STUDY.results, every)]


def test_what_a_study_needs_is_named_before_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "textblob", None)
    assert owl_st.main([f"--workdir={tmp_path}"]) == 2
    assert "needs textblob: pip install -e '.[phrases]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
