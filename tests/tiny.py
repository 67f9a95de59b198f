"""A model small enough for tests, and batches for it."""

from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.input import TrainInput
from owl_det.checkpoints.load import save_model
from owl_det.config import Config
from owl_det.config.resolve import resolve
from owl_det.distillation.cache_request import cache_request
from owl_det.modeling import build
from owl_det.modeling.towers import TOWERS
from owl_det.types import Batch, LoadedModel, batch_of

_PARAMS: dict[tuple[str, int], Any] = {}  # by task and model, and the seed


def config(**changes: Any) -> Config:
    """A tiny config; `changes` are dotted keys with __ for dots, e.g. optimizer__kind="sgd"."""
    tree: dict[str, Any] = {
        "batch_size": 8,
        "num_steps": 10,
        "model": {
            "image_size": 32,
            "embedding_dim": 16,
            "image": {
                "patch_size": 8,
                "width": 32,
                "num_layers": 2,
                "num_heads": 2,
                "mlp_width": 64,
                "droplayer_rate": 0.0,
            },
            "text": {
                "num_positions": 8,
                "width": 16,
                "num_layers": 2,
                "num_heads": 2,
                "mlp_width": 32,
                "droplayer_rate": 0.0,
            },
        },
        "data": {
            "train": {"shapes": {"kind": "shapes_world", "image_size": 32, "num_images": 64}},
            "max_instances": 6,
            "max_queries": 10,
            "min_queries": 0,
            "train_prompts": "none",
            "eval_prompts": "none",
        },
        "optimizer": {"learning_rate": 1e-2, "text_learning_rate": 1e-2, "kind": "sgd"},
        "schedule": {"kind": "constant", "warmup_steps": 0},
    }
    for key, value in changes.items():
        node = tree
        *parents, leaf = key.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return resolve(tree)


def params(config: Config, seed: int = 0) -> Any:
    """Random parameters, from one compiled program: leaf by leaf takes many times as long.

    They are the caller's own, who may donate them; equal ones are made once in a process.
    """
    key = (repr((config.task, config.model)), seed)
    if key not in _PARAMS:
        init = jax.jit(lambda seed: build.init_params(config, jax.random.key(seed)))
        _PARAMS[key] = jax.device_get(init(seed))
    return jax.tree.map(jnp.array, _PARAMS[key])


def loaded(
    *,
    seed: int = 1,
    step: int = 5,
    kind: Literal["detector", "towers"] = "detector",
    names: tuple[str, ...] = (),
    **changes: Any,
) -> LoadedModel:
    """A model as it is read from a checkpoint; `changes` as those of `config`."""
    made = config(**changes)
    values = params(made, seed)
    if kind == "towers":
        values = {name: value for name, value in values.items() if name in TOWERS}
    return LoadedModel(
        kind=kind,
        params=values,
        config=made.model,
        preprocess=made.preprocess,
        eval_prompts="none",
        step=step,
        names=names,
    )


def save(folder: Path, **changes: Any) -> Path:
    """Writes `loaded(**changes)` as a checkpoint; returns its path."""
    save_model(folder, loaded(**changes))
    return folder


def arrays(config: Config, num_shards: int = 1) -> dict[str, np.ndarray]:
    """The first batch, as the pipeline makes it."""
    batches = TrainInput(config, cache_request(config)).batches(0, num_data_shards=num_shards)
    first = next(batches)
    batches.close()
    return first


def batch(config: Config, num_shards: int = 1) -> Batch:
    return to_batch(arrays(config, num_shards))


def to_batch(arrays: dict[str, np.ndarray]) -> Batch:
    return jax.tree.map(jax.numpy.asarray, batch_of(arrays))
