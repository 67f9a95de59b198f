"""What every converter of models needs: checked configs, parameters by path, whole models."""

import dataclasses
from typing import Any

import jax

from owl_det import path_rules
from owl_det.config import Config, ModelConfig, PreprocessConfig
from owl_det.config.resolve import resolve_model
from owl_det.convert import rules
from owl_det.convert.rules import Table
from owl_det.convert.weights import Weights
from owl_det.errors import CheckpointError, ConfigError
from owl_det.modeling import build
from owl_det.types import LoadedModel

# How the authors evaluate every published detector.
EVAL_PROMPTS = "clip_best7"
# Beyond these the number of positions overflows before shapes can be compared with the file's.
MAX_IMAGE_SIZE, MAX_SIZE = 2**14, 2**20


def resolve(
    model: dict[str, Any], preprocess: dict[str, Any], where: str
) -> tuple[ModelConfig, PreprocessConfig]:
    """Checked configs. Raises `CheckpointError`, naming `where`, for values that cannot be."""
    try:
        checked, pixels = resolve_model(model, preprocess)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    tree = dataclasses.asdict(checked)
    _check_size(where, "model.image_size", tree.pop("image_size"), MAX_IMAGE_SIZE)
    for name in ("image", "text"):
        for key, value in tree[name].items():
            _check_size(where, f"model.{name}.{key}", value, MAX_SIZE)
    _check_size(where, "model.embedding_dim", tree["embedding_dim"], MAX_SIZE)
    return checked, pixels


def _check_size(where: str, key: str, value: Any, limit: int) -> None:
    if isinstance(value, int) and value > limit:
        raise CheckpointError(f"{where}: {key} {value} is absurdly large; the limit is {limit}")


def read(
    table: Table, weights: Weights, model: ModelConfig, preprocess: PreprocessConfig
) -> LoadedModel:
    """The model with the weights that the table finds. Raises `CheckpointError` as `rules` does."""
    parameters = rules.to_ours(table, weights, parameter_shapes(model, preprocess))
    return LoadedModel(
        params=path_rules.unflatten(parameters),
        config=model,
        preprocess=preprocess,
        eval_prompts=EVAL_PROMPTS,
        step=0,
    )


def parameter_shapes(
    model: ModelConfig, preprocess: PreprocessConfig
) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its path; nothing is allocated."""
    config = Config(model=model, preprocess=preprocess)
    template = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    return {name: tuple(leaf.shape) for name, leaf in path_rules.flatten(template).items()}
