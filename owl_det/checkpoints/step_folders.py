"""Where checkpoints lie: `<workdir>/checkpoints/<step>`, or one folder of parameters alone."""

import os
import re
from pathlib import Path

from owl_det.errors import CheckpointError
from owl_det.files import did_you_mean

# An owner and a name, as models are called on the Hugging Face hub.
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def steps(workdir: Path) -> list[int]:
    """Steps of which the workdir holds a checkpoint, in order; those half written are none."""
    folder = workdir if workdir.name == "checkpoints" else workdir / "checkpoints"
    return sorted(
        int(path.name) for path in folder.glob("*") if path.name.isdecimal() and path.is_dir()
    )


def latest_step(workdir: Path) -> int | None:
    return max(steps(workdir), default=None)


def folder_of(workdir: Path, step: int) -> Path:
    folder = workdir if workdir.name == "checkpoints" else workdir / "checkpoints"
    return folder / str(step)


def find(path: str | os.PathLike[str]) -> Path:
    """The checkpoint directory that a path means. Raises `CheckpointError` if there is none."""
    root = Path(path)
    if (root / "params").is_dir():
        return root
    step = latest_step(root)
    if step is None:
        raise CheckpointError(
            f"{root}: no checkpoint there; give a workdir that holds checkpoints/, or one "
            f"checkpoint directory{_meant(root)}"
        )
    return folder_of(root, step)


def has_checkpoint(path: str | os.PathLike[str]) -> bool:
    """True if `find` finds one."""
    try:
        find(path)
    except CheckpointError:
        return False
    return True


def _meant(root: Path) -> str:
    command = f"`owl-det convert {root} DST --from hf` makes a checkpoint of it"
    if root.exists():
        is_theirs = (root / "config.json").is_file() and any(root.glob("*.safetensors*"))
        return f"; this is a model of transformers: {command}" if is_theirs else ""
    if _HUB_NAME.fullmatch(str(root)):
        return f"; if {root} is a model of the Hugging Face hub, {command}"
    return did_you_mean(root)
