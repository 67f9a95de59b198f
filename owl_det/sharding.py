"""Where arrays live: one mesh (data, fsdp, tensor) and an ordered table of path rules.

Batches are split over data and fsdp, parameters over fsdp and tensor. With one device everything
below still holds, with axes of size one.

A step gathers the parameters over fsdp once, works on each data shard by itself and sums the
gradients once (`on_data_shards`): fsdp saves the memory of parameters and optimiser between the
steps, and costs no more traffic than data parallelism.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from owl_det.config import MeshConfig
from owl_det.errors import ConfigError
from owl_det.path_rules import apply_rules, path_name

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
    (r"map_head/out/kernel", P(None, None, "fsdp")),  # head, c, d
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
    # Towers alone have no heads, few pool by attention, and a ResNet has no patches.
    optional = ("map_head/out/kernel", "_head/.*/kernel", "patch_kernel")
    specs = apply_rules(params, PARAMETER_RULES, optional=optional)

    def check(path: Any, leaf: Any, spec: PartitionSpec) -> NamedSharding:
        for dimension, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and dimension % mesh.shape[axis]:
                raise ConfigError(
                    f"config.mesh.{axis}: {mesh.shape[axis]} does not divide a dimension of "
                    f"{path_name(path)}, shape {tuple(leaf.shape)}, split as {spec}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(check, params, specs)


def on_data_shards(
    fn: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]],
    params: PyTree,
    shared: PyTree,
    rows: PyTree,
    mesh: Mesh | None,
) -> tuple[PyTree, PyTree]:
    """`fn(params, shared, rows)` on each data shard's own rows: gradients, and values per row.

    The parameters that `fn` sees are whole, but for their split over tensor; `shared` is the same
    everywhere; the first axis of every array of `rows` is split over data and fsdp. Gradients, a
    tree like `params`, are summed over the shards and end where the parameters lie. Nothing else
    crosses the data and fsdp axes: loops run as long as their own shard needs.
    """
    if mesh is None or mesh.size == 1:
        return fn(params, shared, rows)
    specs = _specs(params, mesh)

    def local(params: PyTree, shared: PyTree, rows: PyTree) -> tuple[PyTree, PyTree]:
        gradients, values = fn(params, shared, rows)
        return jax.tree.map(lambda g: g[None], gradients), values

    own_gradients, values = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), P(), P(BATCH_AXES)),
        out_specs=P(BATCH_AXES),
        axis_names=set(BATCH_AXES),  # tensor is left to the compiler
        check_vma=False,  # loops start from constants, which count as the same on every shard
    )(gather_over_fsdp(params, mesh), shared, rows)
    return _sum_over_shards(own_gradients, specs, mesh), values


def gather_over_fsdp(params: PyTree, mesh: Mesh | None) -> PyTree:
    """The same parameters, whole over fsdp and split over tensor as before."""
    if mesh is None or mesh.size == 1:
        return params
    specs = _specs(params, mesh)

    def gather(x: Array, spec: PartitionSpec) -> Array:
        if "fsdp" not in spec:
            return x
        return jax.lax.all_gather(x, "fsdp", axis=spec.index("fsdp"), tiled=True)

    return jax.shard_map(
        lambda tree: jax.tree.map(gather, tree, specs),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=jax.tree.map(_over_tensor, specs),
        check_vma=False,  # it cannot tell that what was gathered is the same on every shard
    )(params)


def _sum_over_shards(own: PyTree, specs: PyTree, mesh: Mesh) -> PyTree:
    """The sum over each array's first axis, one entry a data shard, split as the parameters are."""

    def add(x: Array, spec: PartitionSpec) -> Array:
        if "fsdp" not in spec:
            return jax.lax.psum(x[0], BATCH_AXES)
        dimension = spec.index("fsdp")
        part = jax.lax.psum_scatter(x[0], "fsdp", scatter_dimension=dimension, tiled=True)
        return jax.lax.psum(part, "data")

    return jax.shard_map(
        lambda tree: jax.tree.map(add, tree, specs),
        mesh=mesh,
        in_specs=(jax.tree.map(lambda spec: P(BATCH_AXES, *_over_tensor(spec)), specs),),
        out_specs=specs,
    )(own)


def _specs(params: PyTree, mesh: Mesh) -> PyTree:
    return jax.tree.map(lambda placed: placed.spec, parameter_shardings(params, mesh))


def _over_tensor(spec: PartitionSpec) -> PartitionSpec:
    return P(*(axis if axis == "tensor" else None for axis in spec))


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
