"""Where arrays live: one mesh (data, fsdp, tensor) and an ordered table of path rules.

Batches are split over data and fsdp, parameters over fsdp and tensor. With one device everything
below still holds, with axes of size one.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from owl_det.config import MeshConfig
from owl_det.errors import ConfigError
from owl_det.optim import apply_rules, path_name

P = PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# (path pattern → how the parameter is split). Parameters of `blocks` begin with the layer axis.
PARAMETER_RULES: list[tuple[str, PartitionSpec]] = [
    (r"blocks/qkv/kernel", P(None, "fsdp", None, "tensor", None)),  # layer, d, 3, head, c
    (r"blocks/qkv/bias", P(None, None, "tensor", None)),
    (r"blocks/out/kernel", P(None, "tensor", None, "fsdp")),  # layer, head, c, d
    (r"blocks/mlp_in/kernel", P(None, "fsdp", "tensor")),
    (r"blocks/mlp_in/bias", P(None, "tensor")),
    (r"blocks/mlp_out/kernel", P(None, "tensor", "fsdp")),
    (r"patch_kernel", P(None, None, None, "fsdp")),
    (r"token_embedding", P(None, "fsdp")),
    (r"projection/kernel", P("fsdp", None)),
    (r"_head/.*/kernel", P("fsdp", None)),
    (r"", P()),  # norms, biases, positions: small, on every device
]


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """The device mesh. Raises `ConfigError` if the axes do not multiply to the devices there."""
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    known = int(np.prod([size for size in sizes if size != -1]))
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != len(devices):
        raise ConfigError(
            f"config.mesh: data x fsdp x tensor = {' x '.join(map(str, sizes))} does not make "
            f"the {len(devices)} devices there are; set one axis to -1"
        )
    return Mesh(np.array(devices).reshape(sizes), AXES)


def num_data_shards(mesh: Mesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Every array of a batch is split along its first axis."""
    return NamedSharding(mesh, P(BATCH_AXES))


def parameter_shardings(params: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of each parameter (arrays or their shapes).

    Raises `ConfigError`, naming the parameter, where a dimension does not divide.
    """
    # Towers alone have no heads, and a ResNet has no patches.
    specs = apply_rules(params, PARAMETER_RULES, optional=("_head/.*/kernel", "patch_kernel"))

    def check(path: Any, leaf: Any, spec: PartitionSpec) -> NamedSharding:
        for dimension, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and dimension % mesh.shape[axis]:
                raise ConfigError(
                    f"config.mesh.{axis}: {mesh.shape[axis]} does not divide a dimension of "
                    f"{path_name(path)}, shape {tuple(leaf.shape)}, split as {spec}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(check, params, specs)


def state_shardings(state: PyTree, params: PyTree, mesh: Mesh) -> PyTree:
    """Shardings of a train state: optimiser arrays lie where their parameter lies.

    An optimiser leaf belongs to the parameter whose path its own path ends with; one of another
    shape (factored moments, counters) is small and on every device.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    shapes = {path_name(path): leaf.shape for path, leaf in leaves}
    placed = jax.tree_util.tree_leaves_with_path(parameter_shardings(params, mesh))
    by_name = {path_name(path): sharding for path, sharding in placed}

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = path_name(path)
        parts = name.split("/")
        for start in range(len(parts)):
            candidate = "/".join(parts[start:])
            if candidate in by_name and shapes[candidate] == leaf.shape:
                return by_name[candidate]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, state)
