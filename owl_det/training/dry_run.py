"""What a run would be, before it runs: its parameters, their places, its arithmetic and memory.

Reads no data, writes nothing and allocates no array of the model.
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from owl_det import config as config_lib
from owl_det import path_rules, sharding
from owl_det.config import Config
from owl_det.config.resolve import check_attention
from owl_det.training import flops, optim, step_shapes
from owl_det.types import TrainState

GIB = 2**30

# The compiler's plan leaves out what the runtime takes, and gaps between buffers.
_USABLE_SHARE = 0.92


def run(config: Config, *, memory_gib: float = 0.0, with_compile: bool = True) -> None:
    """Prints the report of `report` line by line, as soon as each part is known."""
    for line in report(config, memory_gib=memory_gib, with_compile=with_compile):
        print(line, flush=True)


def report(config: Config, *, memory_gib: float = 0.0, with_compile: bool = True) -> Iterator[str]:
    """Config, parameters, arithmetic and memory per device, over the devices there are.

    `memory_gib` is the memory of a device, in GiB; 0 = as the device says. Without `with_compile`
    XLA's count and the memory of activations are left out. Raises `ConfigError` for a config that
    does not fit the model or the devices.
    """
    mesh = sharding.make_mesh(config.mesh)
    check_attention(config.model, mesh.devices.flat[0].platform)
    if config.distill.active():
        from owl_det.distillation import branches

        branches.check(config)
    state = step_shapes.state_shapes(config)
    yield config_lib.to_json(config)
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    yield "\nNo data is read here: files and labels are checked when the run starts."
    yield f"\nDevices: {mesh.size} x {mesh.devices.flat[0].device_kind}, as {axes}\n"
    yield from parameter_table(state.params, config, mesh)
    yield ""
    yield from _arithmetic(config, mesh, with_compile)
    yield ""
    yield from _memory(config, mesh, state, memory_gib, with_compile)


# --- parameters ----------------------------------------------------------------------------------


def parameter_table(params: Any, config: Config, mesh: Mesh) -> list[str]:
    """Every parameter with shape, size, split and learning-rate group; sums by module and group.

    `params` are arrays or their shapes. Raises `ConfigError` for a rule that fits no parameter, a
    parameter that no rule fits and a split that does not divide.
    """
    placed = jax.tree.leaves(sharding.parameter_shardings(params, mesh))
    groups = jax.tree.leaves(optim.groups(params, config.optimizer))
    rows: list[Sequence[str]] = [("parameter", "shape", "size", "split", "MiB a device", "group")]
    by_module: dict[str, int] = {}
    by_group: dict[str, int] = {}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), place, group in zip(leaves, placed, groups, strict=True):
        name = path_rules.path_name(path)
        module = name.split("/")[0]
        if module not in by_module:
            rows.append((f"{module}:", "", "", "", "", ""))
        by_module[module] = by_module.get(module, 0) + leaf.size
        by_group[group] = by_group.get(group, 0) + leaf.size
        rows.append(
            (
                "  " + name.removeprefix(f"{module}/"),
                "x".join(map(str, leaf.shape)) or "scalar",
                f"{leaf.size:,}",
                _split(place.spec, mesh),
                f"{device_bytes(leaf, place) / 2**20:.2f}",
                group,
            )
        )
    total = sum(by_module.values())
    rates = {
        "image_and_heads": config.optimizer.learning_rate,
        "image": config.optimizer.image_learning_rate,
        "text": config.optimizer.text_learning_rate,
    }
    sums = [*by_module.items(), ("all", total)]
    return [
        *_aligned(rows),
        "",
        *_aligned([(f"{name}:", f"{size:,} parameters") for name, size in sums]),
        "",
        *_aligned(
            [
                (f"group {name}:", f"{size:,} parameters", f"learning rate {rates.get(name, 0):g}")
                for name, size in by_group.items()
            ]
        ),
    ]


def _split(spec: Any, mesh: Mesh) -> str:
    """`fsdp on 1, tensor on 3`; `-` for what lies whole on every device."""
    split = [(axis, i) for i, axis in enumerate(spec) if axis and mesh.shape[axis] > 1]
    return ", ".join(f"{axis} on {i}" for axis, i in split) or "-"


def device_bytes(leaf: Any, place: jax.sharding.NamedSharding) -> int:
    """Bytes that one device holds of an array."""
    return math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _aligned(rows: list[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


# --- arithmetic and memory -----------------------------------------------------------------------


def _arithmetic(config: Config, mesh: Mesh, with_compile: bool) -> Iterator[str]:
    num_data_shards = sharding.num_data_shards(mesh)
    texts = flops.texts_per_image(config, num_data_shards)
    parts = flops.forward_flops(config, texts)
    step = flops.flops_per_image(config, texts) * config.batch_size
    yield (
        f"FLOPs per step: {_scaled(step)} by formula (3 x forward, {config.batch_size} images, "
        f"{texts:.4g} texts an image), {_scaled(step / mesh.size)} per device"
    )
    total = sum(parts.values())
    shares = ", ".join(f"{name} {size / total:.1%}" for name, size in parts.items())
    yield f"  forward, per image: {_scaled(total)} ({shares})"
    if not with_compile:
        yield "  XLA's own count: skipped"
        return
    counted = flops.xla_flops_per_image(config, num_data_shards) * config.batch_size
    yield f"  XLA's own count: {_scaled(counted)} per step, {counted / step:.3f} of the formula"


def _memory(
    config: Config, mesh: Mesh, state: TrainState, memory_gib: float, with_compile: bool
) -> Iterator[str]:
    placed = sharding.state_shardings(state, state.params, mesh)
    num_data_shards = sharding.num_data_shards(mesh)
    batch = step_shapes.batch_shapes(config, num_data_shards)
    rows = [
        ("parameters", _tree_bytes(state.params, placed.params)),
        ("optimizer", _tree_bytes(state.opt_state, placed.opt_state)),
        (
            "batch",
            sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch)) // num_data_shards,
        ),
    ]
    temporaries = _working_copies(config, state.params, placed.params, mesh)
    total = sum(size for _, size in rows + temporaries)
    note = "activations not included"
    if with_compile:
        yield "Compiling the step: minutes for a large model, --nodry_run_compile leaves it out"
        started = time.perf_counter()
        plan = step_shapes.memory_bytes(step_shapes.lower(config, mesh).compile())
        yield f"  compiled in {time.perf_counter() - started:.0f} s"
        total = plan["total"]
        others = plan["temporaries"] - sum(size for _, size in temporaries)
        temporaries.append(("activations and workspace", max(others, 0)))
        note = f"activations by the compiler's plan for {mesh.devices.flat[0].platform}"
    yield f"Memory per device, {note}:"
    sizes = [(name, f"{size / GIB:.3f} GiB") for name, size in [*rows, *temporaries]]
    yield from ("  " + line for line in _aligned([*sizes, ("total", f"{total / GIB:.3f} GiB")]))
    yield _verdict(total, memory_gib or _device_gib(mesh), with_compile)


def _working_copies(config: Config, params: Any, placed: Any, mesh: Mesh) -> list[tuple[str, int]]:
    """Bytes of what a step holds of each parameter beside its own part.

    Parameters are gathered over fsdp, and gradients are summed over the shards at the end of a
    step: both are split over tensor alone. Clipping per example holds the sum and a microbatch.
    """
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(placed), strict=True)
    fsdp = mesh.shape["fsdp"]
    whole = sum(
        device_bytes(leaf, place) * (fsdp if "fsdp" in place.spec else 1) for leaf, place in pairs
    )
    clip = config.optimizer.clip
    per_example = clip.scope in ("shared_text", "exact")
    copies = [("gradients", whole * (1 + clip.microbatch if per_example else 1))]
    return [("gathered parameters", whole), *copies] if fsdp > 1 else copies


def _tree_bytes(tree: Any, placed: Any) -> int:
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True)
    return sum(device_bytes(leaf, place) for leaf, place in pairs)


def _device_gib(mesh: Mesh) -> float:
    """What the device says it has; 0 = it does not say."""
    stats = mesh.devices.flat[0].memory_stats() or {}
    return stats.get("bytes_limit", 0) / GIB


def _verdict(total: float, memory_gib: float, with_compile: bool) -> str:
    if not memory_gib:
        return "The device does not say how much it has: compare, or give --dry_run_memory_gib"
    if total > _USABLE_SHARE * memory_gib * GIB:
        return (
            f"WARNING: will not fit {memory_gib:.1f} GiB: shard over more devices "
            "(config.mesh.fsdp, config.mesh.tensor), lower config.batch_size or "
            "config.optimizer.clip.microbatch, or set config.model.remat=full"
        )
    if not with_compile:
        return f"Parameters, optimizer and gradients fit {memory_gib:.1f} GiB; activations unknown"
    return f"Fits {memory_gib:.1f} GiB"


def _scaled(value: float) -> str:
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}FLOP"
    return f"{value / 1e6:.4g} MFLOP"
