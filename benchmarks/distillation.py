"""Times training steps with distillation branches, teachers online and cached; prints JSON.

    python -m benchmarks.distillation
    python -m benchmarks.distillation --variants=gridclip_image,clipself --batch_size=8

The detector, the data and the branches are those of configs/distill_shapes.py, one branch at a time
and all together; the teacher is as large as the student's towers. Batches lie on the device from
the start. `regions_<n>` is what GridCLIP (arXiv 2303.09252) compares its image alignment with:
alignment of regions with a pass of the teacher for each of n proposals, as ViLD (arXiv 2104.13921)
needs it. Its cost does not depend on how many of the proposals are real.

Variants take turns, a step each, so that whatever else the machine does falls on all of them;
ratios to the plain step are medians over the rounds, those under "gridclip" of median times.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import command
from data_pipelines.input import TrainInput
from owl_det import sharding
from owl_det.checkpoints.load import save_model
from owl_det.config import Config, MeshConfig, config_file
from owl_det.distillation import cache_teacher, teachers
from owl_det.distillation.cache_request import cache_request
from owl_det.errors import ConfigError
from owl_det.modeling import build
from owl_det.training import train_step
from owl_det.types import LoadedModel, batch_of

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "distill_shapes.py"
BRANCHES = (
    *("gridclip_grid", "gridclip_image", "clipself", "densevlm"),
    *("hierkd_instance", "hierkd_global"),
)
PROPOSALS = (20, 100)
VARIANTS = ("plain", *BRANCHES, "all", *(f"regions_{n}" for n in PROPOSALS))


def make_config(variant: str, teacher: str, batch_size: int, cache: str = "") -> Config:
    """The config of a variant. Raises `ConfigError` for one that is not there."""
    if variant not in VARIANTS:
        raise ConfigError(f"--variants: no {variant!r}; known: {', '.join(VARIANTS)}")
    changes = [
        f"batch_size={batch_size}",
        f"data.train.shapes.num_images={batch_size}",
        *("checkpoint.init_from=", "checkpoint.model_from_init=False"),
        "checkpoint.class_head_from_projection=False",
        *(f"distill.{key}={value}" for key, value in (("teacher", teacher), ("cache", cache))),
    ]
    active = {"plain": (), "all": BRANCHES}.get(variant, (variant,))
    if variant.startswith("regions_"):
        active = ("clipself",)
        num_regions = variant.removeprefix("regions_")
        changes += [
            "distill.regions.kind=proposals",
            f"distill.regions.max_regions={num_regions}",
        ]
    changes += [f"distill.{name}.weight=0.0" for name in BRANCHES if name not in active]
    return _read(changes)


def _read(changes: list[str]) -> Config:
    return config_file.read(str(CONFIG), [f"--config.{change}" for change in changes])


def save_teacher(folder: Path) -> str:
    """Fresh towers of the student's size, as a checkpoint."""
    towers = ["task=contrastive", "model.contrastive=softmax", "loss.negative_share=1.0"]
    off = [f"distill.{name}.weight=0.0" for name in BRANCHES]
    start = ["checkpoint.init_from=", "checkpoint.model_from_init=False"]
    start += ["checkpoint.class_head_from_projection=False", "selection.token_drop_rate=0.0"]
    config = _read([*towers, *off, *start])
    loaded = LoadedModel(
        kind="towers",
        params=build.init_params(config, jax.random.key(0)),
        config=config.model,
        preprocess=config.preprocess,
        eval_prompts="none",
        step=0,
    )
    save_model(folder, loaded)
    return str(folder)


def prepare(config: Config) -> Callable[[], float]:
    """Compiles a step and runs it once; each call runs it again and gives the seconds."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    teaching = teachers.open_teachers(config, mesh)
    state = train_step.init_state(config, teacher_dim=teaching.teacher_dim if teaching else 0)
    state = jax.device_put(state, sharding.state_shardings(state, state.params, mesh))
    step = train_step.jit_train_step(config, mesh, state, teaching)
    batches = TrainInput(config, cache_request(config)).batches(0, num_data_shards=1)
    batch = jax.device_put(batch_of(next(batches)), sharding.batch_sharding(mesh))
    batches.close()

    def run() -> float:
        nonlocal state
        started = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, batch))
        seconds = time.perf_counter() - started
        if not np.isfinite(metrics["loss"]):
            raise ConfigError(f"the loss is {metrics['loss']}: a step that diverges says nothing")
        return seconds

    run()
    return run


def measure(variants: Sequence[str], batch_size: int, steps: int) -> dict[str, Any]:
    """Seconds a step of each variant and mode, and its ratio to the plain detector's step."""
    if steps < 1 or batch_size < 1:
        raise ConfigError("--steps, --batch_size: must be at least 1")
    with tempfile.TemporaryDirectory() as scratch:
        teacher, cache = save_teacher(Path(scratch) / "teacher"), str(Path(scratch) / "cache")
        configs = {"plain": make_config("plain", teacher, batch_size)}
        for variant in variants:
            configs[variant] = make_config(variant, teacher, batch_size)
        cached = [v for v in variants if v in (*BRANCHES, "all") and v != "gridclip_grid"]
        if cached:
            cache_teacher.run(make_config("all", teacher, batch_size), cache)
        for variant in cached:
            configs[f"{variant} cached"] = make_config(variant, teacher, batch_size, cache)
        runs = {name: prepare(config) for name, config in configs.items()}
    rounds = [{name: run() for name, run in runs.items()} for _ in range(steps)]
    return {
        name: {
            "step_seconds": statistics.median(times[name] for times in rounds),
            "images_per_second": batch_size / statistics.median(t[name] for t in rounds),
            "over_plain": statistics.median(times[name] / times["plain"] for times in rounds),
        }
        for name in configs
    }


def alignment_costs(measured: dict[str, Any]) -> dict[str, float]:
    """How many times the step with alignment of regions takes that of the image, cached or not."""
    if "gridclip_image" not in measured:
        return {}
    seconds = {name: values["step_seconds"] for name, values in measured.items()}
    image = seconds["gridclip_image"]
    costs: dict[str, float] = {}
    for name in (f"regions_{n}" for n in PROPOSALS):
        if name in seconds:
            costs[f"{name}_over_image"] = seconds[name] / image
            costs[f"{name}_over_image_cached"] = seconds[name] / seconds["gridclip_image cached"]
    return costs


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the measurements. Returns 2, with one line on stderr, for arguments of no use."""
    parser = command.parser(__doc__)
    parser.add_argument("--variants", default=",".join(VARIANTS[1:]), help="comma-separated")
    parser.add_argument("--batch_size", type=int, default=16, help="images per step")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each")
    command.add_out(parser)
    arguments = parser.parse_args(argv)
    variants = [name for name in arguments.variants.split(",") if name != "plain"]

    def run() -> dict[str, Any]:
        measured = measure(variants, arguments.batch_size, arguments.steps)
        return {
            "machine": command.machine(),
            "config": f"configs/{CONFIG.name}",
            "batch_size": arguments.batch_size,
            "steps": arguments.steps,
            "variants": measured,
            "gridclip": alignment_costs(measured),
        }

    return command.report("distillation", run, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
