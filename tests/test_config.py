"""Configs: what is refused, and that every shipped one trains in shape."""

import dataclasses
import importlib
import json
from typing import Any

import jax
import numpy as np
import pytest

from owl_det import config as config_lib
from owl_det import sharding
from owl_det.config import MeshConfig, ModelConfig
from owl_det.config.resolve import check_attention, data_source, resolve, section
from owl_det.config.roles import keys_of
from owl_det.errors import ConfigError
from owl_det.modeling import build
from owl_det.training import step_shapes, train_step

NAMES = (
    *("quickstart", "selftrain_shapes", "bccd", "finetune"),
    *("owlvit_b32", "owlvit_b16", "owlvit_l14", "owlv2_b16", "owlv2_l14"),
    *("pretrain_clip_b16", "pretrain_siglip_b16", "pretrain_lit_b16"),
)
SOURCE = {"train": {"a": {"kind": "shapes_world"}}}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"modle": {}}, r"config.modle: no such key; did you mean config.model\?"),
        ({"batch_size": "8"}, "config.batch_size: expected int, got str"),
        ({"batch_size": None}, "config.batch_size: expected int, got NoneType"),
        ({"batch_size": True}, "config.batch_size: expected int, got bool"),
        ({"optimizer": {"kind": "lion"}}, "config.optimizer.kind: 'lion' is not one of"),
        ({"optimizer": {"kind": np.zeros(3)}}, r"config.optimizer.kind: array\(.* is not one of"),
        ({"data": {"train": {"a": {"kind": "webset"}}}}, "config.data.train.a.kind"),
        ({"data": {"augment": {"mosaic_sizes": [1, 2]}}}, "mosaic_probabilities"),
        ({"model": {"image": {"num_heads": 7}}}, "config.model.image.num_heads"),
        ({"model": {"image": "vit"}}, "config.model.image: expected a group of keys, got str"),
        ({"model": {"image": {"kind": "resnet", "pre": 1}}}, "no such key; known of kind resnet:"),
        ({"optimizer": {"learning_rate": float("nan")}}, "learning_rate: expected a finite"),
        ({"num_steps": 0}, "config.num_steps"),
        ({"optimizer": {"clip": {"microbatch": 0}}}, "clip.microbatch: must be positive"),
        ({"optimizer": {"clip": {"norm": -1.0}}}, "clip.norm: must be positive"),
        (
            {"model": {"has_objectness_head": False}, "selection": {"instance_top_k": 3}},
            "config.selection.instance_top_k: needs config.model.has_objectness_head",
        ),
        ({"preprocess": {"pad_value": 2}}, "config.preprocess.pad_value"),
        ({"model": {"text": {"num_heads": 0}}}, "config.model.text.num_heads: must be positive"),
        ({"model": {"image": {"patch_size": 0}}}, "config.model.image.patch_size: must be pos"),
        ({"preprocess": {"mean": [0.5]}}, "config.preprocess.mean: three numbers"),
        ({"preprocess": {"std": [0.2, 0.0, 0.2]}}, "config.preprocess.std: must be positive"),
        ({"preprocess": {"mean": 0.5}}, "config.preprocess.mean: expected a list, got float"),
        ({"mesh": {"data": -1, "fsdp": -1}}, "config.mesh: only one axis may be -1"),
        (
            {"data": {**SOURCE, "batch_negatives": True, "min_queries": 100}},
            "config.data.batch_negatives: min_queries 100 leaves no room",
        ),
        ({"checkpoint": {"class_head_from_projection": True}}, "needs towers in config.checkpoint"),
        ({"data": {"train": {}}}, "config.data.train: name at least one source"),
    ],
)
def test_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve({"data": SOURCE, **tree} if "data" not in tree else tree)


def test_lists_and_integers_are_taken_for_tuples_and_floats() -> None:
    config = resolve(
        {"data": SOURCE, "preprocess": {"mean": [0, 0, 0]}, "optimizer": {"learning_rate": 1}}
    )
    assert config.preprocess.mean == (0.0, 0.0, 0.0)
    assert config.optimizer.learning_rate == 1.0


def test_json_round_trip() -> None:
    config = resolve({"data": SOURCE, "seed": 3})
    assert resolve(json.loads(config_lib.to_json(config))) == config


def _load(name: str) -> Any:
    return importlib.import_module(f"configs.{name}").get_config()


# Of each task one by default; all are resolved by default in test_configs.
_BY_DEFAULT = ("quickstart", "owlv2_b16", "pretrain_siglip_b16")


