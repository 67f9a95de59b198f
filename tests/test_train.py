"""Training as a user runs it: in processes of its own, which are killed, resumed and misused."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from owl_det.errors import ConfigError
from owl_det.training import loop, start_checks
from tests import tiny
from tests.training_command import command, environment


def _run(
    root: Path, workdir: Path, *flags: str, num_devices: int = 1
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(workdir, *flags),
        cwd=root,
        env=environment(num_devices),
        capture_output=True,
        text=True,
        timeout=300,
    )


def _losses(workdir: Path) -> dict[int, float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def _params(workdir: Path) -> list[np.ndarray]:
    import jax

    from owl_det.checkpoints.load import load_model

    return [np.asarray(leaf) for leaf in jax.tree.leaves(load_model(workdir).params)]


@pytest.fixture(scope="module")
def undisturbed(
    repository_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    workdir = tmp_path_factory.mktemp("undisturbed")
    done = _run(
        repository_root,
        workdir,
        "--config.num_steps=12",
        "--config.log.every_steps=1",
        "--config.checkpoint.every_steps=3",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir, done


def test_workdir_holds_what_it_promises(
    undisturbed: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    workdir, _ = undisturbed
    summary = json.loads((workdir / "eval" / "summary.json").read_text())
    groups = ("base", "novel", "novel_combination", "novel_word")
    assert summary["step"] == 12
    for key in ("AP", "AP50", "AP75", *(f"AP50_{g}" for g in groups if f"AP_{g}" in summary)):
        assert 0 <= summary[key] <= 1
    assert summary["dataset"].startswith("shapes_world-1-")
    results = json.loads((workdir / "eval" / "results_shapes.json").read_text())
    assert set(results[0]) == {"image_id", "category_id", "bbox", "score"}
    pictures = {path.name for path in (workdir / "pictures").glob("*.png")}
    assert {
        "shapes_0000012.png",
        "precision_recall_shapes.png",
        "confusion_matrix_shapes.png",
        "training_curve.png",
    } <= pictures
    assert json.loads((workdir / "config.json").read_text())["name"] == "quickstart"
    assert list(workdir.glob("events.out.tfevents.*"))
    assert (workdir / "checkpoints" / "12").is_dir()
    assert sorted(_losses(workdir)) == list(range(1, 13))


@pytest.mark.slow
def test_killed_runs_end_bit_identical(
    repository_root: Path,
    tmp_path: Path,
    undisturbed: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    flags = (
        "--config.num_steps=12",
        "--config.log.every_steps=1",
        "--config.checkpoint.every_steps=3",
    )
    rng = random.Random(0)
    for kill_after in (rng.randint(3, 5), rng.randint(7, 10)):
        process = subprocess.Popen(
            command(tmp_path, *flags),
            cwd=repository_root,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.time() + 240
        while time.time() < deadline and process.poll() is None:
            path = tmp_path / "metrics.jsonl"
            if path.exists() and f'"step": {kill_after}' in path.read_text():
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    # What a kill during a save leaves behind must not be taken for a checkpoint.
    (tmp_path / "checkpoints" / "11.orbax-checkpoint-tmp").mkdir(parents=True)
    done = _run(repository_root, tmp_path, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Resumed at step" in done.stderr
    workdir, _ = undisturbed
    for ours, theirs in zip(_params(tmp_path), _params(workdir), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert _losses(tmp_path) == _losses(workdir)


@pytest.mark.slow
def test_nan_stops_with_the_step(repository_root: Path, tmp_path: Path) -> None:
    done = _run(
        repository_root,
        tmp_path,
        "--config.num_steps=30",
        "--config.optimizer.learning_rate=1e30",
        "--config.optimizer.clip.scope=none",
        "--config.checkpoint.every_steps=5",
    )
    assert done.returncode == 2
    assert "loss or gradient is not finite at step" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "checkpoints").glob("30"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.modle.image_size=64"], "modle"),
        pytest.param(["--config.batch_size=many"], "batch_size", marks=pytest.mark.nightly),
        pytest.param(
            ["--config.data.augment.crop_min_area=2.0"], "crop_min_area", marks=pytest.mark.nightly
        ),
        pytest.param(
            ["--config.checkpoint.init_from=nowhere"], "nowhere", marks=pytest.mark.nightly
        ),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(
    repository_root: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    done = _run(repository_root, tmp_path, *flags)
    assert done.returncode == 2, done.stderr[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("owl_det:") and message in last
    assert "Traceback" not in done.stderr


def test_missing_data_path_is_an_error(repository_root: Path, tmp_path: Path) -> None:
    arguments = command(tmp_path, "--config.data.path=no/such/folder", config="configs/bccd.py")
    done = subprocess.run(
        arguments,
        cwd=repository_root,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "no/such/folder" in done.stderr.strip().splitlines()[-1]


def _voc(root: Path, num_images: int) -> None:
    """A Pascal VOC folder with the lists that configs/bccd.py reads."""
    from PIL import Image

    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for i in range(num_images):
        Image.new("RGB", (40, 30), (i, 0, 0)).save(root / "JPEGImages" / f"{i}.jpg")
        (root / "Annotations" / f"{i}.xml").write_text(
            f"<annotation><filename>{i}.jpg</filename><object><name>RBC</name><bndbox><xmin>2</xmin>"
            "<ymin>2</ymin><xmax>20</xmax><ymax>20</ymax></bndbox></object></annotation>"
        )
    names = "".join(f"{i}\n" for i in range(num_images))
    for split in ("trainval", "test"):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(names)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["malformed XML", "empty data set", "unreadable images"])
def test_bad_data_is_one_line_and_exit_code_2(
    repository_root: Path, tmp_path: Path, damage: str
) -> None:
    root = tmp_path / "voc"
    _voc(root, 40)
    if damage == "malformed XML":
        (root / "Annotations" / "3.xml").write_text("<annotation><object>")
        expected = "3.xml"
    elif damage == "empty data set":
        (root / "ImageSets" / "Main" / "trainval.txt").write_text("")
        expected = "trainval.txt"
    else:
        for i in range(10):
            (root / "JPEGImages" / f"{i}.jpg").write_bytes(b"\xff\xd8 no image")
        expected = "of 40 images cannot be read"
    arguments = [
        *(sys.executable, "-m", "owl_det.main", "--config=configs/bccd.py"),
        *(f"--workdir={tmp_path / 'w'}", f"--config.data.path={root}", "--config.num_steps=40"),
    ]
    done = subprocess.run(
        arguments,
        cwd=repository_root,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("owl_det:") and expected in last, last


@pytest.mark.nightly
def test_another_architecture_names_the_first_mismatch(
    repository_root: Path,
    tmp_path: Path,
    undisturbed: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    workdir, _ = undisturbed
    done = _run(
        repository_root,
        tmp_path,
        f"--config.checkpoint.init_from={workdir}",
        "--config.model.image.mlp_width=128",
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "another architecture" in last and "mlp_in" in last


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(
    repository_root: Path,
    tmp_path: Path,
    undisturbed: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    workdir, _ = undisturbed
    arguments = command(
        tmp_path,
        "--config.num_steps=12",
        "--config.log.every_steps=1",
        "--config.checkpoint.every_steps=100",
    )
    launch = [sys.executable, "launch/local.py", "--num_processes", "2", "--", *arguments]
    done = subprocess.run(
        launch,
        cwd=repository_root,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    ours, theirs = _losses(tmp_path), _losses(workdir)
    assert sorted(ours) == sorted(theirs)
    np.testing.assert_allclose(
        [ours[step] for step in sorted(ours)], [theirs[step] for step in sorted(theirs)], rtol=2e-3
    )


@pytest.mark.slow
def test_trains_without_tensorflow_and_clu(repository_root: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import sys\n"
        "for name in ('tensorflow', 'clu', 'tensorflow_datasets'):\n"
        "    sys.modules[name] = None  # importing it raises, finding it says there is none\n"
    )
    workdir = tmp_path / "workdir"
    without = {**environment(), "PYTHONPATH": str(hidden)}
    done = subprocess.run(
        command(workdir, "--config.num_steps=20"),
        cwd=repository_root,
        env=without,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((workdir / "eval" / "summary.json").read_text())["step"] == 20
    assert (workdir / "metrics.jsonl").exists()
    assert not list(workdir.glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": {"data": 4, "fsdp": 2}, "batch_size": 12}, "config.batch_size: 12"),
        (
            {"batch_size": 32, "optimizer__clip": {"scope": "exact", "microbatch": 3}},
            "clip.microbatch: 3",
        ),
        ({"optimizer__frozen": ("^txet/",)}, "txet"),
    ],
)
def test_what_devices_and_parameters_tell_is_checked_before_data_is_read(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(config: Any) -> Any:
        raise AssertionError("data was read first")

    monkeypatch.setattr(loop, "TrainInput", opened)
    with pytest.raises(ConfigError, match=message):
        loop.run(tiny.config(**changes), str(tmp_path))


def test_an_evaluation_that_was_due_and_is_not_logged_is_made_up_for(tmp_path: Path) -> None:
    sets = {"shapes": {"kind": "shapes_world", "split": "test"}}
    config = tiny.config(num_steps=20, evaluation__every_steps=5, data__eval=sets)
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 5, "eval/shapes/AP": 0.1}\n{"step": 10, "train/loss": 1.0}\n')
    lacks = {step: start_checks.lacks_evaluation(config, tmp_path, step) for step in (5, 7, 10, 20)}
    assert lacks == {5: False, 7: False, 10: True, 20: True}
    log.write_text('{"step": 20, "eval/shapes/AP": 0.1}\n')
    assert start_checks.lacks_evaluation(config, tmp_path, 20), "its summary is not written"
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "summary.json").write_text("{}")
    assert not start_checks.lacks_evaluation(config, tmp_path, 20)
    log.write_text('{"step": 20, "eval/shapes/AP": 0.')  # cut short by a full disk
    assert start_checks.lacks_evaluation(config, tmp_path, 20)
    assert not start_checks.lacks_evaluation(tiny.config(num_steps=20), tmp_path, 20), (
        "there is no set"
    )
