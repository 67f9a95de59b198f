"""One training step: pure functions from state and batch to new state and metrics.

Gradient clipping is part of the step. "global" clips the mean gradient. The per-example scopes
clip every example's gradient before the mean, which is worth four to five points of AP (arXiv
2205.06230, table A5): "exact" takes each example's gradient with respect to every parameter;
"shared_text" runs the text tower once for the whole batch, takes each example's gradient with
respect to the image side and to its query embeddings, and sends the clipped sum back through the
text tower in one pass.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32, Key, PyTree

from owl_det import lesson as lesson_lib
from owl_det import optim, sharding
from owl_det.config import ClipConfig, Config
from owl_det.errors import ConfigError
from owl_det.lesson import Lesson, Shared
from owl_det.losses import branches, contrastive
from owl_det.losses.branch import Dims
from owl_det.losses.total import total_loss
from owl_det.matching import match
from owl_det.modeling.build import BRANCHES, init_params, make_detector, model_params
from owl_det.modeling.token_drop import gather_tokens
from owl_det.types import (
    Batch,
    ImageFeatures,
    Params,
    Predictions,
    Targets,
    Teaching,
    TrainState,
)

Metrics = dict[str, Array]

# CLIP bounds its learned scale: exp(logit_scale) <= 100 (arXiv 2103.00020, section 2.5). SigLIP
# does not, and published weights lie above.
MAX_LOGIT_SCALE = 4.6052


class Examples(NamedTuple):
    """The per-image part of a step; every array has a leading axis b."""

    image: Array
    targets: Targets
    key: Array
    is_example: Array
    lesson: Lesson | None = None


def init_state(config: Config, params: Params | None = None, teacher_dim: int = 0) -> TrainState:
    """The state before the first step; from `params` if they are given.

    Parameters of distillation branches are beside the model's, under `modeling.build.BRANCHES`;
    `teacher_dim` is the width of the teacher's vectors.
    """
    if params is None:
        params = init_params(config, jax.random.key(config.seed))
    dims = Dims(config.model.embedding_dim, teacher_dim)
    added = branches.init(config.distill, jax.random.key(config.seed), dims)
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
    num_shards: int,
    mesh: Mesh | None = None,
    teaching: Teaching | None = None,
) -> tuple[TrainState, Metrics]:
    """One step. `num_shards` is the number of data shards that the batch's tables are cut for.

    `teaching` are the frozen models that the distillation branches of the config ask for.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    gradients, metrics = loss_and_gradients(
        state.params,
        batch,
        key,
        config=config,
        num_shards=num_shards,
        mesh=mesh,
        teaching=teaching,
    )
    optimizer = optim.build(config.optimizer, config.schedule, config.num_steps)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
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
    num_shards: int,
    mesh: Mesh | None = None,
    teaching: Teaching | None = None,
) -> tuple[Params, Metrics]:
    """Clipped mean gradients and the metrics of a batch; parts are means over real examples."""
    scope = config.optimizer.clip.scope
    take = _mean_gradients if scope in ("none", "global") else _per_example_gradients
    examples, text_key = split_batch(batch, key)
    shared = None
    if teaching is not None:
        # Teachers look at the whole batch once, before any gradient is taken.
        lesson = lesson_lib.lesson_of(batch, teaching)
        lesson = (
            lesson_lib.of_another_image(lesson, batch) if config.distill.shuffle_targets else lesson
        )
        examples = examples._replace(lesson=lesson)
        shared = lesson_lib.shared_of(params, teaching, config)
    gradients, losses, parts, extra = take(
        params, batch, examples, text_key, config, num_shards, mesh, shared
    )
    is_counted = _is_counted(batch, config)
    count = jnp.maximum(is_counted.sum(), 1)
    metrics = {
        name: jnp.where(is_counted, values, 0.0).sum() / count
        for name, values in {"loss": losses, **parts}.items()
    }
    return gradients, metrics | extra


def _is_counted(batch: Batch, config: Config) -> Bool[Array, " n"]:
    """What the loss is a mean of: real examples, or, with captions, tiles that have one."""
    if config.task != "contrastive":
        return batch.is_example
    assert batch.is_caption is not None
    return (batch.is_example[:, None] & batch.is_caption).reshape(-1)


