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

from owl_det import files, path_rules
from owl_det.config import ModelConfig, ResNetConfig, digest
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
    settings = [_without_defaults(x) for x in (model.config, model.preprocess)]
    content = json.dumps([*settings, parameter_hash(model.params)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def settings_hash(model: LoadedModel) -> str:
    """Twelve hex digits that change with architecture, preprocessing and the tokeniser's file."""
    settings = [_without_defaults(x) for x in (model.config, model.preprocess)]
    return digest([*settings, _tokenizer_hash(model)])


def former_parameter_hash(params: PyTree) -> str:
    """The hash of parameters that `owl-det annotate` of version 0.1 wrote into job.json."""
    content = hashlib.sha256()
    for name, leaf in path_rules.flatten(params).items():
        values = np.ascontiguousarray(leaf)
        content.update(f"{name} {values.shape} {values.dtype}".encode())
        content.update(values.tobytes())
    return content.hexdigest()[:16]


def former_settings_hash(model: LoadedModel) -> str:
    """The hash of a model's settings that `owl-det annotate` of version 0.1 wrote into job.json."""
    return digest([*_former_settings(model), _tokenizer_hash(model)])


def _tokenizer_hash(model: LoadedModel) -> str:
    content = files.read_bytes(model.tokenizer) if model.tokenizer else b""
    return hashlib.sha256(content).hexdigest()


def former_model_hash(model: LoadedModel) -> str:
    """The hash of a model that embeddings and exports of version 0.1 carry."""
    config, preprocess = _former_settings(model)
    kept = {key: value for key, value in config.items() if key not in _SPEED}
    content = hashlib.sha256(json.dumps([kept, preprocess], sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        values = np.ascontiguousarray(leaf)
        name = jax.tree_util.keystr(path)
        content.update(f"{name} {values.dtype} {values.shape}".encode())
        content.update(values.tobytes())
    return content.hexdigest()[:16]


def _without_defaults(section: Any) -> dict[str, Any]:
    """What a section sets, without keys of speed: a key that is added later changes no hash."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if field.name in _SPEED or value == _default(field):
            continue
        found[field.name] = _without_defaults(value) if _is_section(value) else value
    return found


def _default(field: dataclasses.Field[Any]) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _is_section(value: Any) -> bool:
    return dataclasses.is_dataclass(value)


def _former_settings(model: LoadedModel) -> list[dict[str, Any]]:
    """Architecture and preprocessing as version 0.1 wrote them: no family, and no kind of tower."""
    settings = dataclasses.asdict(model.config)
    del settings["family"]
    # An embedding or export is of a detector, which never has a ResNet; its defaults stood there.
    settings["resnet"] = dataclasses.asdict(ResNetConfig())
    for tower in ("image", "resnet"):
        del settings[tower]["kind"]
    return [settings, dataclasses.asdict(model.preprocess)]
