"""The run file of a checkpoint: JSON that says what the parameters beside it are.

It holds the model's settings, the preprocessing, the step and, of a training, its input position.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from data_pipelines import prompts
from owl_det import config as config_lib
from owl_det import files
from owl_det.checkpoints import tokenizer_file
from owl_det.checkpoints.damage import DamagedError
from owl_det.config import Config
from owl_det.config.resolve import resolve_model
from owl_det.errors import CheckpointError, ConfigError
from owl_det.types import LoadedModel

FORMAT = 1

_KINDS = ("detector", "towers")


def of_training(config: Config, step: int, input_version: str) -> dict[str, Any]:
    """The run file of a training's step; `Checkpoints` adds tokeniser, teachers and names."""
    data = of_examples(dataclasses.asdict(config.data))
    return {
        "format": FORMAT,
        "kind": "detector" if config.has_heads else "towers",
        "step": step,
        "model": dataclasses.asdict(config.model),
        "preprocess": dataclasses.asdict(config.preprocess),
        "eval_prompts": config.data.eval_prompts,
        "input": {
            "next_example": step * config.batch_size,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "sources": input_version,
            "data_config": config_lib.digest(data),
        },
    }


def of_model(model: LoadedModel, origin: dict[str, str] | None = None) -> dict[str, Any]:
    """The run file of parameters alone. Raises `CheckpointError` as `tokenizer_file.entry_of`."""
    return {
        "format": FORMAT,
        "kind": model.kind,
        "step": model.step,
        "model": dataclasses.asdict(model.config),
        "preprocess": dataclasses.asdict(model.preprocess),
        "eval_prompts": model.eval_prompts,
        "names": list(model.names),
        "tokenizer": tokenizer_file.entry_of(model.tokenizer),
        "origin": origin or {},
    }


def of_examples(data: dict[str, Any]) -> dict[str, Any]:
    """The keys of a config's data that change the examples.

    Where the files lie and how many threads read them does not. The tokeniser has its own entry.
    """
    apart = ("path", "tokenizer", "num_workers", "eval", "eval_prompts")
    kept = {key: value for key, value in data.items() if key not in apart}
    sources = kept.get("train", {}).items()
    kept["train"] = {n: {k: v for k, v in x.items() if k != "path"} for n, x in sources}
    return kept


def describe(folder: Path) -> LoadedModel:
    """What a checkpoint says of itself, without its parameters.

    Raises `CheckpointError` naming the field that is wrong, `DamagedError` if nothing can be read.
    """
    run = read(folder)
    kind, model = run.get("kind", "detector"), run["model"]  # the oldest files have no kind
    if kind == "resnet" and isinstance(model, dict):  # so version 0.1 calls towers with a ResNet
        kind, tower = "towers", model.get("resnet", {})
        model = {**model, "image": {"kind": "resnet", **tower} if type(tower) is dict else tower}
    if kind not in _KINDS:
        raise CheckpointError(f"{folder}/run: kind {kind!r} is not detector, towers or resnet")
    try:
        model, preprocess = resolve_model(model, run["preprocess"])
        prompts.eval_prompts(run["eval_prompts"])
    except ConfigError as error:
        raise CheckpointError(f"{folder}/run: {error}") from None
    return LoadedModel(
        kind=kind,
        params={},
        config=model,
        preprocess=preprocess,
        eval_prompts=run["eval_prompts"],
        step=run["step"],
        tokenizer=tokenizer_file.find(folder, run.get("tokenizer")),
        names=_names_of(folder, run.get("names", [])),  # older files have none
    )


def read(folder: Path) -> dict[str, Any]:
    """The run file of a checkpoint directory. Raises `DamagedError` if it is not whole."""
    file = folder / "run" / "metadata"
    try:
        run = json.loads(files.read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{file}: cannot be read ({error})") from None
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        raise DamagedError(f"{file}: not a run file of format {FORMAT}")
    for key in ("step", "model", "preprocess", "eval_prompts"):
        if key not in run:
            raise DamagedError(f"{file}: {key!r} is missing")
    if type(run["step"]) is not int or run["step"] < 0:
        raise DamagedError(f"{file}: step {str(run['step'])[:60]!r} is no number of steps")
    if not isinstance(run["eval_prompts"], str):
        raise DamagedError(f"{file}: eval_prompts {str(run['eval_prompts'])[:60]!r} is no text")
    return run


def _names_of(folder: Path, names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{folder}/run: names are no list of texts")
    return tuple(names)
