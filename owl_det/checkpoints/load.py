"""Loading the model of a checkpoint, and writing a model as a checkpoint of parameters alone.

Loading checks every shape against the model before anything is allocated, and runs no code from
the files.
"""

import dataclasses
import os
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from owl_det.checkpoints import arrays, finite, run_file, step_folders, tokenizer_file
from owl_det.checkpoints.damage import DamagedError
from owl_det.config import Config
from owl_det.errors import CheckpointError
from owl_det.modeling import build
from owl_det.types import LoadedModel


def load_model(path: str | os.PathLike[str]) -> LoadedModel:
    """Loads a workdir's latest checkpoint, or one checkpoint directory, of any kind.

    Raises `CheckpointError` if there is none, its files do not fit its own model description, or a
    parameter has values that are NaN or infinite. Of a workdir whose latest is damaged it names
    the others.
    """
    return _load(path, needs_heads=False)


def load_detector(path: str | os.PathLike[str]) -> LoadedModel:
    """As `load_model`; raises `CheckpointError` if the checkpoint has no detection heads."""
    return _load(path, needs_heads=True)


def _load(path: str | os.PathLike[str], needs_heads: bool) -> LoadedModel:
    folder = step_folders.find(path)
    try:
        described = run_file.describe(folder)
        if needs_heads and described.kind != "detector":
            remedy = (
                "a ResNet teaches (config.distill.teacher) and never becomes one"
                if described.is_resnet
                else "towers become a detector by training with config.checkpoint.init_from"
            )
            raise CheckpointError(
                f"{folder}: a checkpoint of kind {described.kind!r} has no detection heads; "
                + remedy
            )
        return _with_params(folder, described)
    except DamagedError as error:
        others = [step for step in step_folders.steps(Path(path)) if str(step) != folder.name]
        if folder == Path(path) or not others:
            raise
        places = " or ".join(str(folder.with_name(str(step))) for step in reversed(others))
        raise CheckpointError(f"{error}; an earlier checkpoint of it is {places}") from error


def _with_params(folder: Path, described: LoadedModel) -> LoadedModel:
    template = parameter_shapes(described)
    arrays.check_shapes(folder, template)
    params = arrays.read(folder / "params", arrays.on_first_device(template))
    finite.require_finite(params, f"{folder}/params")
    if jax.default_backend() != "gpu":  # where cuDNN's attention, if it is asked for, cannot run
        model = dataclasses.replace(described.config, attention="xla")
        described = dataclasses.replace(described, config=model)
    return dataclasses.replace(described, params=params)


def parameter_shapes(model: LoadedModel) -> PyTree:
    """Shapes of the parameters that a model of this kind and description has."""
    if model.is_resnet:
        from owl_det.modeling import resnet  # a teacher only

        return resnet.parameter_shapes(model.config, model.preprocess)
    # Shapes do not depend on the attention, and only a GPU traces the one of cuDNN.
    architecture = dataclasses.replace(model.config, attention="xla")
    config = Config(model=architecture, preprocess=model.preprocess)
    shapes = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    return build.towers_of(shapes) if model.kind == "towers" else shapes


def save_model(
    path: str | os.PathLike[str], model: LoadedModel, origin: dict[str, str] | None = None
) -> None:
    """Writes a checkpoint of parameters alone, with the tokeniser's file; `load_model` reads it.

    `origin` is kept in the run file: where converted weights came from. Raises `CheckpointError`
    if the tokeniser's file cannot be read.
    """
    folder = Path(path).absolute()
    run = run_file.of_model(model, origin)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()  # Orbax wants to make it
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(
            folder,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(model.params), run=ocp.args.JsonSave(run)
            ),
        )
    if model.tokenizer:
        tokenizer_file.copy(Path(model.tokenizer), folder)