def example_losses(
    params: Params,
    examples: Examples,
    query_embeddings: Float[Array, "b q e"],
    config: Config,
    shared: Shared | None = None,
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """Forward pass of the image side and the loss of each example."""
    detector = make_detector(config)
    variables = {"params": optim.hold_frozen(model_params(params), config.optimizer)}
    features = detector.apply(
        variables, examples.image, config.selection, examples.key, method="encode_image"
    )
    predictions = detector.apply(
        variables,
        features,
        query_embeddings,
        examples.targets.is_query,
        instance_top_k=config.selection.instance_top_k,
        method="predict",
    )
    assert isinstance(predictions, Predictions) and isinstance(features, ImageFeatures)
    assignment = match(predictions, examples.targets, config.loss)
    losses, parts = total_loss(
        predictions,
        examples.targets,
        config.loss,
        config.selection,
        assignment=assignment,
        keys=_stream(examples.key, 2),
    )
    if shared is None:
        return losses, parts
    tokens = detector.apply(variables, features, method="class_embeddings")
    features = ImageFeatures(tokens=cast(Array, tokens), token_index=features.token_index)
    instances = {
        "targets": examples.targets,
        "queries": query_embeddings,
        "instance_tokens": gather_tokens(predictions.class_embeddings, assignment.prediction),
        "instance_boxes": jax.lax.stop_gradient(
            gather_tokens(predictions.boxes, assignment.prediction)
        ),
        "is_matched": assignment.is_matched,
    }
    added, more = _branch_losses(params, examples, features, instances, config, shared)
    return losses + added, parts | more


def tower_losses(
    params: Params, examples: Examples, config: Config, shared: Shared | None
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """Distillation into the tokens of an image tower, each through the visual projection."""
    assert shared is not None
    variables = {"params": optim.hold_frozen(model_params(params), config.optimizer)}
    features = make_detector(config).apply(
        variables, examples.image, config.selection, examples.key, method="patch_features"
    )
    assert isinstance(features, ImageFeatures)
    return _branch_losses(params, examples, features, {}, config, shared)


def _branch_losses(
    params: Params,
    examples: Examples,
    features: ImageFeatures,
    instances: dict[str, Any],
    config: Config,
    shared: Shared,
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    assert examples.lesson is not None
    return lesson_lib.branch_losses(
        params,
        examples.lesson,
        shared,
        features,
        instances,
        images=examples.image,
        is_example=examples.is_example,
        keys=_stream(examples.key, 3),
        config=config,
    )


def _stream(keys: Key[Array, " b"], number: int) -> Key[Array, " b"]:
    """Keys of one more use of randomness; the image tower's are 0 and 1."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def contrastive_losses(
    params: Params, batch: Batch, image_keys: Key[Array, " b"], text_key: Any, config: Config
) -> tuple[Float[Array, " n"], dict[str, Float[Array, " n"]]]:
    """Each image, or tile, against the captions of the whole global batch, and the reverse."""
    assert batch.caption_tokens is not None
    tokens = batch.caption_tokens.reshape(-1, batch.caption_tokens.shape[-1])
    detector = make_detector(config)
    variables = {"params": optim.hold_frozen(params, config.optimizer)}
    if config.model.image.pooling == "mean":
        tiles = detector.apply(
            variables,
            batch.image,
            batch.tile_boxes,
            config.selection,
            image_keys,
            method="embed_tiles",
        )
        images = cast(Array, tiles).reshape(tokens.shape[0], -1)
    else:
        images = detector.apply(variables, batch.image, image_keys, method="embed_image")
    texts = encode_queries(params, tokens, text_key, config)
    logits = cast(Array, detector.apply(variables, images, texts, method="similarity"))
    is_same_text = (tokens[:, None] == tokens[None]).all(-1)
    is_counted = _is_counted(batch, config)
    loss_of = {"softmax": contrastive.softmax_loss, "sigmoid": contrastive.sigmoid_loss}
    losses = loss_of[config.model.contrastive](logits, is_same_text, is_counted)
    return losses, {"accuracy": contrastive.accuracy(logits, is_same_text, is_counted)}


def encode_queries(
    params: Params, tokens: Int32[Array, "u l"], key: Key[Array, ""], config: Config
) -> Float[Array, "u e"]:
    """Text tower in training mode. Noise depends on the text, not on its place in the table."""
    keys = jax.vmap(lambda row: jax.random.fold_in(key, _hash(row)))(tokens)
    variables = {"params": optim.hold_frozen(params, config.optimizer)}
    embeddings = make_detector(config).apply(variables, tokens, keys, method="encode_text")
    # The loss, and the cotangents that per-example clipping sends back, are float32.
    return cast(Array, embeddings).astype(jnp.float32)


def gather_queries(
    table: Float[Array, "u e"], index: Int32[Array, "b q"], num_shards: int
) -> Float[Array, "b q e"]:
    """Each image's query embeddings, from the rows of its own data shard."""
    b, q = index.shape
    tables = table.reshape(num_shards, -1, table.shape[-1])
    rows = index.reshape(num_shards, b // num_shards * q)
    return jax.vmap(lambda t, i: t[i])(tables, rows).reshape(b, q, -1)


def split_batch(batch: Batch, key: Key[Array, ""]) -> tuple[Examples, Key[Array, ""]]:
    """The per-image arrays, with a key for each image, and the key of the texts."""
    image_key, text_key = jax.random.split(key)
    numbers = jnp.arange(batch.image.shape[0])
    keys = jax.vmap(lambda i: jax.random.fold_in(image_key, i))(numbers)
    targets = Targets(
        boxes=batch.boxes,
        is_instance=batch.is_instance,
        is_crowd=batch.is_crowd,
        labels=batch.instance_labels,
        is_query=batch.is_query,
    )
    return Examples(batch.image, targets, keys, batch.is_example), text_key


def _hash(tokens: Int32[Array, " l"]) -> Array:
    """A 32-bit hash of a row of tokens."""
    multipliers = jnp.array(
        [pow(2654435761, i, 1 << 32) for i in range(1, tokens.shape[0] + 1)], jnp.uint32
    )
    mixed = jnp.sum((tokens.astype(jnp.uint32) + 1) * multipliers)
    return mixed ^ (mixed >> 15)


def _mean_gradients(
    params: Params,
    batch: Batch,
    examples: Examples,
    text_key: Any,
    config: Config,
    num_shards: int,
    mesh: Mesh | None,
    shared: Shared | None,
) -> tuple[Params, Array, dict[str, Array], Metrics]:
    """Gradients of the mean loss, clipped as a whole where the scope says so."""
    is_counted = _is_counted(batch, config)
    count = jnp.maximum(is_counted.sum(), 1)

    def shard_gradients(params: Params, given: Any, rows: Any) -> tuple[Params, Any]:
        text_key, count, shared = given
        batch, examples, is_counted = rows

        def loss_fn(params: Params) -> tuple[Array, Any]:
            if config.task == "contrastive":
                losses, parts = contrastive_losses(params, batch, examples.key, text_key, config)
            elif config.task == "distill":
                losses, parts = tower_losses(params, examples, config, shared)
            else:
                table = encode_queries(params, batch.query_table, text_key, config)
                queries = gather_queries(table, batch.query_index, num_tables)
                losses, parts = example_losses(params, examples, queries, config, shared)
            return jnp.where(is_counted, losses, 0.0).sum() / count, (losses, parts)

        return jax.grad(loss_fn, has_aux=True)(params)

    is_coupled = config.task == "contrastive" or branches.couple_examples(config.distill)
    num_tables = num_shards if mesh is None or is_coupled else 1
    given, rows = (text_key, count, shared), (batch, examples, is_counted)
    if is_coupled:
        # Contrastive training and HierKD's contrast of captions compare all examples of the global
        # batch, which no data shard has: the compiler places the work.
        whole = sharding.gather_over_fsdp(params, mesh)
        gradients, (losses, parts) = shard_gradients(whole, given, rows)
    else:
        gradients, (losses, parts) = sharding.on_data_shards(
            shard_gradients, params, given, rows, mesh
        )
    norm = optax.tree.norm(gradients)
    extra = {"gradient_norm": norm}
    if config.optimizer.clip.scope == "global":
        factor = clip_factor(norm, config.optimizer.clip.norm)
        gradients = jax.tree.map(lambda g: g * factor, gradients)
    return gradients, losses, parts, extra


def clip_factor(norm: Float[Array, "*b"], limit: float) -> Float[Array, "*b"]:
    """min(1, limit / norm)."""
    return jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))


def _per_example_gradients(
    params: Params,
    batch: Batch,
    examples: Examples,
    text_key: Any,
    config: Config,
    num_shards: int,
    mesh: Mesh | None,
    shared: Shared | None,
) -> tuple[Params, Array, dict[str, Array], Metrics]:
    """Mean over examples of clipped gradients, a microbatch at a time to bound memory."""
    num_tables = num_shards if mesh is None else 1

    def shard_gradients(params: Params, given: Any, rows: Any) -> tuple[Params, Any]:
        text_key, shared = given
        own_batch, own_examples = rows
        return _clipped_sum(params, own_batch, own_examples, text_key, config, num_tables, shared)

    total, (losses, parts, norms) = sharding.on_data_shards(
        shard_gradients, params, (text_key, shared), (batch, examples), mesh
    )
    is_example = batch.is_example
    count = jnp.maximum(is_example.sum(), 1)
    gradients = jax.tree.map(lambda g: g / count, total)
    extra = {
        "gradient_norm": jnp.where(is_example, norms, 0.0).sum() / count,
        "clipped_share": (is_example & (norms > config.optimizer.clip.norm)).sum() / count,
    }
    return gradients, losses, parts, extra


def _clipped_sum(
    params: Params,
    batch: Batch,
    examples: Examples,
    text_key: Any,
    config: Config,
    num_tables: int,
    shared: Shared | None,
) -> tuple[Params, tuple[Array, dict[str, Array], Array]]:
    """Sum over a shard's examples of clipped gradients; losses, parts and norms of each."""
    clip = config.optimizer.clip
    if clip.scope == "exact":
        tokens = gather_queries(batch.query_table, batch.query_index, num_tables)
        moving, inputs = params, tokens
        example_gradients = _exact_gradients(text_key, config, shared)
        text_vjp = None
    else:
        text = {"text": params["text"]}
        table, text_vjp = jax.vjp(
            lambda text: encode_queries(text, batch.query_table, text_key, config), text
        )
        moving = {name: value for name, value in params.items() if name != "text"}
        inputs = gather_queries(table, batch.query_index, num_tables)
        example_gradients = _image_side_gradients(config, shared)

    def microbatch(total: Params, xs: tuple[Examples, Array]) -> tuple[Params, Any]:
        part, part_inputs = xs
        (g_params, g_inputs), losses, parts = jax.vmap(example_gradients, (None, 0, 0))(
            moving, part, part_inputs
        )
        norms = jax.vmap(optax.tree.norm)((g_params, g_inputs))
        # A gradient that is no number is left as it is: the run must stop, not hide it.
        factors = jnp.where(part.is_example, clip_factor(norms, clip.norm), 0.0)
        total = jax.tree.map(lambda t, g: t + jnp.tensordot(factors, g, axes=1), total, g_params)
        clipped_inputs = jax.tree.map(lambda g: g * factors[:, None, None], g_inputs)
        return total, (clipped_inputs, losses, parts, norms)

    num_examples = batch.image.shape[0]
    to_micro, from_micro = _microbatching(num_examples, microbatch_size(clip, num_examples))
    zeros = jax.tree.map(jnp.zeros_like, moving)
    total, stacked = jax.lax.scan(microbatch, zeros, to_micro((examples, inputs)))
    g_inputs, losses, parts, norms = from_micro(stacked)
    if text_vjp is not None:
        g_table = jax.linear_transpose(
            lambda t: gather_queries(t, batch.query_index, num_tables),
            jax.ShapeDtypeStruct((batch.query_table.shape[0], inputs.shape[-1]), inputs.dtype),
        )(g_inputs["queries"])[0]
        total = {**total, **text_vjp(g_table)[0]}
    return total, (losses, parts, norms)


ExampleGradients = Callable[[Params, Examples, Array], tuple[Any, Array, dict[str, Array]]]


def _add_batch_axis(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[None], tree)


def _image_side_gradients(config: Config, shared: Shared | None) -> ExampleGradients:
    """Gradients of one example with respect to the image side and its query embeddings."""

    def gradients(params: Params, example: Examples, queries: Array) -> Any:
        def loss_fn(params: Params, inputs: dict[str, Array]) -> tuple[Array, Any]:
            losses, parts = example_losses(
                params, _add_batch_axis(example), inputs["queries"][None], config, shared
            )
            return losses[0], (losses[0], jax.tree.map(lambda x: x[0], parts))

        taken, (loss, parts) = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(
            params, {"queries": queries}
        )
        return taken, loss, parts

    return gradients


def _exact_gradients(text_key: Any, config: Config, shared: Shared | None) -> ExampleGradients:
    """Gradients of one example with respect to every parameter, text tower included."""

    def gradients(params: Params, example: Examples, tokens: Array) -> Any:
        def loss_fn(params: Params) -> tuple[Array, Any]:
            queries = encode_queries(params, tokens, text_key, config)
            losses, parts = example_losses(
                params, _add_batch_axis(example), queries[None], config, shared
            )
            return losses[0], (losses[0], jax.tree.map(lambda x: x[0], parts))

        taken, (loss, parts) = jax.grad(loss_fn, has_aux=True)(params)
        return (taken, {}), loss, parts

    return gradients


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


def jit_train_step(
    config: Config, mesh: Mesh, state: PyTree, teaching: Teaching | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The compiled step over a mesh; `state` gives shapes. The old state's buffers are reused.

    What frozen models hold is an argument of the program, where `teaching` has placed it.
    """
    placement = sharding.state_shardings(state, state.params, mesh)
    num_shards = sharding.num_data_shards(mesh)

    def step(state: TrainState, batch: Batch, arrays: PyTree) -> tuple[TrainState, Metrics]:
        held = teaching and dataclasses.replace(teaching, arrays=arrays)
        return train_step(
            state, batch, config=config, num_shards=num_shards, mesh=mesh, teaching=held
        )

    compile_step = partial(
        jax.jit, out_shardings=(placement, sharding.replicated(mesh)), donate_argnums=0
    )
    inputs = (placement, sharding.batch_sharding(mesh))
    if teaching is None:
        return compile_step(partial(step, arrays={}), in_shardings=inputs)
    arrays = teaching.arrays
    where = jax.tree.map(lambda x: x.sharding, arrays)
    compiled = compile_step(step, in_shardings=(*inputs, where))
    return lambda state, batch: compiled(state, batch, arrays)
