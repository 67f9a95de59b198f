"""What share of an accelerator the training step uses; prints JSON.

    python -m benchmarks.accelerator --models b16 l14 --attention cudnn         # one GPU
    python -m benchmarks.accelerator --models tiny --dtype float32 --matrix_side 1024 \
        --allow_cpu

First the rate of plain matrix products on this device, then `benchmarks.train_step` in a process of
its own for every model and every setting: all patches, half of them dropped, and dropped with
gradients clipped per example. `--batch_sizes` are tried from the largest: the first that fits in
memory is kept, and what did not fit is said. Without an accelerator it refuses at once, unless
`--allow_cpu` is given. The exit code is 1 if a setting ran at none of the batch sizes.

MFU = FLOPs of the step (`owl_det.training.flops`) / seconds of the step / rate of matrix
products. Of the dropped step the formula counts what is left.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import command
from benchmarks.train_step import MODELS
from owl_det.errors import ConfigError, ExitCode
from owl_det.optional import installation

# Name, variant of `benchmarks.train_step`, scope of clipping.
SETTINGS = (
    ("dense", "dense", "global"),
    ("dropped", "dropped", "global"),
    ("dropped_per_example", "dropped", "shared_text"),
)
MATRIX_REPEATS = 20


def matrix_rate(side: int, dtype: str) -> float:
    """FLOPs a second of side x side matrix products of `dtype`, the median over repeats."""
    # Of unit variance after each product, so that none overflows.
    factor = jax.random.normal(jax.random.key(0), (side, side), jnp.float32) / side**0.5
    a = factor.astype(dtype)
    product = jax.jit(lambda x: x @ a)
    x = jax.block_until_ready(product(a))
    seconds = []
    for _ in range(MATRIX_REPEATS):
        started = time.perf_counter()
        x = jax.block_until_ready(product(x))
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / statistics.median(seconds)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The rate, and every model's settings.

    Raises `ConfigError` for a model that is not there, and without an accelerator.
    """
    unknown = sorted(set(arguments.models) - set(MODELS))
    if unknown:
        raise ConfigError(f"--models: {unknown[0]} unknown; known: {', '.join(sorted(MODELS))}")
    if min(arguments.batch_sizes) < 1:
        raise ConfigError(f"--batch_sizes: must be positive, got {min(arguments.batch_sizes)}")
    device = _device(arguments.matrix_side, arguments.dtype, arguments.allow_cpu)
    rate = device["matrix_flops_per_second"]
    return {
        "machine": device["machine"],
        "dtype": arguments.dtype,
        "attention": arguments.attention,
        "matrix_side": arguments.matrix_side,
        "matrix_flops_per_second": rate,
        "models": {name: measure(name, rate, arguments) for name in arguments.models},
    }


def measure(model: str, rate: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of one model, and how many more images the dropped step takes than the dense."""
    found = {
        name: largest_that_fits(model, variant, scope, rate, arguments)
        for name, variant, scope in SETTINGS
    }
    speeds = {name: one.get("images_per_second") for name, one in found.items()}
    if speeds["dense"] and speeds["dropped"]:
        found["dropped_over_dense"] = speeds["dropped"] / speeds["dense"]
    if speeds["dropped"] and speeds["dropped_per_example"]:
        found["per_example_over_global_seconds"] = speeds["dropped"] / speeds["dropped_per_example"]
    return found


def _device(side: int, dtype: str, allow_cpu: bool) -> dict[str, Any]:
    """`matrix_rate` and the machine, from a process that gives the device's memory back.

    Raises `ConfigError` where JAX finds a CPU alone, unless that is allowed.
    """
    if side < 1:
        raise ConfigError(f"--matrix_side: must be positive, got {side}")
    program = f"""
import json
from benchmarks import accelerator, command
machine = command.machine()
is_wanted = {allow_cpu} or machine["platform"] != "cpu"
rate = accelerator.matrix_rate({side}, {dtype!r}) if is_wanted else None
print(json.dumps({{"machine": machine, "matrix_flops_per_second": rate}}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"the device cannot be used: {command.reason(done)}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found["matrix_flops_per_second"] is None:
        raise ConfigError(
            "JAX finds no accelerator here, only a CPU; install JAX's build for yours "
            f"({installation('cuda')}), or add --allow_cpu to measure the CPU"
        )
    return found


def largest_that_fits(
    model: str, variant: str, scope: str, rate: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The step at the largest batch size that runs; what larger ones failed with."""
    failed: dict[str, str] = {}
    for batch_size in sorted(arguments.batch_sizes, reverse=True):
        print(f"{model}, {variant}, clipped {scope}, batch {batch_size}", file=sys.stderr)
        step, error = _step(model, variant, scope, batch_size, arguments)
        if step is None:
            failed[str(batch_size)] = error
            continue
        return {
            "batch_size": batch_size,
            "failed": failed,
            "mfu": step["flops_per_second"] / rate,
            **step,
        }
    return {"failed": failed}


def _step(
    model: str, variant: str, scope: str, batch_size: int, arguments: argparse.Namespace
) -> tuple[dict[str, Any] | None, str]:
    """What `benchmarks.train_step` finds; None and its last error if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "step.json"
        flags = [f"--model={model}", f"--variants={variant}", f"--clip_scope={scope}"]
        flags += [f"--batch_size={batch_size}", f"--steps={arguments.steps}", f"--out={out}"]
        flags += [f"--dtype={arguments.dtype}", f"--attention={arguments.attention}"]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.train_step", *flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        if done.returncode == 0:
            return json.loads(out.read_text())["variants"][variant], ""
    return None, command.reason(done)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the measurements.

    Returns 1 if a setting ran at no batch size; 2, with one line on stderr, if nothing can be
    measured.
    """
    parser = command.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["b16", "l14"], help="of train_step")
    sizes = [128, 64, 32, 16, 8]
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=sizes, help="images a step")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of matrix work"
    )
    parser.add_argument(
        "--attention", choices=("xla", "cudnn"), default="xla", help="cudnn: NVIDIA only"
    )
    parser.add_argument("--matrix_side", type=int, default=8192, help="of the plain products")
    parser.add_argument("--allow_cpu", action="store_true", help="measure also without accelerator")
    command.add_out(parser)
    arguments = parser.parse_args(argv)
    return command.exit_code("accelerator", lambda: _report(arguments))


def _report(arguments: argparse.Namespace) -> int:
    """Writes what `run` finds; 1 if a setting has no number."""
    found = run(arguments)
    command.write(found, arguments.out)
    lost = [
        f"{model} {name}"
        for model, settings in found["models"].items()
        for name, _, _ in SETTINGS
        if "batch_size" not in settings[name]
    ]
    if lost:
        print(f"benchmarks.accelerator: ran at no batch size: {', '.join(lost)}", file=sys.stderr)
    return ExitCode.LOSSES if lost else ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
