"""Checkpoints: Orbax directories that training resumes from and inference loads.

    <workdir>/checkpoints/<step>/params      parameters
                                /optimizer   optimiser state and step
                                /run         JSON: model, preprocessing, input position

A checkpoint is complete or absent: Orbax writes to a temporary name and renames. Loading checks
every shape against the model before anything is allocated, and runs no code from the files.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from jaxtyping import PyTree

from owl_det import config as config_lib
from owl_det import optim, train_step
from owl_det.config import Config
from owl_det.errors import CheckpointError, ConfigError
from owl_det.types import LoadedModel, Params, TrainState

FORMAT = 1  # of the run file


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, workdir: Path, config: Config):
        self.config = config
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.checkpoint.keep, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, input_version: str) -> None:
        """Starts writing the state; `wait` returns when it is complete."""
        step = int(state.step)
        if step == self.latest_step:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave({"step": state.step, "state": state.opt_state}),
                run=ocp.args.JsonSave(_run_file(self.config, step, input_version)),
            ),
        )

    def restore(self, template: TrainState, input_version: str) -> TrainState:
        """The latest state, placed as `template` (shapes with shardings) says.

        Raises `CheckpointError` if the model or the input is not the one that was saved.
        """
        step = self.latest_step
        assert step is not None
        folder = self._manager.directory / str(step)
        saved = _read_run_file(Path(folder))
        _check_same_input(saved, _run_file(self.config, step, input_version), Path(folder))
        _check_shapes(Path(folder), template.params)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(template.params),
                optimizer=ocp.args.StandardRestore(
                    {"step": template.step, "state": template.opt_state}
                ),
            ),
        )
        optimizer = restored["optimizer"]
        return TrainState(
            step=optimizer["step"], params=restored["params"], opt_state=optimizer["state"]
        )

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def load_model(path: str | os.PathLike[str]) -> LoadedModel:
    """Loads a workdir's latest checkpoint, or one checkpoint directory.

    Raises `CheckpointError` if there is none or its files do not fit its own model description.
    """
    folder = find(path)
    run = _read_run_file(folder)
    try:
        model, preprocess = config_lib.resolve_model(run["model"], run["preprocess"])
    except ConfigError as error:
        raise CheckpointError(f"{folder}/run: {error}") from None
    # Shapes do not depend on the attention, and only a GPU traces the one of cuDNN.
    config = Config(model=dataclasses.replace(model, attention="xla"), preprocess=preprocess)
    template = jax.eval_shape(lambda: train_step.init_params(config, jax.random.key(0)))
    _check_shapes(folder, template)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), template
    )
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        params = reader.restore(
            (folder / "params").absolute(), args=ocp.args.StandardRestore(template)
        )
    return LoadedModel(
        params=params,
        model=model,
        preprocess=preprocess,
        eval_prompts=str(run["eval_prompts"]),
        step=int(run["step"]),
    )


def save_model(path: str | os.PathLike[str], model: LoadedModel) -> None:
    """Writes a checkpoint of parameters alone, which `load_model` reads."""
    run = {
        "format": FORMAT,
        "step": model.step,
        "model": dataclasses.asdict(model.model),
        "preprocess": dataclasses.asdict(model.preprocess),
        "eval_prompts": model.eval_prompts,
    }
    handler = ocp.CompositeCheckpointHandler()
    with ocp.Checkpointer(handler) as writer:
        writer.save(
            Path(path).absolute(),
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(model.params), run=ocp.args.JsonSave(run)
            ),
        )


def find(path: str | os.PathLike[str]) -> Path:
    """The checkpoint directory that a path means. Raises `CheckpointError` if there is none."""
    root = Path(path)
    if (root / "params").is_dir():
        return root
    folder = root if root.name == "checkpoints" else root / "checkpoints"
    steps = [int(p.name) for p in folder.glob("*") if p.name.isdigit() and (p / "params").is_dir()]
    if not steps:
        raise CheckpointError(
            f"{root}: no checkpoint there; give a workdir that holds checkpoints/, or one "
            "checkpoint directory"
        )
    return folder / str(max(steps))


def adapt(loaded: LoadedModel, config: Config) -> Params:
    """Parameters of another run as the start of this one.

    Position grids are resized linearly, and the first of more text positions are taken; any other
    difference raises `CheckpointError` with the first parameter that does not fit.
    """
    target = jax.eval_shape(lambda: train_step.init_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda x: x, loaded.params)
    if not isinstance(params.get("image"), dict) or not isinstance(params.get("text"), dict):
        raise CheckpointError("checkpoint.init_from: no image and text towers in the checkpoint")
    image, text = dict(params["image"]), dict(params["text"])
    image["position_embedding"] = _resize_positions(
        image["position_embedding"], target["image"]["position_embedding"].shape[0]
    )
    num_positions = target["text"]["position_embedding"].shape[0]
    text["position_embedding"] = text["position_embedding"][:num_positions]
    params = {**params, "image": image, "text": text}
    _compare(params, target, f"{config.checkpoint.init_from} (config.checkpoint.init_from)")
    return params


def _resize_positions(positions: jax.Array, num_positions: int) -> jax.Array:
    if positions.shape[0] == num_positions:
        return positions
    old, new = round((positions.shape[0] - 1) ** 0.5), round((num_positions - 1) ** 0.5)
    logging.info("Position grid resized from %d x %d to %d x %d", old, old, new, new)
    grid = positions[1:].reshape(old, old, -1)
    grid = jax.image.resize(grid, (new, new, grid.shape[-1]), "linear")
    return jnp.concatenate([positions[:1], grid.reshape(new * new, -1)])


def _run_file(config: Config, step: int, input_version: str) -> dict[str, Any]:
    data = dataclasses.asdict(config.data)
    # Where the files lie and how many threads read them changes nothing about the examples.
    for key in ("path", "num_workers", "eval"):
        del data[key]
    for entry in data["train"].values():
        entry.pop("path", None)
    return {
        "format": FORMAT,
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


def _read_run_file(folder: Path) -> dict[str, Any]:
    file = folder / "run" / "metadata"
    try:
        run = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from None
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        raise CheckpointError(f"{file}: not a run file of format {FORMAT}")
    for key in ("step", "model", "preprocess", "eval_prompts"):
        if key not in run:
            raise CheckpointError(f"{file}: {key!r} is missing")
    return run


def _check_same_input(saved: dict[str, Any], current: dict[str, Any], folder: Path) -> None:
    before = saved.get("input", {})
    for key, value in current["input"].items():
        if before.get(key) != value:
            raise CheckpointError(
                f"{folder}: was trained with another input ({key}: {before.get(key)} there, "
                f"{value} now); use a new workdir, with config.checkpoint.init_from for its weights"
            )


def _check_shapes(folder: Path, template: PyTree) -> None:
    """Compares the saved shapes with the model's, from the metadata alone."""
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            metadata = reader.metadata((folder / "params").absolute())
        saved = metadata.item_metadata.tree  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    except Exception as error:  # Orbax raises many kinds for files it cannot read
        raise CheckpointError(f"{folder}/params: cannot be read ({error})") from error
    _compare(saved, template, str(folder))


def _compare(saved: PyTree, template: PyTree, where: str) -> None:
    """Raises `CheckpointError` at the first parameter that is missing, unknown or misshapen."""
    saved_shapes = {
        optim.path_name(path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(saved)
    }
    wanted = {
        optim.path_name(path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(template)
    }
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
