"""Times one training step on one device and counts its arithmetic; prints JSON.

    python -m benchmarks.train_step --model tiny
    python -m benchmarks.train_step --model b16 --dtype bfloat16 --attention cudnn   # on a GPU

The batch is synthetic and lies on the device from the start: what is timed is the step alone, no
input pipeline. `dense` trains on all patches and all tokens; `dropped` drops half of the patches
and keeps the tokens of highest objectness, as OWLv2 does.

Seconds are of the clock and of the processors (`cpu_seconds`): where other work shares the cores
only the latter compare.
"""

import argparse
import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import command
from data_pipelines import batch_spec
from owl_det import sharding
from owl_det.assigners.hungarian import match
from owl_det.config import (
    ClipConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    SelectionConfig,
    ShapesWorldSource,
    TextTowerConfig,
    VitConfig,
)
from owl_det.config.resolve import resolve
from owl_det.errors import ConfigError
from owl_det.modeling.token_drop import num_kept
from owl_det.training import flops, step_shapes, train_step
from owl_det.types import Batch, Predictions, Targets, batch_of

VARIANTS = ("dense", "dropped")
CLIP_KEYS = ("scope", "microbatch")

# What configs/quickstart.py trains (a test compares them).
TINY = Config(
    name="tiny",
    batch_size=32,
    model=ModelConfig(
        image_size=64,
        embedding_dim=64,
        image=VitConfig(
            patch_size=8,
            width=128,
            position_init="sincos2d",
            num_layers=4,
            num_heads=4,
            mlp_width=512,
            droplayer_rate=0.0,
        ),
        text=TextTowerConfig(
            num_positions=8,
            width=64,
            num_layers=2,
            num_heads=2,
            mlp_width=256,
            droplayer_rate=0.0,
        ),
        scan_unroll=4,
    ),
    # Of 64 tokens; as in OWLv2, a few times more than an image has instances.
    selection=SelectionConfig(token_drop_rate=0.5, instance_top_k=16),
    data=DataConfig(max_instances=6, max_queries=48, max_distinct_queries=48, min_queries=0),
    optimizer=OptimizerConfig(
        learning_rate=1e-3,
        text_learning_rate=1e-3,
        frozen=("^text/token_embedding$",),
        clip=ClipConfig(scope="global"),
    ),
)

# What configs/owlv2_b16.py trains.
B16 = Config(
    name="b16",
    batch_size=8,
    model=ModelConfig(image_size=960, image=VitConfig(patch_size=16), remat="full"),
    selection=SelectionConfig(token_drop_rate=0.5, instance_top_k=256),
    data=DataConfig(max_instances=400, max_queries=300),
    optimizer=OptimizerConfig(kind="adafactor"),
    schedule=ScheduleConfig(kind="inverse_sqrt"),
)

# What configs/owlv2_l14.py trains.
L14 = dataclasses.replace(
    B16,
    name="l14",
    model=ModelConfig(
        image_size=1008,
        embedding_dim=768,
        image=VitConfig(patch_size=14, width=1024, num_layers=24, num_heads=16, mlp_width=4096),
        text=TextTowerConfig(width=768, num_heads=12, mlp_width=3072),
        remat="full",
    ),
    selection=SelectionConfig(token_drop_rate=0.5, instance_top_k=512),
)

MODELS = {config.name: config for config in (TINY, B16, L14)}


# --- configs and batches -------------------------------------------------------------------------


