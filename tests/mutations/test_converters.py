"""Models of other programs, mutated: their configs, their tensors, what lies beside them.

Every value of a model that is read stands in a tensor of the file, and every tensor was used.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np
import pytest

from owl_det import path_rules
from owl_det.checkpoints.load import parameter_shapes
from owl_det.config.resolve import resolve_model
from owl_det.convert import clip, formats, models, siglip, towers
from owl_det.convert.rules import LAYER, Rule
from owl_det.types import LoadedModel
from tests.convert import hf_folder, test_lit, test_scenic
from tests.mutations import harness, raw, trees, weight_files
from tests.mutations.harness import Case

_FORMATS = ("owlvit", "owlv2", "clip", "siglip", "scenic", "lit")
_VOCABULARY = 40  # of every text tower: that of CLIP has megabytes


@pytest.fixture(autouse=True)
def shapes_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly all inputs have one of a few architectures, and tracing one takes half a second."""
    monkeypatch.setattr(towers, "parameter_shapes", remembered(parameter_shapes))
    monkeypatch.setattr(models, "parameter_shapes", remembered(models.parameter_shapes))


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    made: dict[str, Any] = {}

    def call(*arguments: Any) -> Any:
        key = repr(arguments)
        if key not in made:
            made[key] = function(*arguments)
        return made[key]

    return call


@harness.counts(some=20)
def test_mutated_models(count: int, tmp_path: Path) -> None:
    harness.check(_case, count, tmp_path / "data")


def test_the_unmutated_are_read_whole(tmp_path: Path) -> None:
    for kind in _FORMATS:
        tensors, files = _good(kind)
        case = _written(kind, tensors, files, tmp_path / kind)
        harness.read_and_verify(case)


def _reproduce(seed: int) -> Any:
    return harness.reproduce(_case, seed)


def _case(rng: np.random.Generator, folder: Path) -> Case:
    kind = trees.pick(rng, _FORMATS)
    tensors, files = _good(kind)
    for _ in range(rng.integers(1, 4)):
        if files and rng.random() < 0.7:
            name = trees.pick(rng, list(files))
            files[name] = trees.mutated(files[name], rng)
        else:
            tensors = _mutated_tensors(tensors, rng)
    texts = {name: trees.as_json(tree, rng).encode() for name, tree in files.items()}
    if texts and rng.random() < 0.1:
        name = trees.pick(rng, list(texts))
        texts[name] = raw.mutated(texts[name], rng)
    return _written(kind, tensors, texts, folder)


