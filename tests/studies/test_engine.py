"""Arms run once, go on after a kill, and know when their result is another version's."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from owl_det.errors import UserError
from studies import engine, result_files
from studies.study import ROOT, Study
from tests.studies import fake_study


def _calls(workdir: Path, seed: int = 0) -> dict[str, int]:
    files = (workdir / f"seed{seed}").glob("*/calls.txt")
    return {file.parent.name: len(file.read_text().splitlines()) for file in files}


def _value(study: Study, name: str, seed: int = 0) -> float:
    file = result_files.result_file(study, study.arm(name), seed)
    return result_files.read_result(file)["metrics"]["value"]


def test_runs_what_is_needed_once_for_each_seed(tmp_path: Path) -> None:
    study, work = fake_study.chain(tmp_path / "results"), tmp_path / "work"
    engine.run(study, ["second"], [0, 1], work)
    assert [_value(study, "second", seed) for seed in (0, 1)] == [11.0, 13.0]
    assert _calls(work) == _calls(work, 1) == {"first": 1, "second": 1}
    engine.run(study, ["third"], [0], work)
    assert _calls(work) == {"first": 1, "second": 1, "third": 1}
    assert _value(study, "third") == 111.0


def _with_teacher(results: Path) -> Study:
    """`student` needs `teacher`, which all seeds share."""
    return fake_study.study(
        results,
        fake_study.arm("teacher", "--value=1", is_shared=True),
        fake_study.arm("student", "--value=10", needs=("teacher",)),
    )


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_shared_arm_runs_once_for_all_seeds(jobs: int, tmp_path: Path) -> None:
    study, work = _with_teacher(tmp_path / "results"), tmp_path / "work"
    engine.run(study, ["student"], [0, 1, 2], work, jobs)
    assert [_value(study, "student", seed) for seed in (0, 1, 2)] == [11.0, 12.0, 13.0]
    assert _calls(work) == {"teacher": 1, "student": 1}
    assert _calls(work, 1) == _calls(work, 2) == {"student": 1}
    assert {file.name for file in study.results.iterdir()} == {
        *("teacher-seed0.json", "student-seed0.json", "student-seed1.json", "student-seed2.json")
    }


def test_a_later_seed_finds_the_shared_arm(tmp_path: Path) -> None:
    study, work = _with_teacher(tmp_path / "results"), tmp_path / "work"
    engine.run(study, ["student"], [1], work)
    engine.run(study, ["student"], [0], work)
    assert _calls(work) == {"teacher": 1, "student": 1}
    assert _calls(work, 1) == {"student": 1}


def test_a_shared_arm_needs_shared_ones_alone(tmp_path: Path) -> None:
    own, shared = fake_study.arm("own"), fake_study.arm("all", needs=("own",), is_shared=True)
    with pytest.raises(ValueError, match="arm all: shared, but needs an arm that is not"):
        fake_study.study(tmp_path, own, shared)


def test_arms_side_by_side_wait_for_what_they_need(tmp_path: Path) -> None:
    study, work = fake_study.chain(tmp_path / "results"), tmp_path / "work"
    engine.run(study, ["third"], [0, 1, 2], work, jobs=2)
    assert [_value(study, "third", seed) for seed in (0, 1, 2)] == [111.0, 114.0, 117.0]
    for seed in (0, 1, 2):
        assert _calls(work, seed) == {"first": 1, "second": 1, "third": 1}


def test_a_failure_ends_the_arms_beside_it(tmp_path: Path) -> None:
    study = fake_study.study(
        tmp_path / "results",
        fake_study.arm("slow", f"--wait_for={tmp_path / 'never'}"),
        fake_study.arm("fragile", f"--fail_without={tmp_path / 'never'}"),
    )
    with pytest.raises(UserError, match="what went wrong"):
        engine.run(study, ["slow", "fragile"], [0], tmp_path / "work", jobs=2)
    assert not list((tmp_path / "results").glob("*.json"))


def test_more_jobs_than_cores_are_refused(tmp_path: Path) -> None:
    study = fake_study.chain(tmp_path / "results")
    with pytest.raises(UserError, match="--jobs: must be from 1 to"):
        engine.run(study, ["first"], [0], tmp_path / "work", jobs=10_000)


def test_results_name_commands_without_folders(tmp_path: Path) -> None:
    study = fake_study.chain(tmp_path / "results")
    engine.run(study, ["first"], [3], tmp_path / "work")
    result = result_files.read_result(tmp_path / "results" / "first-seed3.json")
    assert result["arm"] == "first" and result["seed"] == 3
    assert "--out={out}" in result["commands"][0]
    assert str(tmp_path) not in json.dumps(result)
    assert result["digest"] == result_files.digest(study, study.arm("first"))


def test_failure_names_the_log_and_the_study_goes_on_there(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    study = fake_study.study(
        tmp_path / "results",
        fake_study.arm("first"),
        fake_study.arm("fragile", f"--fail_without={flag}", needs=("first",)),
    )
    work = tmp_path / "work"
    log = work / "seed0" / "fragile" / "log.txt"
    with pytest.raises(UserError, match="what went wrong") as error:
        engine.run(study, ["fragile"], [0], work)
    assert str(log) in str(error.value)
    assert not result_files.is_finished(study, study.arm("fragile"), 0)
    flag.touch()
    engine.run(study, ["fragile"], [0], work)
    assert _calls(work) == {"first": 1, "fragile": 2}
    assert result_files.is_finished(study, study.arm("fragile"), 0)


def test_killed_study_stops_its_command_and_runs_only_what_is_left(tmp_path: Path) -> None:
    flag, work = tmp_path / "flag", tmp_path / "work"
    command = [sys.executable, "-m", fake_study.MODULE, "study"]
    command += [str(tmp_path / "results"), str(work), str(flag)]
    process = subprocess.Popen(command, cwd=ROOT)
    deadline = time.time() + 120
    while not (work / "seed0" / "slow" / "calls.txt").exists():
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)
    process.terminate()
    assert process.wait(120) == 128 + signal.SIGTERM
    flag.touch()  # an arm that had been left alone would finish now
    time.sleep(0.2)
    assert not (work / "seed0" / "slow" / "metrics.json").exists()
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == 0
    assert _calls(work) == {"first": 1, "slow": 2}


def test_time_of_killed_attempts_counts(tmp_path: Path) -> None:
    study, work = fake_study.chain(tmp_path / "results"), tmp_path / "work"
    folder = work / "seed0" / "first"
    folder.mkdir(parents=True)
    now = time.time()
    state = {"digest": result_files.digest(study, study.arm("first")), "is_done": False}
    # 500 s of earlier attempts, and one that ran from 1,000 s ago to the last line of its log.
    state |= {"seconds": 500.0, "started": now - 1000}
    (folder / "arm.json").write_text(json.dumps(state))
    (folder / "log.txt").touch()
    engine.run(study, ["first"], [0], work)
    result = result_files.read_result(result_files.result_file(study, study.arm("first"), 0))
    assert 1500 <= result["seconds"] < 2400


def test_lost_folder_is_made_again_for_those_who_need_it(tmp_path: Path) -> None:
    study, work = fake_study.chain(tmp_path / "results"), tmp_path / "work"
    engine.run(study, ["second"], [0], work)
    elsewhere = tmp_path / "elsewhere"
    engine.run(study, ["second"], [0], elsewhere)  # finished: nothing runs
    assert _calls(elsewhere) == {}
    engine.run(study, ["third"], [0], elsewhere)
    assert _calls(elsewhere) == {"first": 1, "second": 1, "third": 1}


def test_results_of_other_weights_than_are_there_now_are_not_current(tmp_path: Path) -> None:
    study, work = fake_study.chain(tmp_path / "results"), tmp_path / "work"
    engine.run(study, ["third"], [0], work)
    file = result_files.result_file(study, study.arm("first"), 0)
    content = json.loads(file.read_text())
    content["metrics"]["images_per_second"] = 7.0  # a speed is no outcome
    file.write_text(json.dumps(content))
    assert result_files.is_finished(study, study.arm("third"), 0)
    content["metrics"]["value"] += 0.5
    file.write_text(json.dumps(content))
    assert [result_files.is_finished(study, arm, 0) for arm in study.arms] == [True, False, False]


def test_a_training_that_was_stopped_is_no_result(tmp_path: Path) -> None:
    engine._require_whole(tmp_path)
    (tmp_path / "config.json").write_text('{"num_steps": 30}')
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 10}\n{"step": 20}\n')
    with pytest.raises(UserError, match="stopped at step 20 of 30"):
        engine._require_whole(tmp_path)
    log.write_text('{"step": 10}\n{"step": 30}\n')
    engine._require_whole(tmp_path)


def test_commits_of_all_attempts_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = fake_study.study(
        tmp_path / "results",
        fake_study.arm("fragile", f"--fail_without={tmp_path / 'now'}"),
    )
    commits = iter("aab")
    monkeypatch.setattr(engine, "_git", lambda *arguments: next(commits, "b"))
    for _ in range(2):
        with pytest.raises(UserError, match="what went wrong"):
            engine.run(study, ["fragile"], [0], tmp_path / "work")
    (tmp_path / "now").touch()
    engine.run(study, ["fragile"], [0], tmp_path / "work")
    result = result_files.read_result(result_files.result_file(study, study.arms[0], 0))
    assert result["commits"] == ["a", "b"] and result["commit"] == "b"


def test_half_made_folder_is_no_start(tmp_path: Path) -> None:
    """The result is there, but the folder is one that a later run only began to make again."""
    study, work = fake_study.chain(tmp_path / "results"), tmp_path / "work"
    engine.run(study, ["second"], [0], work)
    file = work / "seed0" / "second" / "arm.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "is_done": False}))
    engine.run(study, ["third"], [0], work)
    assert _calls(work) == {"first": 1, "second": 2, "third": 1}


def test_folder_of_another_version_is_refused(tmp_path: Path) -> None:
    work = tmp_path / "work"
    engine.run(fake_study.chain(tmp_path / "results"), ["first"], [0], work)
    changed = fake_study.study(tmp_path / "results", fake_study.arm("first", "--value=2"))
    assert not result_files.is_finished(changed, changed.arm("first"), 0)
    with pytest.raises(UserError, match="another version of this arm; remove it"):
        engine.run(changed, ["first"], [0], work)
    (work / "seed0" / "first" / "arm.json").unlink()
    with pytest.raises(UserError, match="another version of this arm; remove it"):
        engine.run(changed, ["first"], [0], work)


def test_digest_changes_with_commands_and_upstream_only(tmp_path: Path) -> None:
    first, second = fake_study.arm("first"), fake_study.arm("second", needs=("first",))
    study = fake_study.study(tmp_path, first, second)
    before = [result_files.digest(study, arm) for arm in study.arms]
    renamed = fake_study.study(tmp_path, dataclasses.replace(first, title="x"), second)
    assert [result_files.digest(renamed, arm) for arm in renamed.arms] == before
    downstream = fake_study.study(
        tmp_path, first, fake_study.arm("second", "--value=1", needs=("first",))
    )
    assert result_files.digest(downstream, first) == before[0]
    assert result_files.digest(downstream, downstream.arm("second")) != before[1]
    upstream = fake_study.study(tmp_path, fake_study.arm("first", "--value=1"), second)
    assert result_files.digest(upstream, second) != before[1]


def test_digest_changes_with_what_the_config_says(tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    study = fake_study.study(tmp_path, fake_study.arm("first", f"--config={config}"))
    text = "import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({})\n"
    digests = []
    default, other = "{'name': 'unnamed'}", "{'num_steps': 1}"
    contents = (text, f"# Remark.\n{text}", text.replace("{}", default), text.replace("{}", other))
    for content in contents:
        config.write_text(content)
        result_files._config_digest.cache_clear()
        digests.append(result_files.digest(study, study.arm("first")))
    assert digests[0] == digests[1] == digests[2] != digests[3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"needs": ("absent",)}, "needs an arm that is not there"),
        ({"commands": (("m", "--x={pretrain}"),)}, "needs an arm that is not there"),
        ({"commands": (("m", "--x={}"),)}, "needs an arm that is not there"),
        ({"name": "out"}, "the name is taken"),
    ],
)
def test_malformed_studies_raise(changes: dict, message: str, tmp_path: Path) -> None:
    arm = dataclasses.replace(fake_study.arm("first"), **changes)
    with pytest.raises(ValueError, match=message):
        fake_study.study(tmp_path, arm)


def test_names_that_are_no_arm_raise(tmp_path: Path) -> None:
    study = fake_study.chain(tmp_path)
    with pytest.raises(UserError, match="no arm 'forth'; there are first, second, third"):
        engine.run(study, ["forth"], [0], tmp_path)
    with pytest.raises(ValueError, match="there is no arm forth"):
        dataclasses.replace(study, curves=("forth",))


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "no JSON"), ("[]", "'arm' is missing"), ('{"arm": 1}', "'arm' is missing")],
)
def test_malformed_results_are_named(content: str, message: str, tmp_path: Path) -> None:
    study = fake_study.chain(tmp_path)
    file = tmp_path / "first-seed0.json"
    file.write_text(content)
    with pytest.raises(UserError, match=f"first-seed0.json: {message}"):
        result_files.is_finished(study, study.arm("first"), 0)
