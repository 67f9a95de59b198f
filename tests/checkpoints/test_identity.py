"""Hashes of models: what changes them, and the ids that files of earlier versions carry."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from owl_det.checkpoints import identity
from owl_det.config import ModelConfig, PreprocessConfig
from owl_det.types import LoadedModel


def _params() -> dict[str, Any]:
    return {
        "image": {
            "blocks": {
                "kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
                "bias": np.zeros(3, np.float32),
            }
        },
        "image_norm": {"scale": np.ones(1, np.float32)},
        "text": {"embedding": np.arange(4).reshape(4, 1).astype(ml_dtypes.bfloat16)},
    }


def _model(**changes: Any) -> LoadedModel:
    return LoadedModel(
        params=changes.pop("params", _params()),
        config=dataclasses.replace(ModelConfig(), **changes),
        preprocess=PreprocessConfig(),
        eval_prompts="clip_best7",
        step=3,
    )


def test_ids_of_version_0_1_are_known() -> None:
    """Computed by that version: of teachers' caches, annotation jobs, and embeddings."""
    assert identity.parameter_hash(_params()) == "6ae028dee6293612"
    assert identity.former_parameter_hash(_params()) == "cb00027703c1af18"
    assert identity.former_model_hash(_model()) == "b285ee523f96738c"


@pytest.mark.parametrize(
    "changed",
    [
        {"norm": {"scale": np.ones(1, np.float32)}},  # a name
        {"image_norm": {"scale": np.ones((1, 1), np.float32)}},  # a shape
        {"image_norm": {"scale": np.ones(1, ml_dtypes.bfloat16)}},  # a type
        {"image_norm": {"scale": np.full(1, 2, np.float32)}},  # a value
    ],
    ids=["name", "shape", "dtype", "value"],
)
def test_a_hash_changes_with_the_parameters(changed: dict[str, Any]) -> None:
    params = {k: v for k, v in _params().items() if k != "image_norm"} | changed
    assert identity.parameter_hash(params) != identity.parameter_hash(_params())
    assert identity.model_hash(_model(params=params)) != identity.model_hash(_model())


def test_a_hash_is_that_of_the_values_wherever_they_are() -> None:
    placed = {"image": {"scale": jnp.arange(3.0)}}
    transposed = {"image": {"scale": np.arange(6, dtype=np.float32)[::2] / 2}}
    assert identity.parameter_hash(placed) == identity.parameter_hash(transposed)


def test_a_model_is_its_architecture_and_not_its_execution() -> None:
    ours = identity.model_hash(_model())
    assert identity.model_hash(_model(attention="plain", remat="full", scan_unroll=2)) == ours
    assert identity.model_hash(_model(activation="gelu")) != ours
    other = dataclasses.replace(_model(), preprocess=PreprocessConfig(geometry="stretch"))
    assert identity.model_hash(other) != ours
    assert identity.model_hash(dataclasses.replace(_model(), step=4)) == ours
