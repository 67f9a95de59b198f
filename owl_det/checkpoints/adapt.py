"""The start of a training from the parameters of another model."""

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import PyTree

from owl_det import path_rules
from owl_det.checkpoints import arrays
from owl_det.checkpoints.image_size import resize_positions
from owl_det.config import Config, ModelConfig
from owl_det.config.roles import keys_of
from owl_det.errors import CheckpointError
from owl_det.modeling import build
from owl_det.modeling.towers import TOWERS, without_contrastive
from owl_det.types import LoadedModel, Params


def adapt(loaded: LoadedModel, config: Config) -> Params:
    """Parameters of another run, or towers alone, as the start of this one.

    Position grids are resized linearly, and the first of more text positions are taken (not of a
    text tower that pools at the last). Contrastive parameters that the config has no use for are
    left out; heads that towers lack are made from `config.seed`, as the authors do: CLIP's visual
    projection is dropped and the class head starts from random numbers.

    With `checkpoint.class_head_from_projection` the class head's embedding starts from the towers'
    visual projection instead, its bias from the projection's or from zeros. In towers without a
    class token the class embeddings are then those of `Detector.embed_patches`. Where the class
    token is merged into the tokens, the projection reads norm(token · class token), which it has
    not seen in contrastive training: it starts in the right space, not with the right values.

    What `checkpoint.fresh` names comes from `config.seed` too. A tower all of whose parameters it
    names may have another architecture than the checkpoint's.

    Any other difference raises `CheckpointError` with the first parameter or setting that does not
    fit, as do towers without a visual projection where it is asked for.
    """
    where = f"{config.checkpoint.init_from} (config.checkpoint.init_from)"
    _check_can_start(loaded, config, where)
    target = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    is_fresh = _is_fresh(target, config.checkpoint.fresh)
    anew = [name for name, part in is_fresh.items() if all(jax.tree.leaves(part))]
    keeps_heads = loaded.kind == "detector" and not {*target} <= {*TOWERS, *anew}
    _check_same_architecture(loaded.config, config.model, where, anew, keeps_heads)
    # Towers have no heads, which are made below; a detector may lack the objectness head.
    theirs = {*TOWERS, *loaded.params} if loaded.kind == "towers" else {*target}
    params = loaded.params | {name: target[name] for name in anew if name in theirs}
    params = _with_positions(params, target, config, anew)
    if config.model.contrastive == "none":
        params = _bare(params)
    if loaded.kind == "towers":
        arrays.compare(params, build.towers_of(target), where)
        params |= _fresh_heads(config)
    if config.checkpoint.class_head_from_projection:
        projection = loaded.params["image"]["visual_projection"]
        params["class_head"] = _with_projection(params["class_head"], projection)
    arrays.compare(params, target, where)
    return _with_fresh(params, is_fresh, config)


def _check_can_start(loaded: LoadedModel, config: Config, where: str) -> None:
    """Raises `CheckpointError` for a kind of model that the config cannot start from."""
    if loaded.is_resnet:
        raise CheckpointError(f"{where}: a ResNet is a teacher; no detector starts from it")
    if not config.checkpoint.class_head_from_projection:
        return
    if loaded.kind != "towers":
        raise CheckpointError(
            f"{where}: a {loaded.kind} has a class head of its own; unset "
            "config.checkpoint.class_head_from_projection"
        )
    if "visual_projection" not in loaded.params["image"]:
        raise CheckpointError(
            f"{where}: these towers have no visual projection; unset "
            "config.checkpoint.class_head_from_projection"
        )


def _check_same_architecture(
    theirs: ModelConfig, ours: ModelConfig, where: str, anew: Sequence[str], has_heads: bool
) -> None:
    """Raises `CheckpointError` for a setting that no parameter's shape shows and that differs.

    Towers of `anew` and, without `has_heads`, those of the heads are not compared.
    """
    keys = list(keys_of(ModelConfig, "architecture", is_compared=True, part=""))
    if has_heads:
        keys += keys_of(ModelConfig, "architecture", is_compared=True, part="head")
    for key in keys:
        a, b = (operator.attrgetter(key)(model) for model in (theirs, ours))
        if a != b and key.partition(".")[0] not in anew:
            raise CheckpointError(
                f"{where}: another architecture; model.{key} is {a!r} there and {b!r} in the "
                "config; set config.checkpoint.model_from_init to take the checkpoint's"
            )


def _is_fresh(target: PyTree, patterns: tuple[str, ...]) -> PyTree:
    """Which parameters start anew. Raises `ConfigError` for a pattern that fits none."""
    rules = [*((pattern, True) for pattern in patterns), ("", False)]
    return path_rules.apply_rules(target, rules, optional=("",))


def _with_positions(params: Params, target: PyTree, config: Config, anew: Sequence[str]) -> Params:
    """The parameters with as many positions of images and texts as the target has."""
    image, text = dict(params["image"]), dict(params["text"])
    if "image" not in anew:
        num_positions = target["image"]["position_embedding"].shape[0]
        image["position_embedding"] = resize_positions(image["position_embedding"], num_positions)
    if "text" not in anew and config.model.text.pooling == "end_token":
        num_positions = target["text"]["position_embedding"].shape[0]
        text["position_embedding"] = text["position_embedding"][:num_positions]
    return {**params, "image": image, "text": text}


def _bare(params: Params) -> Params:
    """The parameters without those of contrastive training alone."""
    params, dropped = without_contrastive(params)
    if dropped:
        logging.info(
            "Left out: %s, which only contrastive training uses (config.model.contrastive is none)",
            ", ".join(dropped),
        )
    return params


def _fresh_heads(config: Config) -> Params:
    def heads() -> Params:
        params = build.init_params(config, jax.random.key(config.seed))
        return {name: value for name, value in params.items() if name not in TOWERS}

    made = jax.jit(heads)()
    logging.info("Towers loaded; freshly initialised: %s", ", ".join(sorted(made)))
    return made


def _with_projection(class_head: Params, projection: Params) -> Params:
    """The head with the projection's kernel and bias (zeros, if it has none) as its embedding."""
    kernel = projection["kernel"]
    bias = projection.get("bias", jnp.zeros(kernel.shape[1], kernel.dtype))
    logging.info("The class head starts from the visual projection %s", kernel.shape)
    return {**class_head, "embedding": {"kernel": kernel, "bias": bias}}


def _with_fresh(params: Params, is_fresh: PyTree, config: Config) -> Params:
    if not any(jax.tree.leaves(is_fresh)):
        return params
    made = jax.jit(lambda: build.init_params(config, jax.random.key(config.seed)))()
    logging.info("Freshly initialised: %s", ", ".join(config.checkpoint.fresh))
    return jax.tree.map(lambda old, new, fresh: new if fresh else old, params, made, is_fresh)
