"""Counts what one training step sends between devices, from the compiled program; runs nothing.

    python -m benchmarks.collectives --config owlv2_b16 --mesh 2,2,2
    python -m benchmarks.collectives --config owlv2_l14 --mesh 64,4,1 --topology v5e:16x16

The step is compiled from shapes alone: for as many CPU devices as the mesh (data, fsdp, tensor)
has, or, with --topology, by the TPU compiler for that slice, which needs the package libtpu and no
TPU. Every collective of the program is counted as often as its loops run. Bytes are those that one
device sends if the collective runs as a ring of g devices over S bytes: all-reduce 2 (g - 1)/g S,
all-gather, reduce-scatter and all-to-all (g - 1)/g S, collective-permute S. Exit code 1: more than
`--tolerance` times the analytic minimum crosses the data and fsdp axes.
"""

import argparse
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks import command
from benchmarks.hlo_collectives import KINDS, Collective, Traffic, collectives, traffic
from data_pipelines import batch_spec
from owl_det import sharding
from owl_det.config import Config, config_file
from owl_det.config.resolve import resolve
from owl_det.errors import ConfigError
from owl_det.modeling.token_drop import num_kept
from owl_det.training import step_shapes

_WITHIN_A_SHARD = ("tensor", "none")


# --- what must be sent ---------------------------------------------------------------------------


def minimum(config: Config, mesh: Mesh) -> Traffic:
    """What a step must send at least, by the same count as `traffic`.

    A parameter of S bytes on a device (after its split over tensor) that is split over fsdp: an
    all-gather of S and a reduce-scatter of its gradient over fsdp, and an all-reduce of S/F over
    data. One that is not: an all-reduce of S over both. Over tensor: per layer and direction, two
    all-reduces of the residual stream of the images and texts of a data shard (arXiv 1909.08053).
    """
    d, f, t = (mesh.shape[axis] for axis in sharding.AXES)
    params = step_shapes.state_shapes(config).params
    placed = sharding.parameter_shardings(params, mesh)
    sent: dict[tuple[str, str], float] = defaultdict(float)
    for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(placed), strict=True):
        size = leaf.size * leaf.dtype.itemsize / (t if "tensor" in place.spec else 1)
        if "fsdp" in place.spec:
            sent["fsdp", "all-gather"] += (f - 1) / f * size
            sent["fsdp", "reduce-scatter"] += (f - 1) / f * size
            sent["data", "all-reduce"] += 2 * (d - 1) / d * size / f
        else:
            axes = "+".join(axis for axis in sharding.BATCH_AXES if mesh.shape[axis] > 1)
            sent[axes, "all-reduce"] += 2 * (d * f - 1) / (d * f) * size
    sent["tensor", "all-reduce"] = 2 * (t - 1) / t * _residual_bytes(config, d * f)
    total: Traffic = defaultdict(dict)
    for (axes, kind), size in sent.items():
        if size:
            total[axes][kind] = size
    return dict(total)


def _residual_bytes(config: Config, num_shards: int) -> float:
    """Bytes of a data shard's residual streams, added up over layers, four times each."""
    model = config.model
    patches = (model.grid_side) ** 2
    tokens = num_kept(patches, config.selection.token_drop_rate) + 1
    images = config.batch_size / num_shards
    texts = batch_spec.num_table_rows(config, num_shards) / num_shards
    image = images * tokens * model.image.width * model.vit.num_layers
    text = texts * model.text.num_positions * model.text.width * model.text.num_layers
    return 4 * (image + text) * jnp.dtype(model.dtype).itemsize


def over_data_axes(sent: Traffic) -> float:
    """Bytes along data, fsdp or both, whatever the kind."""
    return sum(
        sum(kinds.values()) for axes, kinds in sent.items() if axes not in ("tensor", "none")
    )


# --- measuring -----------------------------------------------------------------------------------