def _mutated_tensors(
    tensors: dict[str, np.ndarray], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """One tensor goes, comes, or changes its name, shape, type or values."""
    made = dict(tensors)
    name = trees.pick(rng, list(made))
    value = made[name]
    kind = trees.pick(rng, ("drop", "add", "rename", "shape", "dtype", "values", "other"))
    if kind == "drop":
        del made[name]
    elif kind == "add":
        made[trees.pick(rng, _ADDED)] = value
    elif kind == "rename":
        made[trees.pick(rng, (*_ADDED, name.upper(), f"x.{name}", name[:-1]))] = made.pop(name)
    elif kind == "shape":
        options = (
            value.T,
            value.ravel(),
            value[None],
            value[:0] if value.ndim else value,
            value[..., None],
        )
        made[name] = np.ascontiguousarray(trees.pick(rng, options))
    elif kind == "dtype":
        made[name] = value.astype(trees.pick(rng, (np.float16, np.int64, bool, np.float32)))
    elif kind == "values":
        made[name] = np.where(
            rng.random(value.shape) < 0.5,
            np.float32(trees.pick(rng, (np.nan, np.inf, 1e30))),
            value,
        )
    else:
        made[name] = made[trees.pick(rng, list(made))]
    return made


_ADDED = (
    "a/b",
    "text_model.embeddings.position_ids",
    "class_head/padding",
    "box_bias",
    "b",
    "img/cls",
)
_ADDED += ("logit_scale", "params", "vision_model.encoder.layers.2.mlp.fc1.weight", "", "é")


def _written(
    kind: str, tensors: dict[str, np.ndarray], files: dict[str, Any], folder: Path
) -> Case:
    folder.mkdir(parents=True, exist_ok=True)
    source = folder
    if kind == "scenic":
        source = folder / "model.msgpack"
        # A name cannot be a tensor and a folder of tensors.
        folders = {str(place) for name in tensors for place in PurePosixPath(name).parents}
        tree = weight_files.nested({k: v for k, v in tensors.items() if k and k not in folders})
        source.write_bytes(weight_files.serialization.msgpack_serialize(tree))
    elif kind == "lit":
        source = folder / "model.npz"
        with source.open("wb") as file:
            np.savez(file, **{name or "_": value for name, value in tensors.items()})  # pyright: ignore[reportArgumentType]
    else:
        content = weight_files.safetensors(tensors, np.random.default_rng(0), mutations=0)
        (folder / "model.safetensors").write_bytes(content)
    for name, text in files.items():
        content = text if isinstance(text, bytes) else json.dumps(text).encode()
        (folder / name).write_bytes(content)
    if kind in ("siglip", "lit"):
        (folder / "spiece.model").write_bytes(b"pieces")
    read = formats.readers()["hf" if kind.startswith("owl") else kind]

    def verify(model: LoadedModel, lines: list[str]) -> None:
        is_whole = not any("left out" in line for line in lines)
        # Scenic's file holds the optimiser's state beside the parameters.
        given = [v for k, v in tensors.items() if kind != "scenic" or k.startswith("params/")]
        expected = sum(float(np.sum(np.asarray(value, np.float64))) for value in given)
        found = sum(float(np.sum(np.asarray(x, np.float64))) for x in jax.tree.leaves(model.params))
        tolerance = 1e-4 * max(1.0, abs(expected))
        assert not is_whole or abs(found - expected) <= tolerance, "values are lost"

    return Case(read=lambda: read(str(source)), verify=verify, names=[str(folder)])


# --- good models ---------------------------------------------------------------------------------


def _good(kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors by name, and the JSON files beside them."""
    tensors, files = _made(kind)
    return dict(tensors), json.loads(json.dumps(files))


@functools.cache
def _made(kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if kind in ("owlvit", "owlv2"):
        tensors = hf_folder.tensors(kind)
        embedding = f"{kind}.text_model.embeddings.token_embedding.weight"
        tensors[embedding] = tensors[embedding][:_VOCABULARY]
        config = hf_folder.config(kind)
        config["text_config"]["vocab_size"] = _VOCABULARY
        return tensors, _configs(config, hf_folder.processor(kind))
    if kind == "scenic":
        tree = test_scenic.parameters(True)
        embedding = tree["backbone"]["clip"]["text"]["token_embedding"]
        embedding["embedding"] = embedding["embedding"][:_VOCABULARY]
        leaves = jax.tree_util.tree_leaves_with_path({"params": tree})
        return {path_rules.path_name(path): np.asarray(leaf) for path, leaf in leaves}, {}
    if kind == "lit":
        return test_lit._file(pooling="map", has_head=False, has_bias=True), {}
    return _towers(kind)


def _configs(config: Any, processor: Any) -> dict[str, Any]:
    return {"config.json": config, "preprocessor_config.json": processor}


def _towers(kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A `CLIPModel` or `SiglipModel`: the tensors that its table names."""
    is_clip = kind == "clip"
    heads = {"num_attention_heads": 2}
    image = {"patch_size": 8, "width": 16, "num_layers": 2, "num_heads": 2, "mlp_width": 24}
    text = {"width": 8, "num_layers": 2, "num_heads": 2, "mlp_width": 20, "num_positions": 6}
    text["vocabulary_size"] = _VOCABULARY
    clip_only = {"contrastive": "softmax", "embedding_dim": 12, "image": image, "text": text}
    siglip_only = {
        "contrastive": "sigmoid",
        "embedding_dim": 16,
        "image": image
        | {"pooling": "map", "pre_norm": False, "patch_bias": True, "projection": "none"},
        "text": text | {"is_causal": False, "pooling": "last", "projection_bias": True},
    }
    model = {"image_size": 32, **(clip_only if is_clip else siglip_only)}
    checked, preprocess = resolve_model(model, {})
    described = LoadedModel(
        kind="towers", params={}, config=checked, preprocess=preprocess, eval_prompts="none", step=0
    )
    leaves = jax.tree_util.tree_leaves_with_path(parameter_shapes(described))
    shapes = {path_rules.path_name(path): leaf.shape for path, leaf in leaves}
    config = {"model_type": kind, "vision_config": dict(heads), "text_config": dict(heads)}
    table = clip.TABLE if is_clip else siglip.TABLE
    return _their_tensors(table.rules, shapes), _configs(config, {"image_mean": [0.5, 0.5, 0.5]})


def _their_tensors(
    rules: Sequence[Rule], shapes: dict[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {}
    for rule in rules:
        shape = shapes[rule.ours]
        num_layers = shape[rule.index.index(LAYER)] if LAYER in rule.theirs else 1
        for layer in range(num_layers):
            index = tuple(layer if item == LAYER else item for item in rule.index)
            slot = np.empty(shape)[index].shape
            theirs = _their_shape(rule, slot)
            made[rule.theirs.replace(LAYER, str(layer))] = rng.normal(size=theirs).astype(
                np.float32
            )
    return made


def _their_shape(rule: Rule, slot: tuple[int, ...]) -> tuple[int, ...]:
    """PyTorch's shape of what fills a slot; one side of a kernel may be split into heads."""
    size = int(np.prod(slot))
    if rule.layout == "linear":
        inputs = int(np.prod(slot[:-1])) if rule.ours.endswith("out/kernel") else slot[0]
        return size // inputs, inputs
    if rule.layout == "conv":
        return slot[3], slot[2], slot[0], slot[1]
    return (size,) if rule.layout == "flat" else slot
