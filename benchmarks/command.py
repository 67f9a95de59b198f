"""What the benchmarks' commands share: options, output, errors, and what they ran on."""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from owl_det import optional
from owl_det.cli import options as cli_options
from owl_det.errors import UserError

# The last line of a traceback, or what a benchmark says of a user's error.
_ERROR = re.compile(
    r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)\b.*|benchmarks\.\w+: .*|\S+: error: .*"
)
# What JAX writes below an error.
_NOTICE = re.compile(r"-+|For simplicity, JAX has removed its internal frames.*|")


class _Help(cli_options.HelpWithDefaults, argparse.RawDescriptionHelpFormatter):
    """Names defaults, and leaves the module's docstring laid out as it is."""


class _Parser(cli_options.Parser):
    """Flags may be spelt with - or _."""

    def parse_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        given = sys.argv[1:] if args is None else args
        return super().parse_args(cli_options.with_underscores(given), namespace)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that prints `description`, a module's docstring, as it is laid out."""
    return _Parser(description=description, formatter_class=_Help)


def add_out(options: argparse.ArgumentParser) -> None:
    """The option `--out`, for `report`."""
    options.add_argument("--out", type=Path, help="JSON file to write as well")


def report(name: str, measure: Callable[[], Any], out: Path | None) -> int:
    """Prints what `measure` returns as JSON and writes it to `out`. Returns as `exit_code` does."""
    return exit_code(name, lambda: write(measure(), out))


def write(found: Any, out: Path | None) -> None:
    """Prints JSON, and writes it to `out` unless that is None."""
    text = json.dumps(found, indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n")


def exit_code(name: str, call: Callable[[], int | None]) -> int:
    """What `call` returns, None being 0; 2, with one line on stderr, if it raises `UserError`."""
    try:
        return call() or 0
    except UserError as error:
        print(f"benchmarks.{name}: {error}", file=sys.stderr)
        return 2


def require(extra: str, *packages: str) -> None:
    """Raises `UserError` saying how to install `extra`, if one of its packages is missing."""
    for package in packages:
        if not optional.is_installed(package):
            raise UserError(
                f"needs {package}, which is not installed: {optional.installation(extra)}"
            )


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """Why a process failed, in one line: its last error, without what JAX writes below it."""
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        hint = " (too little memory?)" if name == "SIGKILL" else ""
        return f"ended by {name}{hint}"
    lines = [line.strip() for line in (done.stderr or "").splitlines()]
    lines = [line for line in lines if not _NOTICE.fullmatch(line)]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines or [f"exit code {done.returncode}"])[-1][:300]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, least and most."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {
        "median": float(median),
        "quartile_1": float(low),
        "quartile_3": float(high),
        "min": min(values),
        "max": max(values),
    }


def machine() -> dict[str, Any]:
    """What the numbers were measured on, JAX's first device included."""
    # The peers of benchmarks.inference and the input do without it.
    import jax

    device = jax.devices()[0]
    return {
        "device_kind": device.device_kind,
        "platform": device.platform,
        "cpu": platform.processor() or platform.machine(),
        **processor(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def processor() -> dict[str, Any]:
    """The processor as Linux names it, and how many of its cores this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu_model": names[0] if names else "unknown",
        "cpu_count": len(os.sched_getaffinity(0)),
    }
