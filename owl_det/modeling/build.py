"""The model of a config: its module, fresh parameters, and which of them are the model's."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Key

from owl_det.config import Config, ModelConfig, PreprocessConfig
from owl_det.modeling.family import Detector
from owl_det.modeling.owl import OwlDetector
from owl_det.modeling.towers import TOWERS
from owl_det.types import Params

_P = ParamSpec("_P")
_T = TypeVar("_T")

# The detector families, by `model.family`: a new one is a row here and its files.
FAMILIES: dict[str, Callable[[ModelConfig, PreprocessConfig], Detector]] = {"owl": OwlDetector}

BRANCHES = "distill"  # where branch parameters are in a training's; no detector has them


def make_detector(config: Config) -> Detector:
    return detector_of(config.model, config.preprocess)


def detector_of(model: ModelConfig, preprocess: PreprocessConfig) -> Detector:
    """The detector of `model.family`; `FAMILIES` is the table."""
    return FAMILIES[model.family](model, preprocess)


def call(
    method: Callable[_P, _T], params: Params, *arguments: _P.args, **keywords: _P.kwargs
) -> _T:
    """A module's method with these parameters: `call(detector.encode_text, params, tokens)`."""
    module = cast(nn.Module, getattr(method, "__self__"))  # noqa: B009  a bound method
    return cast(_T, module.apply({"params": params}, *arguments, method=method, **keywords))


def init_params(config: Config, key: Key[Array, ""]) -> Params:
    """Freshly initialised parameters; without heads where the task trains towers alone."""
    side, length = config.model.image_size, config.model.text.num_positions
    variables = cast(nn.Module, make_detector(config)).init(
        key,
        jnp.zeros((1, side, side, 3), jnp.uint8),
        jnp.zeros((1, 1, length), jnp.int32),
        jnp.ones((1, 1), bool),
    )
    params = cast(Params, variables["params"])
    return params if config.has_heads else towers_of(params)


def towers_of(params: Params) -> Params:
    """The parameters of towers alone, without heads."""
    return {name: value for name, value in params.items() if name in TOWERS}


def model_params(params: Params) -> Params:
    """The parameters without those of branches: what inference and checkpoints hold."""
    return {name: value for name, value in params.items() if name != BRANCHES}
