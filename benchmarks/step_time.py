"""A model of the time of a training step on many devices; computes, measures nothing.

    python -m benchmarks.step_time --config owlv2_l14 --hardware h200 --mesh 8,8,1

compute = FLOPs of the formula (training.flops) / (devices x peak x MFU); traffic = what one device
must send over each mesh axis (benchmarks.collectives, whose count of compiled programs agrees) /
the bandwidth of that axis. The step takes at least the larger of the two, if all traffic hides
behind arithmetic, and at most their sum. Input, evaluation and checkpoints are left out.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence

from benchmarks import collectives, command
from owl_det import sharding
from owl_det.config import Config, MeshConfig
from owl_det.errors import ConfigError
from owl_det.training import flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """What the model assumes of a device; the sources are in docs/scaling.md."""

    peak_flops: float  # a second, bfloat16, dense
    near_bandwidth: float  # bytes a second that a device sends to neighbours of its group
    far_bandwidth: float  # to all others
    group_size: int  # devices that reach each other at the near bandwidth


HARDWARE = {
    # Eight GPUs share NVLink (450 GB/s each way); one 400 Gb/s network card a GPU.
    "h200": Hardware(
        peak_flops=989e12,
        near_bandwidth=450e9,
        far_bandwidth=50e9,
        group_size=8,
    ),
    # 2-D torus: a ring along one side of it sends over two of the four links, 50 GB/s each.
    "v5e": Hardware(
        peak_flops=197e12,
        near_bandwidth=100e9,
        far_bandwidth=100e9,
        group_size=256,
    ),
}


def step_seconds(
    config: Config, hardware: Hardware, sizes: Sequence[int], mfu: float
) -> dict[str, float]:
    """Seconds of a step over a mesh of `sizes` (data, fsdp, tensor).

    The last axes of a mesh lie closest together. Raises `ConfigError` for a mesh that the config
    does not fit.
    """
    count = math.prod(sizes)
    devices = collectives.devices_of("", count)
    mesh = sharding.make_mesh(
        MeshConfig(**dict(zip(sharding.AXES, sizes, strict=True))), devices[:count]
    )
    texts = flops.texts_per_image(config, sharding.num_data_shards(mesh))
    needed = flops.flops_per_image(config, texts) * config.batch_size
    compute = needed / (count * hardware.peak_flops * mfu)
    traffic = {}
    for axes, kinds in collectives.minimum(config, mesh).items():
        outermost = axes.split("+")[0]
        span = math.prod(list(sizes)[sharding.AXES.index(outermost) :])
        is_near = span <= hardware.group_size
        bandwidth = hardware.near_bandwidth if is_near else hardware.far_bandwidth
        traffic[axes] = sum(kinds.values()) / bandwidth
    total = sum(traffic.values())
    return {
        "compute": compute,
        **{f"traffic_{axes}": seconds for axes, seconds in traffic.items()},
        "at_least": max(compute, total),
        "at_most": compute + total,
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument("--config", default="owlv2_l14", help="a file of configs/, without .py")
    parser.add_argument(
        "--hardware", choices=sorted(HARDWARE), default="h200", help="of one device"
    )
    parser.add_argument("--mesh", default="8,8,1", help="data,fsdp,tensor")
    parser.add_argument("--mfu", type=float, default=0.35, help="share of the peak, assumed")
    parser.add_argument("--batch_size", type=int, help="images a step; default: the config's")
    parser.add_argument("--max_distinct_queries", type=int, help="texts of a data shard")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one row of a Markdown table. Returns 2, with one line, for arguments of no use."""
    arguments = _parse(argv)
    return command.exit_code("step_time", lambda: _print_row(arguments))


def _print_row(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.mfu <= 1:
        raise ConfigError(f"--mfu: in (0, 1], got {arguments.mfu}")
    sizes = collectives.mesh_sizes(arguments.mesh)
    config = collectives.load_config(
        arguments.config, sizes, arguments.batch_size, arguments.max_distinct_queries
    )
    found = step_seconds(config, HARDWARE[arguments.hardware], sizes, arguments.mfu)
    cells = [arguments.config, arguments.hardware, arguments.mesh, f"{arguments.mfu:g}"]
    print("| config | hardware | mesh | MFU | " + " | ".join(f"{key}, ms" for key in found) + " |")
    print("|---" * (len(cells) + len(found)) + "|")
    print(f"| {' | '.join([*cells, *(f'{seconds * 1e3:.1f}' for seconds in found.values())])} |")


if __name__ == "__main__":
    sys.exit(main())
