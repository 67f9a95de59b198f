"""Runs the examples of docs/predict.md, and holds what it asks for against the sample images."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.shapes_world import ShapesWorld
from owl_det import boxes, cli
from owl_det.checkpoints.load import save_model
from owl_det.checkpoints.step_folders import has_checkpoint
from owl_det.types import LoadedModel
from tests import tiny

PAGE = Path("docs/predict.md")
# Every page that asks the four images of `owl-det sample` for something.
ASKING = (PAGE, Path("README.md"), Path("docs/export.md"), Path("notebooks/inference.ipynb"))


def _blocks(page: str) -> list[str]:
    """Python blocks, and single commands, in order."""
    pattern = re.compile(r"^```python\n(.*?)^```$|^    (owl-det [^\n]*)$", re.MULTILINE | re.DOTALL)
    return [match.group(1) or match.group(2) for match in pattern.finditer(page)]


def _run(blocks: list[str]) -> dict[str, Any]:
    """The variables that the Python blocks leave; commands must end with 0."""
    scope: dict[str, Any] = {}
    for block in blocks:
        if block.startswith("owl-det"):
            assert cli.main(shlex.split(block)[1:]) == 0, block
        else:
            exec(compile(block, str(PAGE), "exec"), scope)
    return scope


@pytest.fixture(scope="module")
def world() -> ShapesWorld:
    return ShapesWorld(split="test", image_size=64, num_images=4)


def _names(world: ShapesWorld, index: int) -> list[str]:
    return [name for group in world[index].names for name in group]


@pytest.mark.parametrize("page", ASKING, ids=str)
def test_what_is_asked_for_is_in_the_samples(
    page: Path, world: ShapesWorld, repository_root: Path
) -> None:
    text = (repository_root / page).read_text()
    words = "red|green|blue|yellow|purple|cyan|pink|brown"
    shapes = "circle|ring|square|triangle|cross|star|heart|arrow"
    pattern = rf"[\"\\\']((?:striped |dotted )?(?:{words}) (?:{shapes}))[\"\\\']"
    asked = set(re.findall(pattern, text))
    shown = {name for index in range(len(world)) for name in _names(world, index)}
    assert asked and asked <= shown, asked - shown


def test_boxes_of_image_queries_hold_what_the_page_says(
    world: ShapesWorld, repository_root: Path
) -> None:
    text = (repository_root / PAGE).read_text()
    assert "shapes_0000.png:19,6,41,29" in text
    assert "boxes=[(19, 6, 41, 29), (8, 1, 34, 27)]" in text
    for index, box, name in (
        (0, (19, 6, 41, 29), "cyan ring"),
        (1, (8, 1, 34, 27), "striped blue square"),
    ):
        row = _names(world, index).index(name)
        true = np.asarray(world[index].boxes_xyxy[row], np.float32)
        overlap, _ = boxes.pairwise_iou(jnp.asarray([box], jnp.float32), jnp.asarray(true)[None])
        assert float(np.asarray(overlap)[0, 0]) > 0.95, name


@pytest.mark.nightly
def test_examples_run(
    repository_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny.config()
    model = LoadedModel(
        params=tiny.params(config, seed=1),
        config=config.model,
        preprocess=config.preprocess,
        eval_prompts="none",
        step=5,
    )
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "RUN", model)
    blocks = _blocks((repository_root / PAGE).read_text())
    assert sum(block.startswith("owl-det") for block in blocks) == 5 and len(blocks) == 11
    scope = _run(blocks)
    assert len(scope["found"]) == 2 and len(scope["proposals"][0]) > 0
    assert (tmp_path / "collection").is_dir() and '"detections"' in capsys.readouterr().out


@pytest.mark.nightly
def test_what_the_page_asks_for_is_found(
    repository_root: Path,
    world: ShapesWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the quickstart's model, where there is one."""
    run = repository_root / "runs/quickstart"
    if not has_checkpoint(run):
        pytest.skip("runs/quickstart holds no checkpoint: ./quickstart.sh makes it")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").symlink_to(run)
    scope = _run(_blocks((repository_root / PAGE).read_text()))
    names = [[_names(world, index)] for index in range(4)]
    assert [here.names for here in scope["found"]] == [("cyan ring",), ("striped blue square",)]
    assert [here.names for here in scope["alike"]] == [("like this ring",), ("like this square",)]
    for here, (shown,) in zip(scope["both"], names, strict=True):
        assert {"green triangle", "yellow circle"} & {*here.names} <= {*shown}
    assert "green triangle" in scope["both"][0].names and "yellow circle" in scope["both"][3].names
    assert [len(here) for here in scope["coarse"]] == [1, 0]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    for line in lines:
        found = json.loads(line)
        index = int(Path(found["image"]).stem[-1])
        for detection in found["detections"]:
            of_text = detection["query"] in ("cyan ring", "striped blue square")
            assert not of_text or detection["query"] in names[index][0]
    assert len(lines) == 12  # of predict, predict by image, and search
