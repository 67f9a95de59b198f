"""Arrays of a checkpoint: folders that Orbax wrote, and the comparison of shapes.

Shapes are compared from the metadata alone, before anything is allocated.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from owl_det import path_rules
from owl_det.checkpoints.damage import DamagedError
from owl_det.errors import CheckpointError


def metadata(folder: Path) -> PyTree:
    """Shapes and types of what a folder of Orbax holds. Raises `DamagedError`."""
    with _reading(folder) as handler:
        found = handler.metadata(folder.absolute())  # pyright: ignore[reportArgumentType]
        return on_first_device(found.tree)  # pyright: ignore[reportAttributeAccessIssue]


def read(folder: Path, template: PyTree) -> PyTree:
    """Arrays of a folder of Orbax, placed as `template` says. Raises `DamagedError`."""
    with _reading(folder) as handler:
        return handler.restore(
            folder.absolute(),  # pyright: ignore[reportArgumentType]
            args=ocp.args.StandardRestore(template),
        )


@contextmanager
def _reading(folder: Path) -> Iterator[ocp.StandardCheckpointHandler]:
    # The handler alone: a Checkpointer looks for files that only the folder above has.
    handler = ocp.StandardCheckpointHandler()
    try:
        yield handler
    except Exception as error:  # Orbax raises many kinds for files it cannot read
        raise DamagedError(f"{folder}: cannot be read ({first_line(error)})") from error
    finally:
        handler.close()


def on_first_device(shapes: PyTree) -> PyTree:
    """The shapes as a template for `read`: each array on the first device."""
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)


def check_shapes(folder: Path, template: PyTree) -> None:
    """Raises `CheckpointError` unless the checkpoint's parameters are those of `template`."""
    compare(metadata(folder / "params"), template, str(folder))


def compare(saved: PyTree, template: PyTree, where: str) -> None:
    """Raises `CheckpointError` at the first parameter that is missing, unknown or misshapen."""
    saved_shapes, wanted = _shapes_by_name(saved), _shapes_by_name(template)
    for name, shape in wanted.items():
        if name not in saved_shapes:
            raise CheckpointError(f"{where}: another architecture; it lacks {name} {shape}")
        if saved_shapes[name] != shape:
            raise CheckpointError(
                f"{where}: another architecture; {name} is {saved_shapes[name]} there and {shape} "
                "in the config"
            )
    for name in saved_shapes:
        if name not in wanted:
            raise CheckpointError(f"{where}: another architecture; {name} is not in the config")


def leaf_shapes(tree: PyTree) -> list[tuple[int, ...]]:
    """The shapes of all arrays, sorted, whatever the arrays are called."""
    return sorted(tuple(leaf.shape) for leaf in jax.tree.leaves(tree))


def _shapes_by_name(tree: PyTree) -> dict[str, tuple[int, ...]]:
    return {
        path_rules.path_name(path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def reason(error: Exception) -> str:
    """What the operating system said, if that is within a library's long message."""
    codes = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EIO)
    found = [text for code in codes if (text := os.strerror(code)) in str(error)]
    return found[0] if found else first_line(error)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