@pytest.mark.parametrize(
    "name",
    [name if name in _BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
)
def test_full_train_step_has_shapes(name: str) -> None:
    tree = _load(name)
    for key in ("batch_size", "num_steps"):
        assert isinstance(tree[key], int)
    assert isinstance(tree.data.path, str)
    config = resolve(tree.to_dict())
    state = jax.eval_shape(lambda: train_step.init_state(config))
    after, metrics = jax.eval_shape(
        lambda s, b: train_step.train_step(s, b, config=config, num_data_shards=1),
        state,
        step_shapes.batch_shapes(config),
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics["loss"].shape == ()
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharding.parameter_shardings(state.params, mesh)


@pytest.mark.parametrize(
    ("name", "published"),
    [("owlvit_b32", 87_849_216), ("owlvit_b16", 86_192_640), ("owlvit_l14", 303_966_208)],
)
def test_image_towers_have_the_size_of_clip(name: str, published: int) -> None:
    """CLIP's visual towers at 224 px without their projection, as its model files hold them."""
    config = resolve(_load(name).to_dict())
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, image_size=224))
    params = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    width = config.model.image.width
    projection = width * config.model.embedding_dim
    count = sum(x.size for x in jax.tree.leaves(params["image"]))
    assert count == published - projection


def test_config_files_are_locked() -> None:
    tree = _load("quickstart")
    with pytest.raises((AttributeError, KeyError)):
        tree.batchsize = 3
    with pytest.raises(TypeError):
        tree.batch_size = "many"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (
            {"data": {"train": {"pairs": {"kind": "image_text"}}}},
            "data.train.pairs: image-text pairs have no boxes",
        ),
        ({"evaluation": {"top_k": -1}}, "evaluation.top_k"),
        ({"checkpoint": {"keep": -1}}, "checkpoint.keep"),
        ({"data": {**SOURCE, "num_workers": -1}}, "data.num_workers"),
        ({"optimizer": {"frozen": ("(",)}}, "optimizer.frozen"),
        ({"seed": -1}, "seed"),
        ({"optimizer": {"learning_rate": -1.0}}, "optimizer.learning_rate"),
        ({"schedule": {"timescale": 0}}, "schedule.timescale"),
        ({"model": {"image": {"droplayer_rate": 20.0}}}, "model.image.droplayer_rate"),
        ({"data": {**SOURCE, "augment": {"crop_probability": 50.0}}}, "data.augment.crop_prob"),
        ({"checkpoint": {"image_size": 512}}, "checkpoint.image_size"),
        ({"model": {"class_prior": 0.0}}, "model.class_prior"),
        ({"model": {"class_initial_scale": 0.0}}, "model.class_initial_scale"),
        ({"model": {"scan_unroll": 0}}, "model.scan_unroll"),
        ({"model": {"norm_epsilon": -1e-5}}, "model.norm_epsilon"),
        ({"model": {"merge_norm_epsilon": 1.0}}, "model.merge_norm_epsilon"),
        ({"loss": {"class_weight": 1e39}}, "loss.class_weight: expected a finite number"),
        (
            {"data": {"train": {"a": {"kind": "shapes_world", "image_size": 0}}}},
            "data.train.a.image_size",
        ),
    ],
)
def test_values_out_of_range_are_named(changes: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=f"config.{key}"):
        resolve({"data": SOURCE, **changes})


def _leaves(schema: Any, prefix: str = "") -> list[str]:
    found = []
    for field in dataclasses.fields(schema):
        value = getattr(schema, field.name)
        name = f"{prefix}{field.name}"
        found += _leaves(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]
    return found


def test_every_key_of_the_model_has_one_role() -> None:
    roles = [set(keys_of(ModelConfig, role)) for role in ("architecture", "training", "execution")]
    assert sorted(key for role in roles for key in role) == sorted(_leaves(ModelConfig()))
    architecture, training, execution = roles
    assert execution == {"dtype", "attention", "remat", "scan_unroll"}
    towers = ("image.droplayer_rate", "image.dropout_rate", "image.position_init")
    towers += ("text.droplayer_rate", "text.dropout_rate")
    assert training == {"contrastive", "class_prior", "class_initial_scale", *towers}
    heads = {"has_objectness_head", "head_activation", "merge_norm_epsilon", "box_bias"}
    assert set(keys_of(ModelConfig, "architecture", part="head")) == heads <= architecture


def test_a_section_is_checked_alone() -> None:
    model = section(ModelConfig, {"image_size": 64}, "config.model")
    assert model == ModelConfig(image_size=64)
    with pytest.raises(ConfigError, match="config.model.image_size: not a multiple"):
        section(ModelConfig, {"image_size": 63}, "config.model")
    with pytest.raises(ConfigError, match="--source.kind: 'webset' is not one of"):
        data_source({"kind": "webset"}, "--source")
    with pytest.raises(ConfigError, match="--source.annotated_fraction: must be in"):
        data_source({"kind": "shapes_world", "annotated_fraction": 2.0}, "--source")


def test_attention_of_a_gpu_is_asked_of_gpus_in_bfloat16() -> None:
    check_attention(ModelConfig(), "cpu")
    check_attention(ModelConfig(attention="cudnn", dtype="bfloat16"), "gpu")
    with pytest.raises(ConfigError, match="cudnn needs an NVIDIA GPU"):
        check_attention(ModelConfig(attention="cudnn", dtype="bfloat16"), "cpu")
    with pytest.raises(ConfigError, match="set config.model.dtype"):
        check_attention(ModelConfig(attention="cudnn"), "gpu")
