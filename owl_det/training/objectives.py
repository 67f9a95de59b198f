"""What a training learns: the losses of each `config.task`, by example.

`OBJECTIVES` is the table of tasks. An objective gives one loss an example (or tile), and says which
of them count; `gradients` takes the gradients of their mean.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32, Key, Shaped

from owl_det.assigners.assigner import assign, prediction_targets
from owl_det.assigners.pairs import Pairs, first_pairs
from owl_det.config import Config
from owl_det.distillation.branch import BranchInputs, Teachers
from owl_det.losses.total import total_loss
from owl_det.modeling.build import call, make_detector, model_params
from owl_det.modeling.random_streams import RandomStream, stream_keys
from owl_det.modeling.token_drop import gather_tokens
from owl_det.training import optim
from owl_det.types import Batch, Features, Params, Predictions, Targets

Losses = tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]  # to minimise, to log


class Examples(NamedTuple):
    """The per-image part of a step; every array has a leading axis b."""

    image: Array
    targets: Targets
    key: Array
    is_example: Array
    branch_inputs: BranchInputs | None = None  # of the batch and the teachers


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepContext:
    """What all examples of a step share, beside the parameters that learn."""

    config: Config
    num_tables: int  # the query table of the batch at hand is cut into so many
    text_key: Key[Array, ""]
    count: Int[Array, ""]  # of the examples, of all data shards, that the loss is a mean of
    teachers: Teachers | None = None  # what of them the loss reads


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


# --- detection -----------------------------------------------------------------------------------


def batch_losses(params: Params, batch: Batch, examples: Examples, context: StepContext) -> Losses:
    """Detection: queries pass through the text tower, once each, and then images meet them."""
    table = embed_query_table(params, batch.query_table, context)
    queries = gather_queries(table, batch.query_index, context.num_tables)
    return example_losses(params, examples, queries, context)


def example_losses(
    params: Params,
    examples: Examples,
    query_embeddings: Float[Array, "b q e"],
    context: StepContext,
) -> Losses:
    """Forward pass of the image side and the detection loss of each example."""
    config = context.config
    detector, held = make_detector(config), _held(params, config)
    features = call(detector.encode_image, held, examples.image, config.selection, examples.key)
    predictions = call(
        detector.predict,
        held,
        features,
        query_embeddings,
        examples.targets.is_query,
        instance_top_k=config.selection.instance_top_k,
    )
    targets = examples.targets
    assignment = assign(predictions, targets, config.loss)
    losses, parts = total_loss(
        predictions,
        targets,
        prediction_targets(assignment, targets),
        config.loss,
        config.selection,
        keys=stream_keys(examples.key, RandomStream.NEGATIVES),
    )
    pairs = first_pairs(assignment, targets.is_instance.shape[-1])
    parts["unmatched_instances"] = parts["instances"] - pairs.is_matched.sum(-1)
    if context.teachers is None:
        return losses, parts
    embedded = call(detector.class_embeddings, held, features)
    instances = _instances_for_branches(predictions, targets, pairs)
    instances["queries"] = query_embeddings
    added, more = _branch_losses(params, examples, embedded, instances, context)
    return losses + added, parts | more


def _instances_for_branches(
    predictions: Predictions, targets: Targets, pairs: Pairs
) -> dict[str, Any]:
    """What distillation branches read of the instances and the predictions that stand for them."""
    boxes = gather_tokens(predictions.boxes, pairs.prediction)
    return {
        "targets": targets,
        "instance_tokens": gather_tokens(predictions.class_embeddings, pairs.prediction),
        "instance_boxes": jax.lax.stop_gradient(boxes),
        "is_matched": pairs.is_matched,
    }


def embed_query_table(
    params: Params, tokens: Int32[Array, "u l"], context: StepContext
) -> Float[Array, "u e"]:
    """Text tower in training mode. Noise depends on the text, not on its place in the table."""
    keys = jax.vmap(lambda row: jax.random.fold_in(context.text_key, _hash(row)))(tokens)
    config = context.config
    held = optim.hold_frozen(params, config.optimizer)
    embeddings = call(make_detector(config).encode_text, held, tokens, keys)
    # The loss, and the cotangents that per-example clipping sends back, are float32.
    return embeddings.astype(jnp.float32)


def _hash(tokens: Int32[Array, " l"]) -> Array:
    """A 32-bit hash of a row of tokens."""
    multipliers = jnp.array(
        [pow(2654435761, i, 1 << 32) for i in range(1, tokens.shape[0] + 1)], jnp.uint32
    )
    mixed = jnp.sum((tokens.astype(jnp.uint32) + 1) * multipliers)
    return mixed ^ (mixed >> 15)


def gather_queries(
    table: Shaped[Array, "u e"], index: Int32[Array, "b q"], num_tables: int
) -> Shaped[Array, "b q e"]:
    """Each image's query embeddings or tokens, from the rows of its own data shard."""
    b, q = index.shape
    tables = table.reshape(num_tables, -1, table.shape[-1])
    rows = index.reshape(num_tables, b // num_tables * q)
    return jax.vmap(lambda t, i: t[i])(tables, rows).reshape(b, q, -1)


# --- distillation of towers ----------------------------------------------------------------------


def tower_losses(params: Params, batch: Batch, examples: Examples, context: StepContext) -> Losses:
    """Distillation into the tokens of an image tower, each through the visual projection."""
    del batch
    config = context.config
    features = call(
        make_detector(config).patch_features,
        _held(params, config),
        examples.image,
        config.selection,
        examples.key,
    )
    return _branch_losses(params, examples, features, {}, context)


def _branch_losses(
    params: Params,
    examples: Examples,
    features: Features,
    instances: dict[str, Any],
    context: StepContext,
) -> Losses:
    assert examples.branch_inputs is not None and context.teachers is not None
    from owl_det.distillation import step_inputs

    return step_inputs.branch_losses(
        params,
        examples.branch_inputs,
        context.teachers,
        features,
        images=examples.image,
        keys=stream_keys(examples.key, RandomStream.BRANCHES),
        config=context.config,
        instances=instances,
    )


# --- contrastive ---------------------------------------------------------------------------------


def contrastive_losses(
    params: Params, batch: Batch, examples: Examples, context: StepContext
) -> Losses:
    """Each image, or tile, against the captions of the whole global batch, and the reverse."""
    from owl_det.losses import contrastive

    assert batch.caption_tokens is not None
    config, detector = context.config, make_detector(context.config)
    held = optim.hold_frozen(params, config.optimizer)
    tokens = batch.caption_tokens.reshape(-1, batch.caption_tokens.shape[-1])
    if config.model.vit.pooling == "mean":
        arguments = batch.image, batch.tile_boxes, config.selection, examples.key
        tiles = call(detector.embed_tiles, held, *arguments)
        images = tiles.reshape(tokens.shape[0], -1)
    else:
        images = call(detector.embed_image, held, batch.image, examples.key)
    texts = embed_query_table(params, tokens, context)
    logits = call(detector.similarity, held, images, texts)
    is_same_text = (tokens[:, None] == tokens[None]).all(-1)
    is_counted = _is_captioned(batch)
    loss_of = {"softmax": contrastive.softmax_loss, "sigmoid": contrastive.sigmoid_loss}
    losses = loss_of[config.model.contrastive](logits, is_same_text, is_counted)
    return losses, {"accuracy": contrastive.accuracy(logits, is_same_text, is_counted)}


def _is_captioned(batch: Batch) -> Bool[Array, " n"]:
    """Tiles of real examples that have a caption."""
    assert batch.is_caption is not None
    return (batch.is_example[:, None] & batch.is_caption).reshape(-1)


def _held(params: Params, config: Config) -> Params:
    """The model's parameters; no gradient goes to those that are frozen."""
    return optim.hold_frozen(model_params(params), config.optimizer)


def _branches_couple_examples(config: Config) -> bool:
    if not config.distill.active():
        return False
    from owl_det.distillation import branches

    return branches.couple_examples(config.distill)


class Objective(NamedTuple):
    """What one `config.task` learns."""

    losses: Callable[[Params, Batch, Examples, StepContext], Losses]
    is_counted: Callable[[Batch], Bool[Array, " n"]]  # what the loss is a mean of
    couples_examples: Callable[[Config], bool]  # one example's loss depends on others


OBJECTIVES: dict[str, Objective] = {
    "detection": Objective(
        batch_losses,
        lambda batch: batch.is_example,
        _branches_couple_examples,
    ),
    "distill": Objective(
        tower_losses,
        lambda batch: batch.is_example,
        _branches_couple_examples,
    ),
    "contrastive": Objective(contrastive_losses, _is_captioned, lambda config: True),
}


def context_of(
    config: Config,
    batch: Batch,
    text_key: Key[Array, ""],
    *,
    num_tables: int = 1,
    teachers: Teachers | None = None,
) -> StepContext:
    """The context of a whole batch, whose query table is cut into `num_tables`."""
    count = OBJECTIVES[config.task].is_counted(batch).sum()
    return StepContext(
        config=config,
        num_tables=num_tables,
        text_key=text_key,
        count=jnp.maximum(count, 1),
        teachers=teachers,
    )
