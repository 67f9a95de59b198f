"""One training step: a pure function from state and batch to new state and metrics."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree

from owl_det import sharding
from owl_det.config import Config
from owl_det.distillation.branch import Teachers
from owl_det.modeling.build import BRANCHES, init_params
from owl_det.training import gradients, optim
from owl_det.training.objectives import OBJECTIVES, context_of, split_batch
from owl_det.types import Batch, Params, TrainState

Metrics = dict[str, Array]

# CLIP bounds its learned scale: exp(logit_scale) <= 100 (arXiv 2103.00020, section 2.5). SigLIP
# does not, and published weights lie above.
MAX_LOGIT_SCALE = 4.6052


def init_state(config: Config, params: Params | None = None, teacher_dim: int = 0) -> TrainState:
    """The state before the first step; from `params` if they are given.

    Parameters of distillation branches are beside the model's, under `modeling.build.BRANCHES`;
    `teacher_dim` is the width of the teacher's vectors.
    """
    if params is None:
        params = init_params(config, jax.random.key(config.seed))
    key, width = jax.random.key(config.seed), config.model.embedding_dim
    if config.distill.active():
        from owl_det.distillation import branches

        added = branches.init(config.distill, key, width, teacher_dim)
        params = {**params, BRANCHES: added} if added else params
    optimizer = optim.build(config.optimizer, config.schedule, config.num_steps)
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params)
    )


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    config: Config,
    num_data_shards: int,
    mesh: Mesh | None = None,
    teachers: Teachers | None = None,
) -> tuple[TrainState, Metrics]:
    """One step. `num_data_shards` is the number of data shards that the batch's tables are cut for.

    `teachers` are the frozen models that the distillation branches of the config ask for.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    mean_gradients, metrics = loss_and_gradients(
        state.params,
        batch,
        key,
        config=config,
        num_data_shards=num_data_shards,
        mesh=mesh,
        teachers=teachers,
    )
    optimizer = optim.build(config.optimizer, config.schedule, config.num_steps)
    updates, opt_state = optimizer.update(mean_gradients, state.opt_state, state.params)
    params = cast(Params, optax.apply_updates(state.params, updates))
    if config.task == "contrastive":
        params = bound_scale(params, config)
    factor = optim.schedule(config.schedule, config.num_steps)(state.step)
    metrics["learning_rate"] = config.optimizer.learning_rate * factor
    new_state = TrainState(step=state.step + 1, params=params, opt_state=opt_state)
    return new_state, metrics


def bound_scale(params: Params, config: Config) -> Params:
    """Keeps the scale of a softmax within CLIP's bound."""
    if config.model.contrastive != "softmax":
        return params
    return {**params, "logit_scale": jnp.minimum(params["logit_scale"], MAX_LOGIT_SCALE)}


def loss_and_gradients(
    params: Params,
    batch: Batch,
    key: Key[Array, ""],
    *,
    config: Config,
    num_data_shards: int,
    mesh: Mesh | None = None,
    teachers: Teachers | None = None,
) -> tuple[Params, Metrics]:
    """Clipped mean gradients and the metrics of a batch; parts are means over real examples."""
    examples, text_key = split_batch(batch, key)
    read = None
    if teachers is not None:
        from owl_det.distillation import step_inputs

        # Teachers look at the whole batch once, before any gradient is taken.
        inputs = step_inputs.of_batch(batch, teachers)
        if config.distill.shuffle_targets:
            inputs = step_inputs.shuffle_targets(inputs, batch)
        examples = examples._replace(branch_inputs=inputs)
        read = step_inputs.of_step(params, teachers, config)
    is_counted = OBJECTIVES[config.task].is_counted(batch)
    context = context_of(config, batch, text_key, num_tables=num_data_shards, teachers=read)
    found = gradients.of_batch(params, gradients.Rows(batch, examples, is_counted), context, mesh)
    metrics = {
        name: jnp.where(is_counted, values, 0.0).sum() / context.count
        for name, values in {"loss": found.losses, **found.parts}.items()
    }
    return found.values, metrics | found.metrics


def jit_train_step(
    config: Config, mesh: Mesh, state: PyTree, teachers: Teachers | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The compiled step over a mesh; `state` gives shapes. The old state's buffers are reused.

    What frozen models hold is an argument of the program, where `teachers` has placed it.
    """
    placement = sharding.state_shardings(state, state.params, mesh)
    num_data_shards = sharding.num_data_shards(mesh)

    def step(state: TrainState, batch: Batch, arrays: PyTree) -> tuple[TrainState, Metrics]:
        held = teachers and dataclasses.replace(teachers, arrays=arrays)
        return train_step(
            state, batch, config=config, num_data_shards=num_data_shards, mesh=mesh, teachers=held
        )

    compile_step = partial(
        jax.jit, out_shardings=(placement, sharding.replicated(mesh)), donate_argnums=0
    )
    inputs = (placement, sharding.batch_sharding(mesh))
    if teachers is None:
        return compile_step(partial(step, arrays={}), in_shardings=inputs)
    arrays = teachers.arrays
    where = jax.tree.map(lambda x: x.sharding, arrays)
    compiled = compile_step(step, in_shardings=(*inputs, where))
    return lambda state, batch: compiled(state, batch, arrays)
