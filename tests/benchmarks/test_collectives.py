"""The count of collectives, and the guard that no activations cross the data axes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import collectives, hlo_collectives
from owl_det import sharding
from owl_det.config import MeshConfig
from owl_det.training import step_shapes
from tests import tiny

MESH = {"data": 2, "fsdp": 2, "tensor": 2}

# A loop of twelve rounds around one of unknown length, as XLA prints a program.
PROGRAM = """
HloModule jit_step, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%endless (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %stop = pred[] all-reduce(%x), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

%never (p: (s32[], f32[4])) -> pred[] {
  ROOT %flag = pred[] constant(true)
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %part = bf16[8,4]{1,0} all-reduce(%x), replica_groups=[4,2]<=[8], metadata={op_name="layer"}
  %inner = (s32[], f32[4]) while(%y), condition=%never, body=%endless
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %whole = f32[8,4]{1,0} all-gather(%p), replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}
  %two = (f32[4,4], f32[8,4]) all-gather-start(%p), replica_groups=[4,2]<=[2,2,2]T(0,2,1)
  %own = f32[4,4]{1,0} reduce-scatter(%q), replica_groups=mesh['a'=2,'b'=4] {'a'}, to_apply=%add
  %moved = f32[3]{0} collective-permute(%r), source_target_pairs={{0,0},{1,2},{2,1}}
  %loop = (s32[]) while(%z), condition=%never, body=%body, backend_config={ROUNDS}
}
""".replace("{ROUNDS}", '{"known_trip_count":{"n":"12"}}')


def test_a_program_is_read_as_it_runs() -> None:
    found = {one.shape: one for one in hlo_collectives.collectives(PROGRAM, MESH)}
    assert len(found) == 6
    gathered = found["f32[8,4]"]
    assert (gathered.kind, gathered.axes, gathered.runs) == ("all-gather", "fsdp", 1)
    assert gathered.wire_bytes == 8 * 4 * 4 / 2
    assert found["(f32[4,4], f32[8,4])"].wire_bytes == 8 * 4 * 4 / 2  # its result alone
    assert found["(f32[4,4], f32[8,4])"].axes == "fsdp"
    assert (found["f32[4,4]"].axes, found["f32[4,4]"].wire_bytes) == ("data", 4 * 4 * 4)
    assert found["f32[3]"].axes == "fsdp+tensor"
    layer = found["bf16[8,4]"]
    assert (layer.axes, layer.runs, layer.source) == ("tensor", 12, "layer")
    assert layer.wire_bytes == 2 * 8 * 4 / 2 * 2
    assert layer.is_in_loop and not layer.is_in_endless_loop
    stop = found["pred[]"]
    assert (stop.axes, stop.runs) == ("data+fsdp+tensor", 12)
    assert stop.is_in_endless_loop
    sent = hlo_collectives.traffic(list(found.values()))
    assert sent["tensor"] == {"all-reduce": 12 * 64.0}


# One all-gather, as the TPU compiler prints it when it is sent beside the rounds of a loop.
CHAIN = """
HloModule jit_step, num_partitions=8

%start (p: bf16[4,4]) -> (bf16[8,4], u32[]) {
  %a = bf16[8,4] all-gather(%p), replica_groups={{0,2},{1,3},{4,6},{5,7}}, attributes={chain_id="0"}
  ROOT %b = (bf16[8,4], u32[]) custom-call(%a), custom_call_target="AsyncCollectiveStart"
}

%part (p: bf16[4,4]) -> bf16[8,4] {
  ROOT %a = bf16[8,4] all-gather(%p), replica_groups={{0,2},{1,3},{4,6}}, attributes={chain_id="0"}
}

%round (p: (s32[], bf16[4,4])) -> (s32[], bf16[4,4]) {
  %c = bf16[8,4] fusion(%x), calls=%part
}

ENTRY %main (p: bf16[4,4]) -> bf16[8,4] {
  %s = (bf16[8,4], u32[]) fusion(%p), calls=%start
  %loop = (s32[], bf16[4,4]) while(%z), condition=%never, body=%round
  ROOT %d = bf16[8,4] fusion(%loop), calls=%part
}

%never (p: (s32[], bf16[4,4])) -> pred[] {
  ROOT %flag = pred[] constant(true)
}
"""


def test_what_is_sent_in_parts_counts_once() -> None:
    (found,) = hlo_collectives.collectives(CHAIN, MESH)
    assert (found.kind, found.axes, found.runs) == ("all-gather", "fsdp", 1)
    assert found.wire_bytes == 8 * 4 * 2 / 2 and not found.is_in_loop


def test_groups_of_an_unknown_form_raise() -> None:
    with pytest.raises(ValueError, match="unknown form"):
        hlo_collectives.collectives(PROGRAM.replace("[4,2]<=[8]", "everyone"), MESH)


def test_minimum_by_hand() -> None:
    """Two devices over data: every parameter once around a ring. Two over fsdp: there and back."""
    config = tiny.config()
    params = step_shapes.state_shapes(config).params
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
    devices = jax.devices()[:2]
    data = sharding.make_mesh(MeshConfig(data=2), devices)
    assert collectives.minimum(config, data) == {"data": {"all-reduce": pytest.approx(size)}}
    fsdp = sharding.make_mesh(MeshConfig(data=1, fsdp=2), devices)
    found = collectives.minimum(config, fsdp)["fsdp"]
    assert found["all-gather"] == found["reduce-scatter"]
    assert 2 * found["all-gather"] + found["all-reduce"] == pytest.approx(size)
    assert found["all-reduce"] < 0.2 * size


# Many tokens and a small vocabulary: activations are larger than the parameters.
STEP = """
import json, sys
import jax
from benchmarks import collectives
from owl_det import sharding
from owl_det.config import MeshConfig
from tests import tiny

config = tiny.config(
    batch_size=16,
    model__image_size=64,
    model__image__patch_size=4,
    model__text__vocabulary_size=64,
    model__image__num_layers=1,
    model__text__num_layers=1,
    selection={"token_drop_rate": 0.5, "instance_top_k": 16},
    optimizer__clip={"scope": sys.argv[1], "microbatch": 2},
    data__max_queries=40,
)
mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
if sys.argv[2] == "broken":
    sharding.on_data_shards = lambda fn, params, shared, rows, mesh: fn(params, shared, rows)
found = collectives.measure(config, mesh)
print(json.dumps({"wrong": collectives.check(found, 1.1), **found}))
"""


def _measure(scope: str, state: str, root: Path) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", STEP, scope, state],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["shared_text", "global"])
def test_no_activations_cross_the_data_axes(scope: str, repository_root: Path) -> None:
    found = _measure(scope, "shipped", repository_root)
    assert found["wrong"] == []
    assert found["over_data_axes_in_loops"] == 0
    assert found["over_data_axes"] >= found["over_data_axes_minimum"] > 0
    assert "all-gather" in found["sent_bytes"]["fsdp"]


@pytest.mark.nightly
def test_the_guard_notices_a_step_that_the_compiler_places(repository_root: Path) -> None:
    """Without `on_data_shards` the compiler splits activations over fsdp, and sends them around."""
    found = _measure("shared_text", "broken", repository_root)
    assert found["over_data_axes"] > 2 * found["over_data_axes_minimum"]
    assert any("in loops" in line for line in found["wrong"])


def test_bad_arguments_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        (["--mesh", "2,2"], "--mesh"),
        (["--config", "absent"], "--config: absent: no such file"),
    ):
        assert collectives.main(flags) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
