"""The formats that weights come in, by the names the `convert` command gives them.

A reader makes a `LoadedModel` of a file, folder or name; a writer makes a folder of one. Each is
imported when asked for. Another format is one function in its own file and one entry here.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from owl_det.config import ResNetConfig
from owl_det.errors import CheckpointError
from owl_det.types import LoadedModel

Reader = Callable[[str], LoadedModel]
Writer = Callable[[Path, LoadedModel, dict[str, str]], None]  # the last: where it came from


def readers() -> dict[str, Reader]:
    """By format; each raises `CheckpointError` for what it cannot read."""
    return {
        "scenic": _read_scenic,
        "hf": _read_huggingface,
        "owl_det": _read_own,
        "clip": _read_clip,
        "siglip": _read_siglip,
        "lit": _read_big_vision,
        "clip_resnet": _read_resnet,
    }


def writers() -> dict[str, Writer]:
    """By format; each raises `CheckpointError` for what the format cannot express."""
    return {"owl_det": _write_own, "hf": _write_huggingface}


def convert(
    source: str,
    target: Path,
    from_format: str,
    to_format: str,
    *,
    eval_prompts: str | None = None,
) -> LoadedModel:
    """Reads `source` and writes it to the new or empty folder `target`; returns what was written.

    `eval_prompts` replaces those that the reader sets. Raises `CheckpointError`, before anything is
    read, for a format that is not known and if the folder holds anything.
    """
    read, write = readers().get(from_format), writers().get(to_format)
    if read is None:
        raise CheckpointError(f"--from {from_format}: is not one of {', '.join(readers())}")
    if write is None:
        raise CheckpointError(f"--to {to_format}: is not one of {', '.join(writers())}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: is not empty; name a new folder")
    model = read(source)
    if eval_prompts is not None:
        model = dataclasses.replace(model, eval_prompts=eval_prompts)
    write(target, model, {"format": from_format, "source": source})
    return model


def summary(model: LoadedModel) -> dict[str, Any]:
    """What was converted, in few words and numbers."""
    config, image = model.config, model.config.image
    if isinstance(image, ResNetConfig):
        tower = f"ResNet {image.width}x{'-'.join(map(str, image.num_blocks))}"
    else:
        tower = f"{image.width}x{image.num_layers}/{image.patch_size}"
    return {
        "kind": model.kind,
        "model": tower,
        "image_size": config.image_size,
        "has_objectness_head": model.kind == "detector" and config.has_objectness_head,
        "eval_prompts": model.eval_prompts,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
    }


def _read_scenic(source: str) -> LoadedModel:
    from owl_det.convert import scenic

    return scenic.read(source)


def _read_huggingface(source: str) -> LoadedModel:
    from owl_det.convert import huggingface

    return huggingface.read(source)


def _read_own(source: str) -> LoadedModel:
    from owl_det.checkpoints.load import load_model

    return load_model(source)


def _read_clip(source: str) -> LoadedModel:
    from owl_det.convert import clip

    return clip.read(source)


def _read_siglip(source: str) -> LoadedModel:
    from owl_det.convert import siglip

    return siglip.read(source)


def _read_big_vision(source: str) -> LoadedModel:
    from owl_det.convert import lit

    return lit.read(source)


def _read_resnet(source: str) -> LoadedModel:
    from owl_det.convert import clip

    return clip.read_resnet(source)


def _write_own(target: Path, model: LoadedModel, origin: dict[str, str]) -> None:
    from owl_det.checkpoints.load import save_model

    save_model(target, model, origin=origin)


def _write_huggingface(target: Path, model: LoadedModel, origin: dict[str, str]) -> None:
    from owl_det.convert import huggingface

    huggingface.write(target, model)
