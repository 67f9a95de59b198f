"""Whole runs of the job in processes of their own: killed, and under Apache Beam."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from owl_det import cli
from tests import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    return tiny.save(folder, model__class_prior=0.3, model__class_initial_scale=4.0)


def _arguments(saved: Path, output: Path, num_images: int, num_shards: int) -> list[str]:
    return [
        *("annotate", "--checkpoint", str(saved), "--output", str(output)),
        *("--input", f"shapes_world:train:{num_images}:32", "--shards", str(num_shards)),
        *("--vocabulary", "shapes_world", "--max_ngrams", "60"),
    ]


def _contents(folder: Path) -> dict[str, bytes]:
    kinds = ("boxes", "images", "quarantine", "shard")
    return {p.name: p.read_bytes() for kind in kinds for p in folder.glob(f"{kind}-*")}


@pytest.mark.nightly
def test_killed_three_times_gives_the_same_bytes(
    saved: Path, tmp_path: Path, repository_root: Path
) -> None:
    """SIGKILL in the middle of a shard, three times; 2,000 images in ten shards."""
    environment = {**os.environ, "PYTHONPATH": str(repository_root)}

    def start(folder: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "owl_det.cli", *_arguments(saved, folder, 2000, 10)]
        return subprocess.Popen(command, env=environment)

    assert start(tmp_path / "whole").wait() == 0
    folder = tmp_path / "killed"
    for wanted in (1, 4, 8):
        process = start(folder)
        while len(list(folder.glob("shard-*"))) < wanted or not _is_writing(folder):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        complete = len(list(folder.glob("shard-*")))
        assert wanted <= complete < 10
        print(f"killed with {complete} of 10 shards complete and one being written")
    assert start(folder).wait() == 0
    whole, killed = _contents(tmp_path / "whole"), _contents(folder)
    assert len(whole) == 40
    assert whole == killed
    assert not list(folder.glob(".*.partial"))


def _is_writing(folder: Path) -> bool:
    """True if the last shard begun holds some images already."""
    try:
        return any(path.stat().st_size > 10_000 for path in folder.glob(".images-*.partial"))
    except FileNotFoundError:
        return False


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_beam_gives_the_same_records(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("apache_beam", reason="needs the extra beam")
    assert cli.main(_arguments(saved, tmp_path / "direct", 60, 4)) == 0
    beam = ["--runner", "beam", "--beam_option=--runner=DirectRunner"]
    beam += ["--beam_option=--direct_num_workers=2"]
    beam += ["--beam_option=--direct_running_mode=multi_processing"]
    assert cli.main([*_arguments(saved, tmp_path / "beam", 60, 4), *beam]) == 0
    direct = _contents(tmp_path / "direct")
    assert len(direct) == 16
    assert direct == _contents(tmp_path / "beam")
