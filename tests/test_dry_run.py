"""The report before a run: its sums, its warnings, and that it touches nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from owl_det import path_rules, sharding
from owl_det.config import MeshConfig
from owl_det.errors import ConfigError
from owl_det.training import dry_run, flops, step_shapes
from tests import tiny

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
FROZEN = "^text/token_embedding$"


def _config(**changes: object) -> object:
    return tiny.config(mesh=MESH, optimizer__frozen=(FROZEN,), optimizer__kind="adam", **changes)


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text, re.MULTILINE)
    assert found, f"{pattern} is not in\n{text}"
    return float(found[1].replace(",", ""))


def test_the_table_holds_every_parameter_and_adds_up() -> None:
    config = _config()
    mesh = sharding.make_mesh(MeshConfig(**MESH))
    params = step_shapes.state_shapes(config).params
    text = "\n".join(dry_run.parameter_table(params, config, mesh))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, _ in leaves:
        assert path_rules.path_name(path).split("/", 1)[-1] in text
    count = sum(leaf.size for _, leaf in leaves)
    assert _number(r"^all: +([\d,]+) parameters", text) == count
    modules = [_number(rf"^{name}: +([\d,]+) parameters", text) for name in params]
    assert sum(modules) == count
    frozen = params["text"]["token_embedding"].size
    assert _number(r"^group frozen: +([\d,]+) parameters +learning rate 0$", text) == frozen
    text_group = sum(leaf.size for leaf in jax.tree.leaves(params["text"])) - frozen
    assert _number(r"^group text: +([\d,]+) ", text) == text_group
    row = next(line for line in text.splitlines() if "qkv/kernel" in line)
    mib = 2 * 32 * 3 * 2 * 16 * 4 / 2**20 / 4
    wanted = ("2x32x3x2x16", "6,144", "fsdp on 1, tensor on 3", f"{mib:.2f}", "image_and_heads")
    assert re.split(r"  +", row.strip())[1:] == list(wanted)


def test_memory_is_what_a_device_would_hold() -> None:
    """Against arrays that are really there."""
    config = _config()
    mesh = sharding.make_mesh(MeshConfig(**MESH))
    state = step_shapes.state_shapes(config)
    placed = sharding.state_shardings(state, state.params, mesh)
    made = jax.tree.map(
        lambda x, s: jax.device_put(jax.numpy.zeros(x.shape, x.dtype), s), state, placed
    )
    held = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(made)
        for shard in leaf.addressable_shards
        if shard.device == mesh.devices.flat[0]
    )
    text = "\n".join(dry_run.report(config, with_compile=False))
    assert "No data is read here: files and labels are checked when the run starts." in text
    found = sum(_number(rf"^  {name} +([\d.]+) GiB", text) for name in ("parameters", "optimizer"))
    assert found == pytest.approx(held / 2**30, abs=2e-3)
    bytes_found = sum(
        dry_run.device_bytes(leaf, place)
        for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True)
    )
    assert bytes_found == held


def test_flops_are_the_formulas() -> None:
    config = _config(data__max_distinct_queries=12)
    text = "\n".join(dry_run.report(config, with_compile=False))
    # Four data shards with a table of twelve texts each, for eight images.
    assert "8 images, 6 texts an image" in text
    step = flops.flops_per_image(config, 6.0) * 8
    assert _number(r"FLOPs per step: ([\d.]+) MFLOP", text) == pytest.approx(step / 1e6, rel=1e-3)


@pytest.mark.parametrize(
    ("memory_gib", "wanted"),
    [(1e-3, "WARNING: will not fit 0.0 GiB"), (64.0, "fit 64.0 GiB; activations unknown")],
)
def test_the_verdict_depends_on_the_device(memory_gib: float, wanted: str) -> None:
    *_, last = dry_run.report(_config(), memory_gib=memory_gib, with_compile=False)
    assert wanted in last


def test_the_image_tower_has_a_rate_of_its_own() -> None:
    config = _config(optimizer__image_learning_rate=3e-5)
    text = "\n".join(dry_run.report(config, with_compile=False))
    assert re.search(r"^group image: +[\d,]+ parameters +learning rate 3e-05$", text, re.M)


def test_what_does_not_fit_the_devices_is_an_error() -> None:
    config = tiny.config(mesh={"data": 3})
    with pytest.raises(ConfigError, match=r"config\.mesh"):
        list(dry_run.report(config, with_compile=False))
    config = tiny.config(mesh=MESH, batch_size=6)
    with pytest.raises(ConfigError, match=r"config\.batch_size: 6 is no multiple of the 4"):
        list(dry_run.report(config, with_compile=False))


def test_a_step_with_teachers_is_refused() -> None:
    config = _config(distill={"teacher": "towers", "clipself": {"weight": 1.0}})
    with pytest.raises(ConfigError, match=r"config\.distill: .* teachers' checkpoints"):
        list(dry_run.report(config, with_compile=False))


@pytest.mark.nightly
def test_a_compiled_step_adds_activations_and_xlas_count() -> None:
    text = "\n".join(dry_run.report(_config(), memory_gib=64.0))
    share = _number(r"XLA's own count: .* per step, ([\d.]+) of the formula", text)
    assert 1.0 < share < 2.0  # elementwise work counts for more in so small a model
    rows = ("parameters", "optimizer", "batch", "activations and workspace")
    total = _number(r"^  total +([\d.]+) GiB", text)
    assert 0 < sum(_number(rf"^  {row} +([\d.]+) GiB", text) for row in rows) <= total + 4e-3
    assert text.endswith("Fits 64.0 GiB")


def test_command_reads_no_data_and_writes_nothing(repository_root: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    flags = (
        *("--dry_run", "--dry_run_devices=64", "--nodry_run_compile", "--dry_run_memory_gib=16"),
        *("--config.mesh.fsdp=8", "--config.data.path=/nowhere"),
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "owl_det.main"),
            *("--config=configs/owlv2_l14.py", f"--workdir={workdir}", *flags),
        ],
        cwd=repository_root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Devices: 64 x cpu, as data 8 x fsdp 8 x tensor 1" in done.stdout
    assert '"path": "/nowhere"' in done.stdout
    assert _number(r"^all: +([\d,]+) parameters", done.stdout) > 4e8
    assert "fit 16.0 GiB; activations unknown" in done.stdout
    assert not workdir.exists()
