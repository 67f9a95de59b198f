"""Checkpoints whose files were cut, emptied, removed or changed."""

import dataclasses
import gc
import json
import logging as std_logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from owl_det.checkpoints.load import load_model
from owl_det.checkpoints.store import Checkpoints
from owl_det.errors import CheckpointError
from owl_det.training import train_step
from owl_det.types import TrainState
from tests import tiny

CONFIG = tiny.config(optimizer__kind="adam")
# After an error Orbax leaves reads behind that nobody waits for.
pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("collected"),
]


@pytest.fixture
def collected() -> Iterator[None]:
    """Those reads are thrown away while the filters hold."""
    yield
    gc.collect()


def _state(step: int) -> TrainState:
    """With moments that are not zero: of those Orbax writes no files."""

    def make() -> TrainState:
        state, key = train_step.init_state(CONFIG), jax.random.key(step)
        moments = jax.tree.map(
            lambda x: x + jax.random.normal(key, x.shape).astype(x.dtype), state.opt_state
        )
        return dataclasses.replace(
            state, step=jax.numpy.asarray(step, state.step.dtype), opt_state=moments
        )

    return jax.jit(make)()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with checkpoints of the steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir, CONFIG)
    checkpoints.begin()
    for step in (1, 2):
        checkpoints.save(_state(step), "data")
    checkpoints.wait()
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(saved: Path, tmp_path: Path) -> Iterator[Path]:
    yield shutil.copytree(saved, tmp_path / "run")


def _largest(folder: Path) -> Path:
    files = (path for path in folder.rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def _cut(step: Path, item: str) -> None:
    file = _largest(step / item / "ocdbt.process_0")
    os.truncate(file, file.stat().st_size // 2)


def _empty(step: Path, item: str) -> None:
    os.truncate(_largest(step / item / "ocdbt.process_0"), 0)


def _remove(step: Path, item: str) -> None:
    _largest(step / item / "ocdbt.process_0").unlink()


def _remove_all(step: Path, item: str) -> None:
    shutil.rmtree(step / item)


def _no_metadata(step: Path, item: str) -> None:
    (step / item / "_METADATA").write_text("{")


def _flip(step: Path, item: str) -> None:
    """One bit in every kilobyte."""
    file = _largest(step / item / "ocdbt.process_0")
    content = bytearray(file.read_bytes())
    for place in range(100, len(content), 1024):
        content[place] ^= 16
    file.write_bytes(content)


def _no_run_file(step: Path, item: str) -> None:
    del item
    (step / "run" / "metadata").write_text("")


def _restore(workdir: Path) -> TrainState:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: train_step.init_state(CONFIG))
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes
    )
    return Checkpoints(workdir, CONFIG).restore(template, "data")


def test_what_was_saved_is_read_and_nothing_is_logged(
    workdir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(std_logging.WARNING)
    assert int(_restore(workdir).step) == 2
    loaded = load_model(workdir)
    wanted = _state(2).params
    for ours, theirs in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert caplog.records == []


DAMAGES = [_cut, _empty, _remove, _remove_all, _no_metadata, _flip, _no_run_file]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("item", ["params", "optimizer"])
def test_a_damaged_latest_names_the_one_that_is_whole(
    damage: Callable[[Path, str], None], item: str, workdir: Path
) -> None:
    folder = workdir / "checkpoints" / "2"
    damage(folder, item)
    with pytest.raises(CheckpointError) as error:
        _restore(workdir)
    text = str(error.value)
    assert f"checkpoints/1 is whole: remove or rename {folder} to go on from it" in text
    folder.rename(workdir / "checkpoints" / "2.damaged")
    assert int(_restore(workdir).step) == 1


def test_where_all_are_damaged_a_new_workdir_is_the_remedy(workdir: Path) -> None:
    for step in ("1", "2"):
        _cut(workdir / "checkpoints" / step, "params")
    with pytest.raises(CheckpointError, match="no other is whole: a new workdir starts anew"):
        _restore(workdir)


@pytest.mark.parametrize("damage", [_cut, _remove_all, _no_run_file])
def test_loading_a_workdir_names_the_other_checkpoints(
    damage: Callable[[Path, str], None], workdir: Path
) -> None:
    folder = workdir / "checkpoints"
    damage(folder / "2", "params")
    with pytest.raises(CheckpointError, match=f"an earlier checkpoint of it is {folder / '1'}$"):
        load_model(workdir)
    assert load_model(folder / "1").step == 1


def test_a_changed_optimizer_is_named_and_no_damage(workdir: Path) -> None:
    tree = json.loads(json.dumps(dataclasses.asdict(CONFIG)))
    (workdir / "config.json").write_text(json.dumps(tree))
    other = tiny.config(optimizer__kind="sgd")
    shapes = jax.eval_shape(lambda: train_step.init_state(other))
    with pytest.raises(CheckpointError, match="optimizer.kind is 'adam' there and 'sgd'") as error:
        Checkpoints(workdir, other).restore(shapes, "data")
    assert "is whole" not in str(error.value)


def test_a_hub_name_points_to_convert() -> None:
    with pytest.raises(CheckpointError, match="`owl-det convert .* --from hf` makes") as error:
        load_model("google/owlv2-base-patch16")
    assert "google/owlv2-base-patch16" in str(error.value)
