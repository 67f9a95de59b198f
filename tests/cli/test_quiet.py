"""What commands write on stderr, in real processes: their own lines and no other library's."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

# `owl-det: …`, and a line of progress: `evaluate shapes: 4 of 8, 3.2 images/s, 00:01 left`.
OURS = re.compile(r"(owl-det: |([\w -]+: )?\d+ of \d+, [\d.e+-]+ \w+/s, [\d:?]+ left)")
# The variables that tests set would hide what a user sees.
SET_BY_TESTS = ("TF_CPP_MIN_LOG_LEVEL", "XLA_FLAGS", "JAX_PLATFORMS", "PYTHONWARNINGS")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny detector's checkpoint, and four images beside it."""
    folder = tmp_path_factory.mktemp("quiet")
    tiny.save(folder / "model")
    _run("sample", "--out", folder / "images")
    return folder


def _run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    environment = {k: v for k, v in os.environ.items() if k not in SET_BY_TESTS}
    command = [sys.executable, "-m", "owl_det.cli", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        "predict IN/images --checkpoint IN/model --query red --query blue --out OUT/drawn",
        "embed IN/images --checkpoint IN/model --out OUT/embedded",
        "evaluate --checkpoint IN/model --dataset shapes_world --max_images 8 --out OUT/m.json",
        "annotate --checkpoint IN/model --labels ngrams "
        "--input shapes_world:crowded:8 --output OUT/records",
        "convert IN/model OUT/hf --from owl_det --to hf",
        "export IN/model OUT/exported",
        "visualize features IN/images --checkpoint IN/model --query red --out OUT/features",
        "ensemble --self_trained IN/model --fine_tuned IN/model --weight 0.5 --out OUT/average",
        "models",
    ],
    ids=lambda text: text.split()[0],
)
def test_commands_show_their_own_lines_alone(arguments: str, saved: Path, tmp_path: Path) -> None:
    places = {"IN": str(saved), "OUT": str(tmp_path)}
    done = _run(*(re.sub("IN|OUT", lambda m: places[m[0]], word) for word in arguments.split()))
    foreign = [line for line in done.stderr.splitlines() if not OURS.match(line)]
    assert foreign == []
    assert "\r" not in done.stderr and "\x1b" not in done.stderr
