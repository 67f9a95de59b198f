"""Meshes and where arrays are placed."""

import importlib
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from owl_det import path_rules, sharding
from owl_det.config import MeshConfig
from owl_det.config.resolve import resolve
from owl_det.errors import ConfigError
from owl_det.modeling import build
from owl_det.training import train_step
from tests import tiny

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


def _specs(tree: Any) -> dict[str, P]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_rules.path_name(path): sharding.spec for path, sharding in leaves}


def _state(kind: str) -> Any:
    config = tiny.config(optimizer={"kind": kind})
    return jax.eval_shape(lambda: train_step.init_state(config))


def test_one_axis_takes_what_is_left() -> None:
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sharding.num_data_shards(mesh) == 4
    one = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    assert sharding.num_data_shards(one) == 1


@pytest.mark.parametrize(
    "sizes", [MeshConfig(data=3), MeshConfig(data=16), MeshConfig(data=-1, fsdp=3)]
)
def test_sizes_that_do_not_make_the_devices(sizes: MeshConfig) -> None:
    with pytest.raises(ConfigError, match=r"config.mesh: .* does not make the 8 devices"):
        sharding.make_mesh(sizes)


def test_every_big_parameter_is_split() -> None:
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = _state("sgd").params
    specs = _specs(sharding.parameter_shardings(params, mesh))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_rules.path_name(path)
        is_small = leaf.size < 1000 or "position" in name
        assert is_small or any(specs[name]), f"{name}, {leaf.shape}, lies whole on every device"
    assert specs["text/token_embedding"] == P(None, "fsdp")
    assert specs["image/transformer/blocks/norm_1/norm/scale"] == P()


def test_attention_pooling_is_split_by_its_width() -> None:
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8, tensor=1))
    config = importlib.import_module("configs.pretrain_siglip_b16").get_config().to_dict()
    params = jax.eval_shape(lambda: build.init_params(resolve(config), jax.random.key(0)))
    specs = _specs(sharding.parameter_shardings(params, mesh))
    assert specs["image/map_head/out/kernel"] == P(None, None, "fsdp")


@pytest.mark.parametrize("kind", ["adam", "adafactor"])
def test_moments_lie_with_their_parameters(kind: str) -> None:
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    state = _state(kind)
    placed = sharding.state_shardings(state, state.params, mesh)
    parameters, moments = _specs(placed.params), _specs(placed.opt_state)
    kernel = "image/transformer/blocks/qkv/kernel"
    assert parameters[kernel] == P(None, "fsdp", None, "tensor", None)
    fields = {"adam": ("mu", "nu"), "adafactor": ("ema",)}[kind]
    for field in fields:
        found = [spec for name, spec in moments.items() if name.endswith(f"{field}/{kernel}")]
        assert found == [parameters[kernel]], field
    counts = [spec for name, spec in moments.items() if name.endswith("count")]
    assert counts and all(spec == P() for spec in counts)


def test_a_dimension_that_does_not_divide_names_its_parameter() -> None:
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1, tensor=8))
    with pytest.raises(ConfigError, match=r"config.mesh.tensor: 8 does not divide .*/blocks/"):
        sharding.parameter_shardings(_state("sgd").params, mesh)


def test_batches_are_split_over_data_and_fsdp() -> None:
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(np.zeros((8, 3)), sharding.batch_sharding(mesh))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