# Only the program's structure is of interest: the CPU's code need not be fast.
_FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def measure(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Compiles the step over `mesh` and accounts for its collectives and memory."""
    platform = mesh.devices.flat[0].platform
    started = time.perf_counter()
    lowered = step_shapes.lower(config, mesh)
    compiled = lowered.compile(_FAST_COMPILE if platform == "cpu" else {})
    seconds = time.perf_counter() - started
    found = collectives(compiled.as_text() or "", dict(mesh.shape))
    sent, needed = traffic(found), minimum(config, mesh)
    across = [one for one in found if one.axes not in _WITHIN_A_SHARD]
    largest = sorted(found, key=lambda one: one.wire_bytes * one.runs, reverse=True)[:8]
    return {
        "mesh": dict(mesh.shape),
        "compiled_for": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "images_per_device": config.batch_size / sharding.num_data_shards(mesh),
        "compile_seconds": seconds,
        "sent_bytes": sent,
        "minimum_bytes": needed,
        "over_data_axes": over_data_axes(sent),
        "over_data_axes_minimum": over_data_axes(needed),
        "over_data_axes_in_loops": sum(o.wire_bytes * o.runs for o in across if o.is_in_loop),
        "in_endless_loops": [_brief(one) for one in found if one.is_in_endless_loop],
        "largest": [_brief(one) for one in largest],
        "memory_bytes": step_shapes.memory_bytes(compiled),
    }


def _brief(one: Collective) -> dict[str, Any]:
    return {
        "kind": one.kind,
        "axes": one.axes,
        "shape": one.shape[:80],
        "runs": one.runs,
        "sent_bytes": one.wire_bytes * one.runs,
        "source": one.source[-120:],
    }


def check(found: dict[str, Any], tolerance: float) -> list[str]:
    """What is wrong with a measurement, a line each; empty = nothing."""
    wrong = []
    sent, needed = found["over_data_axes"], found["over_data_axes_minimum"]
    if sent > tolerance * needed:
        wrong.append(f"{sent:.4g} bytes over data and fsdp, {needed:.4g} needed")
    if found["over_data_axes_in_loops"]:
        wrong.append(f"{found['over_data_axes_in_loops']:.4g} bytes over data and fsdp in loops")
    for one in found["in_endless_loops"]:
        wrong.append(f"{one['kind']} over {one['axes']} in every round of a loop: {one['source']}")
    return wrong


def table(found: dict[str, Any]) -> str:
    """Bytes by axes and kind beside what is needed, as Markdown."""
    lines = ["| axes | kind | sent, MB | needed, MB |", "|---|---|---|---|"]
    sent, needed = found["sent_bytes"], found["minimum_bytes"]
    for axes in sorted(set(sent) | set(needed)):
        for kind in KINDS:
            have, need = (side.get(axes, {}).get(kind, 0.0) for side in (sent, needed))
            if have or need:
                lines.append(f"| {axes} | {kind} | {have / 1e6:.2f} | {need / 1e6:.2f} |")
    return "\n".join(lines)


def devices_of(topology: str, count: int) -> list[Any]:
    """`count` CPU devices, or those of a TPU slice such as `v5e:8x8` (none of them is there)."""
    if not topology:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
        return jax.devices()
    from jax.experimental import topologies

    # The library shall not look for the machine that a slice would have.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    jax.config.update("jax_platforms", "cpu")
    slice_ = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return list(slice_.devices)


# --- command -------------------------------------------------------------------------------------


def mesh_sizes(text: str) -> list[int]:
    """`8,4,2` as sizes of data, fsdp and tensor. Raises `ConfigError` for anything else."""
    sizes = text.split(",")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
        raise ConfigError(f"--mesh: three sizes data,fsdp,tensor, got {text}")
    return [int(size) for size in sizes]


def load_config(
    name: str, sizes: Sequence[int], batch_size: int | None, max_distinct_queries: int | None
) -> Config:
    """A config over a mesh; None keeps the file's own value. Raises `ConfigError`."""
    tree = config_file.load(name)
    tree["mesh"] = dict(zip(sharding.AXES, sizes, strict=True))
    if batch_size is not None:
        tree["batch_size"] = batch_size
    if max_distinct_queries is not None:
        tree["data"]["max_distinct_queries"] = max_distinct_queries
    return resolve(tree)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    sizes = mesh_sizes(arguments.mesh)
    config = load_config(
        arguments.config, sizes, arguments.batch_size, arguments.max_distinct_queries
    )
    mesh = sharding.make_mesh(config.mesh, devices_of(arguments.topology, math.prod(sizes)))
    return {
        "config": arguments.config,
        "batch_size": config.batch_size,
        "max_distinct_queries": config.data.max_distinct_queries,
        "jax": jax.__version__,
        **measure(config, mesh),
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument("--config", default="owlv2_b16", help="a file, or a shipped config's name")
    parser.add_argument("--mesh", default="2,2,2", help="data,fsdp,tensor")
    parser.add_argument("--topology", default="", help="TPU slice, as v5e:8x8; empty = CPU devices")
    parser.add_argument("--batch_size", type=int, help="images a step; default: the config's")
    parser.add_argument("--max_distinct_queries", type=int, help="texts of a data shard")
    parser.add_argument("--tolerance", type=float, default=1.1, help="of data and fsdp traffic")
    command.add_out(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints JSON and a table. Returns 1 for needless traffic, 2 for arguments of no use."""
    arguments = _parse(argv)
    return command.exit_code("collectives", lambda: _report(arguments))


def _report(arguments: argparse.Namespace) -> int:
    found = run(arguments)
    command.write(found, arguments.out)
    print(table(found))
    wrong = check(found, arguments.tolerance)
    for line in wrong:
        print(f"benchmarks.collectives: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
