"""The state that a training starts from."""

from functools import partial
from typing import TYPE_CHECKING

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from owl_det import sharding
from owl_det.checkpoints.store import Checkpoints
from owl_det.config import Config
from owl_det.training import optim, train_step
from owl_det.types import TrainState

if TYPE_CHECKING:
    from owl_det.distillation.branch import Teachers


def initial_state(
    config: Config,
    mesh: Mesh,
    checkpoints: Checkpoints,
    input_version: str,
    opened: "Teachers | None",
) -> TrainState:
    """The state to train from: the latest checkpoint, other weights, or fresh ones."""
    teacher_dim = opened.teacher_dim if opened else 0
    init_state = partial(train_step.init_state, config, teacher_dim=teacher_dim)
    shapes = jax.eval_shape(init_state)
    placement = sharding.state_shardings(shapes, shapes.params, mesh)
    optim.groups(shapes.params, config.optimizer)
    if checkpoints.latest_step is not None:
        template = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placement
        )
        state = checkpoints.restore(template, input_version)
        logging.info("Resumed at step %d", int(state.step))
        return state
    params = None
    if config.checkpoint.init_from:
        from owl_det.checkpoints.adapt import adapt
        from owl_det.checkpoints.load import load_model

        loaded = load_model(config.checkpoint.init_from)
        params = jax.tree.map(np.asarray, adapt(loaded, config))
        logging.info("Starts from %s, step %d", config.checkpoint.init_from, loaded.step)
    if opened is not None:
        from owl_det.distillation.teachers import check_same_text

        check_same_text(opened, params, config)
    if params is not None:
        return jax.jit(lambda p: init_state(params=p), out_shardings=placement)(params)
    return jax.jit(init_state, out_shardings=placement)()
