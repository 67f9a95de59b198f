"""`python -m owl_det.main` with a model so small that start-up is most of a run."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "--config.batch_size=8",
    "--config.model.image.width=32",
    "--config.model.image.num_layers=2",
    "--config.model.image.num_heads=2",
    "--config.model.image.mlp_width=64",
    "--config.model.text.width=16",
    "--config.model.text.mlp_width=32",
    "--config.data.train.shapes.num_images=64",
    "--config.data.eval.shapes.num_images=8",
    "--config.schedule.warmup_steps=2",
)


def command(workdir: Path, *flags: str, config: str = "configs/quickstart.py") -> list[str]:
    """Of the quickstart's config with `TINY`, or of another config without."""
    small = TINY if config == "configs/quickstart.py" else ()
    place = (f"--config={config}", f"--workdir={workdir}")
    return [sys.executable, "-m", "owl_det.main", *place, *small, *flags]


def environment(num_devices: int = 1) -> dict[str, str]:
    devices = f"--xla_force_host_platform_device_count={num_devices}"
    fast_compile = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    kept = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    return {**kept, "XLA_FLAGS": f"{devices} {fast_compile}"}


def run(
    workdir: Path, *flags: str, config: str = "configs/quickstart.py"
) -> subprocess.CompletedProcess[str]:
    """Runs to the end, both streams as text."""
    return subprocess.run(
        command(workdir, *flags, config=config),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )


def start(workdir: Path, *flags: str) -> subprocess.Popen[str]:
    """Starts a run; what it says is in `<workdir>.log`."""
    with Path(f"{workdir}.log").open("a") as log:
        return subprocess.Popen(
            command(workdir, *flags), cwd=ROOT, env=environment(), stdout=log, stderr=log, text=True
        )


def said(workdir: Path) -> str:
    """What the runs that were started with this workdir have said so far."""
    return Path(f"{workdir}.log").read_text()


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Returns when `what` is true. Fails when the process ends before."""
    deadline = time.time() + 400
    while not what():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.time() < deadline
        time.sleep(0.05)


def steps_logged(workdir: Path) -> list[int]:
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def steps_saved(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())
