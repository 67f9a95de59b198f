"""Optimiser: learning-rate groups by path rules, schedules, Adam and the Adafactor variant."""

import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from owl_det.config import OptimizerConfig, ScheduleConfig
from owl_det.path_rules import apply_rules, path_name


def group_rules(config: OptimizerConfig) -> list[tuple[str, str]]:
    """(path pattern → learning-rate group), first match wins."""
    return [
        *((pattern, "frozen") for pattern in config.frozen),
        ("^text/", "text"),
        *([("^image/", "image")] if config.image_learning_rate else []),
        ("", "image_and_heads"),
    ]


def groups(params: PyTree, config: OptimizerConfig) -> PyTree:
    """The learning-rate group of each parameter. Raises `ConfigError` as `apply_rules` does."""
    return apply_rules(params, group_rules(config), optional=("^text/", "^image/", ""))


def hold_frozen(params: PyTree, config: OptimizerConfig) -> PyTree:
    """The same parameters, those of the frozen group without a gradient.

    Their gradients would cost time, and would count in the norms that clipping looks at.
    """

    def hold(path: Sequence[Any], leaf: Any) -> Any:
        is_frozen = any(re.search(pattern, path_name(path)) for pattern in config.frozen)
        return jax.lax.stop_gradient(leaf) if is_frozen else leaf

    return jax.tree_util.tree_map_with_path(hold, params)


def schedule(config: ScheduleConfig, num_steps: int) -> Callable[[Any], Any]:
    """Factor on the learning rate at each step: warm-up × decay × cooldown, in [0, 1].

    `cosine` falls to 0 at `num_steps` (OWL-ViT); `inverse_sqrt` is √(timescale / max(step,
    timescale)) (OWLv2; Zhai et al. 2022), which may be cooled down linearly from any checkpoint.
    """

    def factor(step: Any) -> Any:
        step = jnp.asarray(step, jnp.float32)
        value = jnp.minimum(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        if config.kind == "cosine":
            start = float(config.warmup_steps)
            progress = jnp.clip((step - start) / max(num_steps - start, 1.0), 0.0, 1.0)
            value *= 0.5 * (1 + jnp.cos(jnp.pi * progress))
        if config.kind == "inverse_sqrt":
            value *= jnp.sqrt(config.timescale / jnp.maximum(step, config.timescale))
        if config.cooldown_steps:
            value *= jnp.clip((num_steps - step) / config.cooldown_steps, 0.0, 1.0)
        return value

    return factor


def build(
    config: OptimizerConfig, schedule_config: ScheduleConfig, num_steps: int
) -> optax.GradientTransformation:
    """One transformation per learning-rate group; clipping is not in here (see train_step)."""
    factor = schedule(schedule_config, num_steps)

    def group(learning_rate: float) -> optax.GradientTransformation:
        steps = [_direction(config)]
        if config.weight_decay:
            steps.append(optax.add_decayed_weights(config.weight_decay, mask=_is_decayed))
        steps.append(optax.scale_by_learning_rate(lambda step: learning_rate * factor(step)))
        return optax.chain(*steps)

    transforms: dict[Hashable, optax.GradientTransformation] = {
        "image_and_heads": group(config.learning_rate),
        "text": group(config.text_learning_rate),
        "frozen": optax.set_to_zero(),
    }
    if config.image_learning_rate:
        transforms["image"] = group(config.image_learning_rate)
    return optax.partition(
        transforms,
        lambda params: groups(params, config),
    )


def _is_decayed(params: PyTree) -> PyTree:
    """Weight decay spares gains and biases (CLIP, arXiv 2103.00020, section 2.5)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: re.search(r"(scale|bias)$", path_name(path)) is None, params
    )


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    if config.kind == "adam":
        return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon)
    if config.kind == "adafactor":
        return adafactor_direction(config.b1, config.b2)
    return optax.identity()


def adafactor_direction(momentum: float, b2_cap: float) -> optax.GradientTransformation:
    """The Adafactor variant of Zhai et al. 2022 (arXiv 2106.04560, section 3.4).

    Factored second moments whose decay 1 − t^−0.8 is capped at `b2_cap`, updates clipped to unit
    root mean square, and a first moment in bfloat16. No relative step sizes. Second moments of
    stacked layers are factored within each layer, never over the layer axis.
    """

    def capped_decay(step: Any, exponent: Any) -> Any:
        return jnp.minimum(b2_cap, 1 - (step + 1.0) ** -exponent)

    second_moment = optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=0.8,
            min_dim_size_to_factor=32,
            epsilon=1e-30,
            decay_rate_fn=capped_decay,
        ),
        optax.clip_by_block_rms(1.0),
    )
    return optax.chain(
        optax.partition(
            {"stacked": _per_layer(second_moment), "single": second_moment},
            lambda params: apply_rules(
                params, [("/blocks/", "stacked"), ("", "single")], optional=("/blocks/", "")
            ),
        ),
        optax.ema(momentum, debias=False, accumulator_dtype=jnp.bfloat16),
    )


def _per_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `inner` on each slice of the leading axis, as if layers were separate parameters."""

    def init(params: PyTree) -> PyTree:
        return jax.tree.map(lambda p: jax.vmap(lambda x: inner.init({"x": x}))(p), params)

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[Any, Any]:
        def one(gradient: Any, leaf_state: Any) -> Any:
            return jax.vmap(lambda g, s: inner.update({"x": g}, s, {"x": g}))(gradient, leaf_state)

        leaves, tree = jax.tree.flatten(updates)
        results = [one(g, s) for g, s in zip(leaves, tree.flatten_up_to(state), strict=True)]
        new_updates = tree.unflatten([result[0]["x"] for result in results])
        return new_updates, tree.unflatten([result[1] for result in results])

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]
