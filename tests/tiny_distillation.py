"""A tiny detector with any branches of distillation, and a teacher for it."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from owl_det import sharding
from owl_det.checkpoints.load import save_model
from owl_det.config import Config, MeshConfig
from owl_det.distillation import teachers
from owl_det.training import train_step
from owl_det.types import LoadedModel
from tests import tiny

KEY = jax.random.key(5)
THINGS, STUFF = ("red star", "blue ring", "green cross"), ("grey wall", "noise")

WEIGHTS: dict[str, Any] = {
    "gridclip_grid": {"weight": 1.0},
    "gridclip_image": {"weight": 10.0},
    "clipself": {"weight": 1.0},
    "densevlm": {"weight": 1.0, "things": THINGS, "stuff": STUFF, "threshold": 0.0},
    "hierkd_instance": {"weight": 1.0, "min_iou": 0.0, "max_crops": 3},
    "hierkd_global": {"weight": 1.0},
}


def config(*names: str, **changes: Any) -> Config:
    """A tiny detector with the named branches on (of `WEIGHTS`)."""
    distill = {name: WEIGHTS[name] for name in names}
    distill |= {
        "teacher": "given",
        "require_same_text": False,
        "dense_image_size": 24,
        "regions": {"max_regions": 6},
    }
    distill |= changes.pop("distill", {})
    base: dict[str, Any] = {"batch_size": 4, "data__with_captions": True}
    base |= {"model__image__num_layers": 1, "model__text__num_layers": 1}
    base["optimizer__clip"] = {"scope": "none"}
    return tiny.config(**(base | changes), distill=distill)


def towers_config(**changes: Any) -> Config:
    """Tiny towers, smaller than the detector's."""
    return tiny.config(
        task="contrastive",
        model__contrastive="softmax",
        data__with_captions=True,
        optimizer__clip={"scope": "none"},
        model__image_size=16,
        model__image__num_layers=1,
        model__text__num_layers=1,
        **changes,
    )


def save_towers(folder: Path, **changes: Any) -> str:
    """Writes such towers as a checkpoint; returns its path."""
    made = towers_config(**changes)
    loaded = LoadedModel(
        kind="towers",
        params=tiny.params(made, 9),
        config=made.model,
        preprocess=made.preprocess,
        eval_prompts="none",
        step=0,
    )
    save_model(folder, loaded)
    return str(folder)


def open_teaching(config: Config, folder: str) -> tuple[Config, Any]:
    """The config with the teacher filled in, and its teachers on one device."""
    config = dataclasses.replace(
        config, distill=dataclasses.replace(config.distill, teacher=folder)
    )
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    return config, teachers.open_teachers(config, mesh)


def take(config: Config, teaching: Any, num_shards: int = 1) -> tuple[Any, Any]:
    """Gradients and metrics of the first batch from fresh parameters."""
    dim = teaching.teacher_dim if teaching else 0
    params = train_step.init_state(config, teacher_dim=dim).params

    @jax.jit
    def run(params: Any, batch: Any) -> Any:
        return train_step.loss_and_gradients(
            params, batch, KEY, config=config, num_data_shards=num_shards, teachers=teaching
        )

    return run(params, tiny.batch(config, num_shards))
