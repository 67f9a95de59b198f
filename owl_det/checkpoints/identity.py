"""Identities of models: hashes that files keep of the model they were made with.

Files written before there was one formula carry other hashes; `former_parameter_hash` and
`former_model_hash` recompute those, so that these files stay readable.
"""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from owl_det import path_rules
from owl_det.config import ModelConfig
from owl_det.config.roles import keys_of
from owl_det.types import LoadedModel

# These decide how fast a model runs; of the keys of execution only dtype changes what it computes.
_SPEED = {*keys_of(ModelConfig, "execution")} - {"dtype"}


def parameter_hash(params: PyTree) -> str:
    """Sixteen hex digits that change with any value, shape, type or name of the parameters."""
    content = hashlib.sha256()
    for name, leaf in sorted(path_rules.flatten(params).items()):
        values = np.asarray(leaf)
        content.update(f"{name} {values.dtype} {values.shape}\n".encode())
        content.update(np.ascontiguousarray(values).tobytes())
    return content.hexdigest()[:16]


def model_hash(model: LoadedModel) -> str:
    """Sixteen hex digits that change with parameters, architecture and preprocessing."""
    content = json.dumps([*_settings(model), parameter_hash(model.params)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def former_parameter_hash(params: PyTree) -> str:
    """The hash of parameters that `owl-det annotate` of version 0.1 wrote into job.json."""
    content = hashlib.sha256()
    for name, leaf in path_rules.flatten(params).items():
        values = np.ascontiguousarray(leaf)
        content.update(f"{name} {values.shape} {values.dtype}".encode())
        content.update(values.tobytes())
    return content.hexdigest()[:16]


def former_model_hash(model: LoadedModel) -> str:
    """The hash of a model that embeddings and exports of version 0.1 carry."""
    content = hashlib.sha256(json.dumps(_settings(model), sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        values = np.ascontiguousarray(leaf)
        name = jax.tree_util.keystr(path)
        content.update(f"{name} {values.dtype} {values.shape}".encode())
        content.update(values.tobytes())
    return content.hexdigest()[:16]


def _settings(model: LoadedModel) -> list[dict[str, Any]]:
    """Architecture and preprocessing."""
    architecture = dataclasses.asdict(model.config)
    for key in _SPEED:
        del architecture[key]
    return [architecture, dataclasses.asdict(model.preprocess)]
