"""Gradients of a batch's mean loss, and how they are clipped.

"none" and "global" take the gradient of the mean; "global" clips it. The per-example scopes clip
every example's gradient before the mean, which is worth four to five points of AP (arXiv
2205.06230, table A5): "exact" takes each example's gradient with respect to every parameter;
"shared_text" runs the text tower once for the whole batch, takes each example's gradient with
respect to the image side and to its query embeddings, and sends the clipped sum back through the
text tower in one pass.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, PyTree

from owl_det import sharding
from owl_det.config import ClipConfig
from owl_det.errors import ConfigError
from owl_det.training.objectives import (
    OBJECTIVES,
    Examples,
    StepContext,
    embed_query_table,
    example_losses,
    gather_queries,
)
from owl_det.types import Batch, Params


class Rows(NamedTuple):
    """A batch as it is cut into data shards; `is_counted` says what the loss is a mean of."""

    batch: Batch
    examples: Examples
    is_counted: Bool[Array, " n"]


class Gradients(NamedTuple):
    """Clipped mean gradients, the losses and parts of each example, and more to log."""

    values: Params
    losses: Float[Array, " n"]
    parts: dict[str, Float[Array, " n"]]
    metrics: dict[str, Float[Array, ""]]


def of_batch(params: Params, rows: Rows, context: StepContext, mesh: Mesh | None) -> Gradients:
    """The gradients as `config.optimizer.clip` says. `context.num_tables` is of the whole batch."""
    is_per_example = context.config.optimizer.clip.is_per_example
    return (_per_example if is_per_example else _of_mean)(params, rows, context, mesh)


def _on_data_shards(
    fn: Callable[[Params, StepContext, Any], tuple[Params, Any]],
    params: Params,
    context: StepContext,
    rows: Any,
    mesh: Mesh | None,
) -> tuple[Params, Any]:
    """`sharding.on_data_shards`: each shard has its own query table."""
    own = context if mesh is None else dataclasses.replace(context, num_tables=1)

    def local(params: Params, traced: Any, rows: Any) -> tuple[Params, Any]:
        text_key, count, teachers = traced
        mine = dataclasses.replace(own, text_key=text_key, count=count, teachers=teachers)
        return fn(params, mine, rows)

    traced = context.text_key, context.count, context.teachers
    return sharding.on_data_shards(local, params, traced, rows, mesh)


def _of_mean(params: Params, rows: Rows, context: StepContext, mesh: Mesh | None) -> Gradients:
    """Gradients of the mean loss, clipped as a whole where the scope says so."""
    config = context.config
    objective, clip = OBJECTIVES[config.task], config.optimizer.clip

    def gradients(params: Params, context: StepContext, rows: Rows) -> tuple[Params, Any]:
        def loss_fn(params: Params) -> tuple[Array, Any]:
            losses, parts = objective.losses(params, rows.batch, rows.examples, context)
            total = jnp.where(rows.is_counted, losses, 0.0).sum()
            return total / context.count, (losses, parts)

        return jax.grad(loss_fn, has_aux=True)(params)

    if objective.couples_examples(config):
        # Contrastive training and HierKD's contrast of captions compare all examples of the global
        # batch, which no data shard has: the compiler places the work.
        whole = sharding.gather_over_fsdp(params, mesh)
        values, (losses, parts) = gradients(whole, context, rows)
    else:
        values, (losses, parts) = _on_data_shards(gradients, params, context, rows, mesh)
    norm = optax.tree.norm(values)
    if clip.scope == "global":
        factor = clip_factor(norm, clip.norm)
        values = jax.tree.map(lambda g: g * factor, values)
    return Gradients(values, losses, parts, {"gradient_norm": norm})


def clip_factor(norm: Float[Array, "*b"], limit: float) -> Float[Array, "*b"]:
    """min(1, limit / norm)."""
    return jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))


# --- by example ----------------------------------------------------------------------------------


def _per_example(params: Params, rows: Rows, context: StepContext, mesh: Mesh | None) -> Gradients:
    """Mean over examples of clipped gradients, a microbatch at a time to bound memory."""
    total, (losses, parts, norms) = _on_data_shards(_clipped_sum, params, context, rows, mesh)
    is_example, clip = rows.is_counted, context.config.optimizer.clip
    metrics = {
        "gradient_norm": jnp.where(is_example, norms, 0.0).sum() / context.count,
        "clipped_share": (is_example & (norms > clip.norm)).sum() / context.count,
    }
    values = jax.tree.map(lambda g: g / context.count, total)
    return Gradients(values, losses, parts, metrics)


class _PerExample(NamedTuple):
    """How the gradients of one example are taken."""

    moving: Params  # with respect to these, and to
    inputs: Array  # what each example brings along, [b, q, …]
    gradients: Callable[[Params, Examples, Array], tuple[Any, Array, dict[str, Array]]]
    add_text: Callable[[Params, Array], Params]  # the text tower's, from those of the inputs


def _clipped_sum(
    params: Params, context: StepContext, rows: Rows
) -> tuple[Params, tuple[Array, dict[str, Array], Array]]:
    """Sum over a shard's examples of clipped gradients; losses, parts and norms of each."""
    clip = context.config.optimizer.clip
    taken = (_exact if clip.scope == "exact" else _shared_text)(params, rows.batch, context)

    def microbatch(total: Params, xs: tuple[Examples, Array]) -> tuple[Params, Any]:
        part, part_inputs = xs
        (g_params, g_inputs), losses, parts = jax.vmap(taken.gradients, (None, 0, 0))(
            taken.moving, part, part_inputs
        )
        norms = jax.vmap(optax.tree.norm)((g_params, g_inputs))
        # A gradient that is no number is left as it is: the run must stop, not hide it.
        factors = jnp.where(part.is_example, clip_factor(norms, clip.norm), 0.0)
        total = jax.tree.map(lambda t, g: t + jnp.tensordot(factors, g, axes=1), total, g_params)
        clipped_inputs = jax.tree.map(lambda g: g * factors[:, None, None], g_inputs)
        return total, (clipped_inputs, losses, parts, norms)

    num_examples = rows.batch.image.shape[0]
    to_micro, from_micro = _microbatching(num_examples, microbatch_size(clip, num_examples))
    zeros = jax.tree.map(jnp.zeros_like, taken.moving)
    total, stacked = jax.lax.scan(microbatch, zeros, to_micro((rows.examples, taken.inputs)))
    g_inputs, losses, parts, norms = from_micro(stacked)
    return taken.add_text(total, g_inputs), (losses, parts, norms)


