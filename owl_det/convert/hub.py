"""Folders of models: on this machine, or of a repository of the Hugging Face hub."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from owl_det.errors import CheckpointError

_FILES = ["*.json", "merges.txt", "model*.safetensors"]  # of a hub repository


def find_folder(source: str, files: Sequence[str] = _FILES) -> Path:
    """The folder of that name, or these files of a hub repository; `CheckpointError` if neither.

    `owner/name@revision` is a branch, a commit or, as `refs/pr/N`, a pull request of a repository.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    named = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)
    if folder.exists() or not named:
        raise CheckpointError(f"{source}: not a folder with config.json and model.safetensors")
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise CheckpointError(
            f"{source}: no such folder; to fetch it from the hub, pip install huggingface_hub"
        ) from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    name, revision = named.groups()
    try:
        found = Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(files))
        )
    except Exception as error:  # of many kinds: offline, no such name, no right to read
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{source}: no such folder, and the hub does not give it ({reason}); download it "
            "where there is a connection and give the folder"
        ) from None
    if not any(found.glob("model*.safetensors")):
        raise CheckpointError(
            f"{source}: the repository has no model.safetensors there, and pickles "
            "(pytorch_model.bin) are not read; where the hub has converted it, that stands under a "
            f"pull request (https://huggingface.co/{name}/discussions): {name}@refs/pr/N"
        )
    return found
