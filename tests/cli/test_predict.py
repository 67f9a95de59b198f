"""`owl-det predict`, `embed` and `search`: what they refuse, and what they say at their end."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from owl_det import cli
from owl_det.inference import embedding_files
from owl_det.inference.predictor import Predictor
from owl_det.viz import pictures
from tests import tiny

NAMES = ("red circle", "blue star")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that keeps names."""
    return tiny.save(tmp_path_factory.mktemp("model") / "checkpoint", names=NAMES)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A tall and a wide picture."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for name, shape in (("a.png", (60, 20, 3)), ("b.png", (20, 60, 3))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test: what is refused is refused before."""

    def load(path: str) -> None:
        raise AssertionError(f"loaded {path}")

    monkeypatch.setattr(Predictor, "load", load)


def test_without_a_query_the_names_of_the_checkpoint_are_asked(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--checkpoint", str(run), "--threshold", "0"]
    assert cli.main(["predict", str(images), *flags]) == 0
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    found = [detection for line in lines for detection in line["detections"]]
    assert {(d["query"], d["label"]) for d in found} == set(zip(NAMES, (0, 1), strict=True))
    assert all(x1 > x0 and y1 > y0 for x0, y0, x1, y1 in (d["box"] for d in found))
    assert f"owl-det: 2 images, {len(found)} detections" in printed.err
    assert cli.main(["predict", str(images), *flags, "--query", "cat"]) == 0
    assert {
        d["query"] for d in json.loads(capsys.readouterr().out.splitlines()[0])["detections"]
    } == {"cat"}
    emb = str(tmp_path / "emb")
    assert cli.main(["embed", str(images), "--checkpoint", str(run), "--out", emb]) == 0
    assert f"owl-det: wrote {emb}: 2 images, " in capsys.readouterr().err
    assert cli.main(["search", emb, *flags]) == 0
    searched = capsys.readouterr()
    assert [json.loads(line)["image"] for line in searched.out.splitlines()] == [
        line["image"] for line in lines
    ]
    assert f"owl-det: 2 images, {len(found)} detections" in searched.err


def test_boxes_of_other_queries_count_with_the_flag(
    run: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = []
    for flags in ([], ["--nms_iou", "0.1"], ["--nms_iou", "0.1", "--nms-across-queries"]):
        command = ["predict", str(images / "a.png"), "--checkpoint", str(run), "--threshold", "0"]
        assert cli.main([*command, *flags]) == 0
        counts.append(len(json.loads(capsys.readouterr().out)["detections"]))
    assert counts[0] > counts[1] > counts[2] > 0


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threshold", "1.5"], "--threshold: 1.5 is not a number in [0, 1]"),
        (["--threshold", "nan"], "--threshold: nan is not a number"),
        (["--threshold", "0,5"], "--threshold: '0,5' is not a number"),
        (["--top_k", "0"], "--top_k: must be a whole number, positive; got 0"),
        (["--top_k", "3.5"], "--top_k: must be a whole number, positive; got '3.5'"),
        (["--nms_iou", "50"], "--nms_iou: 50.0 is not"),
        (["--image_size", "-8"], "--image_size: must be a whole number"),
        (["--query", " "], "queries: 1: ' ' is an empty text"),
        (["--query_image", "nope.png"], "--query_image: nope.png: no such file"),
        (["--query_image", "."], "--query_image: .: is a folder"),
        (["--query_image", "https://x.org/a.png"], "is an address"),
        (["--out", "images/a.png"], "images/a.png is a file; name a folder"),
        (["--out", "images/a.png/b"], "images/a.png is a file; name a folder"),
    ],
)
def test_options_are_checked_before_the_model_is_loaded(
    flags: list[str],
    message: str,
    images: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(images.parent)
    command = ["predict", "images", "--checkpoint", "RUN", "--query", "cat", *flags]
    assert cli.main(command) == 2
    printed = capsys.readouterr()
    assert message in printed.err and len(printed.err.splitlines()) == 1 and not printed.out


@pytest.mark.usefixtures("no_model")
def test_an_image_that_is_spelt_otherwise_is_named(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for spelt in (f"{images}/A.PNG", f"{images}\\a.png"):
        assert cli.main(["predict", spelt, "--checkpoint", "RUN", "--query", "x"]) == 2
        assert f"did you mean '{images}/a.png'?" in capsys.readouterr().err


def test_boxes_of_query_images_are_in_pixels(
    run: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for box, message in (
        ("0.1,0.2,0.5,0.6", "boxes are in pixels, and no fractions"),
        ("15,15,4,4", "ends before it begins"),
        ("100,0,110,9", "has no area inside the image of 20 x 60 pixels"),
    ):
        shown = f"{images}/a.png:{box}"
        command = ["predict", str(images), "--checkpoint", str(run), "--query_image", shown]
        assert cli.main(command) == 2
        error = capsys.readouterr().err
        assert message in error and f"{images}/a.png" in error


def test_a_checkpoint_without_names_needs_a_query(
    images: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["predict", str(images), "--checkpoint", str(tiny_checkpoint)]) == 2
    assert "at least one --query or --query_image" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_is_named(
    run: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(path: Path, picture: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures, "save_png", full)
    out = tmp_path / "out"
    assert cli.main(["predict", str(images), "--checkpoint", str(run), "--out", str(out)]) == 2
    assert f"{out}/a.png: cannot be written (No space left" in capsys.readouterr().err


def test_an_interrupted_embed_leaves_nothing(
    run: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(embedding_files.Writer, "add", interrupted)
    out = tmp_path / "emb"
    assert cli.main(["embed", str(images), "--checkpoint", str(run), "--out", str(out)]) == 130
    assert "owl-det: interrupted" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_ctrl_c_ends_a_command_without_a_traceback(run: Path, images: Path, tmp_path: Path) -> None:
    """A process of its own, once it has printed its first line."""
    many = [str(images / "a.png")] * 2000
    command = [sys.executable, "-m", "owl_det.cli", "predict", *many, "--checkpoint", str(run)]
    errors = tmp_path / "errors.txt"
    with errors.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        assert process.stdout
        lines = [process.stdout.readline()]
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        lines += process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 130
    assert errors.read_text().splitlines()[-1] == "owl-det: interrupted"
    assert "Traceback" not in errors.read_text()
    assert 1 <= len(lines) < 2000
    assert all(json.loads(line)["image"] for line in lines)


def test_help_names_defaults_and_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["predict", "--help"])
    shown = capsys.readouterr().out
    assert "(default: 0.1)" in shown and "(default: 300)" in shown
    assert '\n  owl-det predict photos --checkpoint RUN --query "red circle"' in shown