def _exact(params: Params, batch: Batch, context: StepContext) -> _PerExample:
    """With respect to every parameter, text tower included."""

    def gradients(params: Params, example: Examples, tokens: Array) -> Any:
        def loss_fn(params: Params) -> tuple[Array, Any]:
            queries = embed_query_table(params, tokens, context)
            return _loss_of_one(params, example, queries, context)

        taken, (loss, parts) = jax.grad(loss_fn, has_aux=True)(params)
        return (taken, {}), loss, parts

    tokens = gather_queries(batch.query_table, batch.query_index, context.num_tables)
    return _PerExample(params, tokens, gradients, lambda total, g_inputs: total)


def _shared_text(params: Params, batch: Batch, context: StepContext) -> _PerExample:
    """With respect to the image side and the example's query embeddings."""
    text = {"text": params["text"]}
    table, text_vjp = jax.vjp(
        lambda text: embed_query_table(text, batch.query_table, context), text
    )

    def gradients(params: Params, example: Examples, queries: Array) -> Any:
        def loss_fn(params: Params, inputs: dict[str, Array]) -> tuple[Array, Any]:
            return _loss_of_one(params, example, inputs["queries"], context)

        taken, (loss, parts) = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(
            params, {"queries": queries}
        )
        return taken, loss, parts

    def gather(table: Array) -> Array:
        return gather_queries(table, batch.query_index, context.num_tables)

    def add_text(total: Params, g_inputs: Any) -> Params:
        shape = jax.ShapeDtypeStruct(table.shape, table.dtype)
        (g_table,) = jax.linear_transpose(gather, shape)(g_inputs["queries"])
        return {**total, **text_vjp(g_table)[0]}

    moving = {name: value for name, value in params.items() if name != "text"}
    return _PerExample(moving, gather(table), gradients, add_text)


def _loss_of_one(
    params: Params, example: Examples, queries: Array, context: StepContext
) -> tuple[Array, tuple[Array, dict[str, Array]]]:
    batch_of_one = jax.tree.map(lambda x: x[None], example)
    losses, parts = example_losses(params, batch_of_one, queries[None], context)
    return losses[0], (losses[0], jax.tree.map(lambda x: x[0], parts))


def microbatch_size(clip: ClipConfig, num_examples: int) -> int:
    """Examples of a data shard whose gradients exist together.

    Raises `ConfigError` where the shard's examples do not divide.
    """
    size = min(clip.microbatch, num_examples)
    if num_examples % size:
        raise ConfigError(
            f"config.optimizer.clip.microbatch: {size} does not divide the {num_examples} "
            "examples of each data shard"
        )
    return size


def _microbatching(
    num_examples: int, size: int
) -> tuple[Callable[[PyTree], PyTree], Callable[[PyTree], PyTree]]:
    """Functions that cut a shard's rows into microbatches, along a new first axis, and undo it."""

    def to_micro(x: Array) -> Array:
        return x.reshape(-1, size, *x.shape[1:])

    def from_micro(x: Array) -> Array:
        return x.reshape(num_examples, *x.shape[2:])

    return lambda tree: jax.tree.map(to_micro, tree), lambda tree: jax.tree.map(from_micro, tree)