def make_config(model: str, variant: str, **changes: Any) -> Config:
    """A config of `MODELS` as `dense` or `dropped`.

    `changes` may hold `batch_size`, `image_size`, `dtype`, `attention`, `remat`, `clip_scope`,
    `clip_microbatch` and `max_distinct_queries`; None keeps the model's own. Raises `ConfigError`
    for values that cannot be run.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    base = MODELS[model]
    model_keys = ("image_size", "dtype", "attention", "remat")
    in_model = {key: given.pop(key) for key in model_keys if key in given}
    in_clip = {key: given.pop(f"clip_{key}") for key in CLIP_KEYS if f"clip_{key}" in given}
    clip = dataclasses.replace(base.optimizer.clip, **in_clip)
    # The schema asks for a source; none is opened here.
    in_data: dict[str, Any] = {"train": {"none": ShapesWorldSource()}}
    if "max_distinct_queries" in given:
        in_data["max_distinct_queries"] = given.pop("max_distinct_queries")
    config = dataclasses.replace(
        base,
        selection=SelectionConfig() if variant == "dense" else base.selection,
        model=dataclasses.replace(base.model, **in_model),
        data=dataclasses.replace(base.data, **in_data),
        optimizer=dataclasses.replace(base.optimizer, clip=clip),
        **given,
    )
    return resolve(dataclasses.asdict(config))


def synthetic_batch(config: Config, seed: int = 0) -> Batch:
    """A batch of noise images, with half of the instance slots and all queries in use."""
    rng = np.random.default_rng(seed)
    fields, sizes = batch_spec.present(config), batch_spec.axis_sizes(config)
    b, m, q, rows, length = (sizes[axis] for axis in "bmqul")
    size = rng.uniform(0.05, 0.4, (b, m, 2))
    boxes = np.concatenate([rng.uniform(size / 2, 1 - size / 2), size], axis=-1)
    is_instance = np.broadcast_to(np.arange(m) < max(1, m // 2), (b, m))
    labels = rng.integers(q, size=(b, m, 1)) == np.arange(q)
    # Start, words, the end token (the highest id, where the tower pools).
    table = rng.integers(1, 49000, (rows, length))
    table[:, 0], table[:, -1] = 49406, 49407
    index = np.argsort(rng.random((b, max(q, rows))), axis=-1)[:, :q] % rows
    arrays = batch_spec.zeros(fields, sizes) | {
        "image": rng.integers(0, 256, fields["image"].shape(sizes), dtype=np.uint8),
        "is_example": np.ones(b, bool),
        "image_id": np.arange(b, dtype=np.int32),
        "original_size": np.full((b, 2), sizes["H"], np.int32),
        "boxes": boxes.astype(np.float32),
        "is_instance": is_instance,
        "instance_labels": labels & is_instance[..., None],
        "instance_scores": is_instance.astype(np.float32),
        "query_table": table.astype(np.int32),
        "query_index": index.astype(np.int32),
        "is_query": np.ones((b, q), bool),
        "tile_boxes": np.full(fields["tile_boxes"].shape(sizes), [0.5, 0.5, 1, 1], np.float32),
        "tile_image_id": np.arange(b, dtype=np.int32)[:, None],
    }
    batch_spec.check(arrays, fields, sizes)
    return batch_of(jax.tree.map(jnp.asarray, arrays))


def clustered_predictions(config: Config, batch: Batch, seed: int = 0) -> Predictions:
    """Predictions as a trained detector makes them: many tokens claim the same instance.

    Random costs are easy to match; crowds of near-equal candidates are what training meets.
    """
    rng = np.random.default_rng(seed)
    model, selection = config.model, config.selection
    num_patches = (model.grid_side) ** 2
    n = num_kept(num_patches, selection.token_drop_rate)
    k = min(selection.instance_top_k or n, n)
    boxes, labels = np.asarray(batch.boxes), np.asarray(batch.instance_labels)
    b, m, q = labels.shape
    num_real = int(np.asarray(batch.is_instance)[0].sum())
    # Squared: some instances draw far more tokens than others.
    owner = (rng.random((b, k)) ** 2 * num_real).astype(int)
    near = np.take_along_axis(boxes, owner[..., None], axis=1)
    near = np.clip(near + rng.normal(0, 0.02, near.shape), 0.01, 0.99)
    own_labels = np.take_along_axis(labels, owner[..., None], axis=1)
    logits = np.where(own_labels, 0.0, -5.0) + rng.normal(0, 1, (b, k, q))
    return Predictions(
        boxes=jnp.asarray(near, jnp.float32),
        class_logits=jnp.asarray(logits, jnp.float32),
        class_embeddings=jnp.zeros((b, k, model.embedding_dim)),
        objectness_logits=jnp.zeros((b, k)),
        token_index=jnp.broadcast_to(jnp.arange(k)[None], (b, k)),
    )


# --- measuring -----------------------------------------------------------------------------------


def measure(config: Config, steps: int) -> dict[str, Any]:
    """Times `steps` training steps after one that is not timed, and accounts for them."""
    if steps < 1:
        raise ConfigError(f"--steps: must be at least 1, got {steps}")
    mesh = _mesh()
    started = time.perf_counter()
    compiled = step_shapes.lower(config, mesh).compile()
    compile_seconds = time.perf_counter() - started
    batch = jax.device_put(synthetic_batch(config), sharding.batch_sharding(mesh))
    shapes = step_shapes.state_shapes(config)
    placement = sharding.state_shardings(shapes, shapes.params, mesh)
    state = jax.jit(lambda: train_step.init_state(config), out_shardings=placement)()
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    for _ in range(steps + 1):
        starts = time.perf_counter(), time.process_time()
        state, metrics = jax.block_until_ready(compiled(state, batch))
        seconds.append(time.perf_counter() - starts[0])
        cpu_seconds.append(time.process_time() - starts[1])
    if not np.isfinite(metrics["loss"]):
        raise ConfigError(f"the loss is {metrics['loss']}: a step that diverges says nothing")
    step = statistics.median(seconds[1:])
    matching = time_matching(config, batch, steps)
    texts = flops.texts_per_image(config)
    needed = flops.flops_per_image(config, texts)
    counted = flops.xla_flops_per_image(config)
    return {
        "step_seconds": command.spread(seconds[1:]),
        "cpu_seconds": command.spread(cpu_seconds[1:]),
        "compile_seconds": compile_seconds,
        "images_per_second": config.batch_size / step,
        "texts_per_image": texts,
        "forward_flops": flops.forward_flops(config, texts),
        "flops_per_image": needed,
        "xla_flops_per_image": counted,
        "xla_over_formula": counted / needed,
        "flops_per_second": needed * config.batch_size / step,
        "matching_seconds": command.spread(matching),
        "matching_share": statistics.median(matching) / step,
        "memory_bytes": _memory(compiled),
    }


def time_matching(config: Config, batch: Batch, steps: int) -> list[float]:
    """Seconds of matching one batch's `clustered_predictions`, jitted on its own.

    As many examples at a time as the step matches: solvers of one vmap wait for the slowest.
    """
    predictions = clustered_predictions(config, batch)
    targets = Targets(
        boxes=batch.boxes,
        is_instance=batch.is_instance,
        is_crowd=batch.is_crowd,
        labels=batch.instance_labels,
        is_query=batch.is_query,
    )
    size = flops.countable(config).batch_size

    def run(predictions: Predictions, targets: Targets) -> Any:
        return jax.lax.map(
            lambda pair: match(pair[0], pair[1], config.loss),
            (predictions, targets),
            batch_size=size,
        )

    run_jit: Callable[..., Any] = jax.jit(run)
    seconds: list[float] = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        jax.block_until_ready(run_jit(predictions, targets))
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def _mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def _memory(compiled: Any) -> dict[str, int]:
    """What the compiled step holds at its peak, and what process and device have held so far."""
    memory = {f"step_{name}": size for name, size in step_shapes.memory_bytes(compiled).items()}
    memory["process_peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # A CPU device keeps no statistics.
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        memory["device_peak"] = stats["peak_bytes_in_use"]
    return memory


# --- command -------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All variants, one after the other; peaks of process and device are of all so far."""
    keys = (
        "batch_size",
        "image_size",
        "dtype",
        "attention",
        "remat",
        "max_distinct_queries",
        "clip_scope",
        "clip_microbatch",
    )
    changes = {key: getattr(arguments, key) for key in keys}
    variants = arguments.variants.split(",")
    unknown = sorted(set(variants) - set(VARIANTS))
    if unknown:
        raise ConfigError(f"--variants: {', '.join(unknown)} unknown; known: {', '.join(VARIANTS)}")
    configs = {name: make_config(arguments.model, name, **changes) for name in variants}
    first = configs[variants[0]]
    return {
        "machine": command.machine(),
        "model": arguments.model,
        "batch_size": first.batch_size,
        "image_size": first.model.image_size,
        "dtype": first.model.dtype,
        "attention": first.model.attention,
        "remat": first.model.remat,
        "clip_scope": first.optimizer.clip.scope,
        "clip_microbatch": first.optimizer.clip.microbatch,
        "steps": arguments.steps,
        "variants": {name: measure(config, arguments.steps) for name, config in configs.items()},
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny", help="its size")
    parser.add_argument("--variants", default="dense,dropped", help="comma-separated")
    parser.add_argument("--image_size", type=int, help="side in pixels; default: the model's")
    parser.add_argument("--batch_size", type=int, help="images per step; default: the model's")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of matrix work")
    parser.add_argument("--attention", choices=("xla", "cudnn"), help="default: the model's")
    parser.add_argument(
        "--remat", choices=("none", "full", "dots"), help="what is computed twice to save memory"
    )
    parser.add_argument(
        "--clip_scope",
        choices=("none", "global", "shared_text", "exact"),
        help="what gradients are clipped: config.optimizer.clip.scope",
    )
    parser.add_argument(
        "--clip_microbatch", type=int, help="examples whose gradients are held at once"
    )
    parser.add_argument(
        "--max_distinct_queries", type=int, help="texts per step; 0 = as many as could be needed"
    )
    command.add_out(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the measurements. Returns 2, with one line on stderr, for arguments of no use."""
    arguments = _parse(argv)
    return command.report("train_step", lambda: run(arguments), arguments.out)


if __name__ == "__main__":
    sys.exit(main())
