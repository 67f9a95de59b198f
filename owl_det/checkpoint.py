"""Checkpoints: Orbax directories that training resumes from and inference loads.

    <workdir>/checkpoints/<step>/params      parameters
                                /optimizer   optimiser state and step
                                /run         JSON: model, preprocessing, input position
    <workdir>/tokenizer/                     the tokeniser's file, if it has one

A checkpoint of parameters alone (`save_model`) is one directory with params, run and tokenizer. Its
kind, in the run file, is "detector" or "towers": a contrastive model without heads, which training
can start from; or "resnet": CLIP's ResNet-50, a teacher.

A checkpoint is complete or absent: Orbax writes to a temporary name and renames. Loading checks
every shape against the model before anything is allocated, and runs no code from the files.
"""

import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from jaxtyping import PyTree

from data_pipelines import prompts, tokenizer
from owl_det import config as config_lib
from owl_det import files, finite, path_rules, same_run, step_folders
from owl_det.config import Config, ModelConfig
from owl_det.config.resolve import resolve, resolve_model
from owl_det.errors import CheckpointError, ConfigError
from owl_det.modeling import build, resnet
from owl_det.modeling.detector import TOWERS, without_contrastive
from owl_det.types import LoadedModel, Params, TrainState

FORMAT = 1  # of the run file
MAX_TOKENIZER_BYTES = 2**28  # the largest published one has 34 MB

# With `checkpoint.model_from_init` these stay as the config says: they concern training only …
_TRAINING_KEYS, _TRAINING_TOWER_KEYS = same_run.TRAINING_KEYS, same_run.TRAINING_TOWER_KEYS
# … and these too where the checkpoint has no heads.
_HEAD_KEYS = ("has_objectness_head", "head_activation", "merge_norm_epsilon", "box_bias")
# What a tower computes without showing it in a parameter's shape.
_SAME_IN_TOWERS = ("pooling", "pre_norm", "is_causal", "tokenizer")


class DamagedError(CheckpointError):
    """Files of a checkpoint that are missing, cut short or changed."""


class Checkpoints:
    """The checkpoints of one run. Nothing is written before `begin`."""

    def __init__(
        self,
        workdir: Path,
        config: Config,
        teacher_ids: Sequence[str] = (),
        names: Sequence[str] = (),
    ):
        """`teacher_ids` are of the frozen models that the run learns from: it keeps to them.

        `names` are what the model learns to find (`LoadedModel.names`); they may change.

        Raises `CheckpointError` if the tokeniser's file cannot be read.
        """
        self.config = config
        self._workdir = workdir
        self._teacher_ids, self._names = list(teacher_ids), list(names)
        self._tokenizer = _tokenizer_entry(config.data.tokenizer)
        self._saved_step = step_folders.latest_step(workdir)

    @property
    def latest_step(self) -> int | None:
        return self._saved_step

    def begin(self) -> None:
        """Makes the folder and copies the tokeniser's file; what a killed run left half goes."""
        if self._tokenizer is not None and jax.process_index() == 0:
            _copy_tokenizer(Path(self.config.data.tokenizer), self._workdir)
        with self._writing():
            _ = self._manager

    @cached_property
    def _manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self.config.checkpoint.keep,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        return ocp.CheckpointManager((self._workdir / "checkpoints").absolute(), options=options)

    def save(self, state: TrainState, input_version: str) -> None:
        """Starts writing the state; `wait` returns when it is complete.

        Raises `CheckpointError` if this or an earlier one cannot be written.
        """
        step = int(state.step)
        if step == self._saved_step:
            return
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(build.model_params(state.params)),
                    optimizer=ocp.args.StandardSave(_training_item(state)),
                    run=ocp.args.JsonSave(self._run_file(step, input_version)),
                ),
            )
        self._saved_step = step

    @contextmanager
    def _writing(self) -> Generator[None, None, None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds for a full disk
            whole = step_folders.latest_step(self._workdir)
            stays = f"; checkpoints/{whole} stays" if whole is not None else ""
            raise CheckpointError(
                f"{self._workdir / 'checkpoints'}: a checkpoint cannot be written "
                f"({_reason(error)}){stays}; once it can, the same command goes on from there"
            ) from error

    def restore(self, template: TrainState, input_version: str) -> TrainState:
        """The latest state, placed as `template` (shapes with shardings) says.

        Raises `CheckpointError` if the model or the input is not the one that was saved, or files
        are damaged; it then names a checkpoint that is whole.
        """
        step = self.latest_step
        assert step is not None
        folder = step_folders.folder_of(self._workdir, step)
        try:
            return self._restore(folder, template, self._run_file(step, input_version))
        except DamagedError as error:
            whole = _whole_before(folder)
            remedy = (
                f"checkpoints/{whole} is whole: remove or rename {folder} to go on from it"
                if whole is not None
                else "no other is whole: a new workdir starts anew"
            )
            raise CheckpointError(f"{error}; {remedy}") from error

    def _restore(self, folder: Path, template: TrainState, current: dict[str, Any]) -> TrainState:
        saved = _read_run_file(folder)
        same_run.check_same_model(saved, current, folder)
        model = build.model_params(template.params)
        _check_shapes(folder, model)
        same_run.check_same_input(saved, current, folder, self._explain)
        training = _training_item(template)
        self._check_optimizer(folder, training)
        params = _read_item(folder / "params", model)
        optimizer = _read_item(folder / "optimizer", training)
        branches = {build.BRANCHES: optimizer["branches"]} if "branches" in optimizer else {}
        return TrainState(
            step=optimizer["step"], params={**params, **branches}, opt_state=optimizer["state"]
        )

    def _check_optimizer(self, folder: Path, template: PyTree) -> None:
        """Compares shapes alone: the names of an optimiser's leaves are Orbax's own."""
        saved = _leaf_shapes(_metadata(folder / "optimizer"))
        if saved != _leaf_shapes(template):
            told = [text for part in ("optimizer", "distill") if (text := self._explain(part))]
            raise CheckpointError(
                f"{folder}: its optimiser state does not fit config.optimizer and config.distill "
                f"({'; '.join(told) or 'a key of theirs is another now'}); a new workdir with "
                "config.checkpoint.init_from takes its weights alone"
            )

    def _explain(self, section: str) -> str:
        """Which keys of a section are not what config.json says; empty = it does not tell."""
        try:
            before = json.loads((self._workdir / "config.json").read_text("utf-8"))[section]
        except (OSError, ValueError, KeyError, TypeError):
            return ""
        now = json.loads(json.dumps(dataclasses.asdict(self.config)))[section]
        if not isinstance(before, dict):
            return ""
        if section == "data":
            before, now = _of_examples(before), _of_examples(now)
        return same_run.differences(before, now, f"config.{section}.")

    def _run_file(self, step: int, input_version: str) -> dict[str, Any]:
        of_run = {"tokenizer": self._tokenizer, "teachers": self._teacher_ids}
        return _run_file(self.config, step, input_version) | of_run | {"names": self._names}

    def wait(self) -> None:
        """Returns when all that was saved is complete. Raises `CheckpointError` if it is not."""
        if "_manager" in self.__dict__:
            with self._writing():
                self._manager.wait_until_finished()

    def close(self) -> None:
        if "_manager" in self.__dict__:
            with self._writing():
                self._manager.close()


def _whole_before(folder: Path) -> int | None:
    """The latest step before the folder's of which every file can be read."""
    workdir = folder.parent.parent
    for step in reversed(step_folders.steps(workdir)):
        other = step_folders.folder_of(workdir, step)
        if step < int(folder.name) and _is_whole(other):
            return step
    return None


def _is_whole(folder: Path) -> bool:
    try:
        load_model(folder)
        if (folder / "optimizer").is_dir():
            _read_item(folder / "optimizer", _metadata(folder / "optimizer"))
    except CheckpointError:
        return False
    return True


def _metadata(folder: Path) -> PyTree:
    """Shapes and types of what a folder of Orbax holds. Raises `DamagedError`."""
    # The handler alone: a Checkpointer looks for files that only the folder above has.
    handler = ocp.StandardCheckpointHandler()
    try:
        metadata = handler.metadata(folder.absolute())  # pyright: ignore[reportArgumentType]
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_first_device()),
            metadata.tree,  # pyright: ignore[reportAttributeAccessIssue]
        )
    except Exception as error:  # Orbax raises many kinds for files it cannot read
        raise DamagedError(f"{folder}: cannot be read ({_first_line(error)})") from error
    finally:
        handler.close()


def _read_item(folder: Path, template: PyTree) -> PyTree:
    """Arrays of a folder of Orbax, placed as `template` says. Raises `DamagedError`."""
    handler = ocp.StandardCheckpointHandler()
    try:
        return handler.restore(
            folder.absolute(),  # pyright: ignore[reportArgumentType]
            args=ocp.args.StandardRestore(template),
        )
    except Exception as error:  # Orbax raises many kinds
        raise DamagedError(f"{folder}: cannot be read ({_first_line(error)})") from error
    finally:
        handler.close()


def _first_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _leaf_shapes(tree: PyTree) -> list[tuple[int, ...]]:
    return sorted(tuple(leaf.shape) for leaf in jax.tree.leaves(tree))


def _training_item(state: TrainState) -> dict[str, Any]:
    """What only training needs: step, optimiser, parameters of distillation branches."""
    item = {"step": state.step, "state": state.opt_state}
    branches = state.params.get(build.BRANCHES)
    return item | ({"branches": branches} if branches else {})


def load_model(path: str | os.PathLike[str]) -> LoadedModel:
    """Loads a workdir's latest checkpoint, or one checkpoint directory, of either kind.

    Raises `CheckpointError` if there is none, its files do not fit its own model description, or a
    parameter has values that are NaN or infinite. Of a workdir whose latest is damaged it names
    the others.
    """
    folder = find(path)
    try:
        return _load(folder)
    except DamagedError as error:
        others = [step for step in step_folders.steps(Path(path)) if str(step) != folder.name]
        if folder == Path(path) or not others:
            raise
        places = " or ".join(str(folder.with_name(str(step))) for step in reversed(others))
        raise CheckpointError(f"{error}; an earlier checkpoint of it is {places}") from error


def _load(folder: Path) -> LoadedModel:
    described = _describe(folder)
    template = parameter_shapes(described)
    _check_shapes(folder, template)
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_first_device()), template
    )
    params = _read_item(folder / "params", template)
    finite.require_finite(params, f"{folder}/params")
    if jax.default_backend() != "gpu":  # where cuDNN's attention, if it is asked for, cannot run
        model = dataclasses.replace(described.config, attention="xla")
        described = dataclasses.replace(described, config=model)
    return dataclasses.replace(described, params=params)


def _reason(error: Exception) -> str:
    """What the operating system said, if that is within a library's long message."""
    codes = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EIO)
    found = [text for code in codes if (text := os.strerror(code)) in str(error)]
    return found[0] if found else _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def load_detector(path: str | os.PathLike[str]) -> LoadedModel:
    """As `load_model`; raises `CheckpointError` if the checkpoint has no detection heads."""
    folder = find(path)
    kind = _describe(folder).kind
    if kind != "detector":
        raise CheckpointError(
            f"{folder}: a checkpoint of kind {kind!r} has no detection heads; towers become a "
            "detector by training with config.checkpoint.init_from"
        )
    return load_model(folder)


def resized(model: LoadedModel, image_size: int) -> LoadedModel:
    """The model for squares of another side, in pixels; its position grid is resized linearly.

    Raises `CheckpointError` if the side is no multiple of the patch size, or the model a ResNet,
    whose attention pool is of one size.
    """
    if image_size == model.config.image_size:
        return model
    patch_size = model.config.image.patch_size
    if model.kind == "resnet":
        raise CheckpointError(f"image size {image_size}: a ResNet takes {model.config.image_size}")
    if image_size <= 0 or image_size % patch_size:
        raise CheckpointError(
            f"image size {image_size}: not a multiple of the patch size {patch_size}"
        )
    image = dict(model.params["image"])
    positions = image["position_embedding"]
    side = model.config.image_size // patch_size
    num_other = positions.shape[0] - side * side
    num_positions = num_other + (image_size // patch_size) ** 2
    image["position_embedding"] = _resize_positions(positions, num_positions)
    return dataclasses.replace(
        model,
        params={**model.params, "image": image},
        config=dataclasses.replace(model.config, image_size=image_size),
    )


def save_model(
    path: str | os.PathLike[str], model: LoadedModel, origin: dict[str, str] | None = None
) -> None:
    """Writes a checkpoint of parameters alone, with the tokeniser's file; `load_model` reads it.

    `origin` is kept in the run file: where converted weights came from. Raises `CheckpointError`
    if the tokeniser's file cannot be read.
    """
    folder = Path(path).absolute()
    described = _tokenizer_entry(model.tokenizer)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()  # Orbax wants to make it
    run = {
        "format": FORMAT,
        "kind": model.kind,
        "step": model.step,
        "model": dataclasses.asdict(model.config),
        "preprocess": dataclasses.asdict(model.preprocess),
        "eval_prompts": model.eval_prompts,
        "names": list(model.names),
        "tokenizer": described,
        "origin": origin or {},
    }
    handler = ocp.CompositeCheckpointHandler()
    with ocp.Checkpointer(handler) as writer:
        writer.save(
            folder,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(model.params), run=ocp.args.JsonSave(run)
            ),
        )
    if described is not None:
        _copy_tokenizer(Path(model.tokenizer), folder)


def parameter_shapes(model: LoadedModel) -> PyTree:
    """Shapes of the parameters that a model of this kind and description has."""
    if model.kind == "resnet":
        return resnet.parameter_shapes(model.config, model.preprocess)
    # Shapes do not depend on the attention, and only a GPU traces the one of cuDNN.
    architecture = dataclasses.replace(model.config, attention="xla")
    config = Config(model=architecture, preprocess=model.preprocess)
    shapes = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    return _towers_of(shapes) if model.kind == "towers" else shapes


def _towers_of(params: PyTree) -> PyTree:
    return {name: value for name, value in params.items() if name in TOWERS}


def _describe(folder: Path) -> LoadedModel:
    """What a checkpoint says of itself; without its parameters."""
    run = _read_run_file(folder)
    kind = run.get("kind", "detector")  # files from before there were towers have none
    if kind not in ("detector", "towers", "resnet"):
        raise CheckpointError(f"{folder}/run: kind {kind!r} is not detector, towers or resnet")
    try:
        model, preprocess = resolve_model(run["model"], run["preprocess"])
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
        tokenizer=_find_tokenizer(folder, run.get("tokenizer")),
        names=_names_of(folder, run.get("names", [])),  # older files have none
    )


def _names_of(folder: Path, names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{folder}/run: names are no list of texts")
    return tuple(names)


find = step_folders.find


def has_checkpoint(path: str | os.PathLike[str]) -> bool:
    """True if `find` finds one."""
    try:
        find(path)
    except CheckpointError:
        return False
    return True


def take_model(config: Config, workdir: str | os.PathLike[str]) -> Config:
    """The config with architecture, preprocessing and tokeniser of the checkpoint it starts from.

    Returns `config` itself unless `checkpoint.model_from_init` is set. A run that goes on takes
    them from its own latest checkpoint. What concerns training only stays as it is, and so do
    `model.image.last_block` where it is "values", `model.has_objectness_head` where
    `checkpoint.fresh` names that head, and the heads' settings where the checkpoint has towers
    only; such towers keep at most as many text positions as `model.text.num_positions` says if they
    pool at the end token. Raises `CheckpointError` if there is no checkpoint and
    `ConfigError` if the result does not fit.
    """
    if not config.checkpoint.model_from_init:
        return config
    if not config.checkpoint.init_from:
        raise ConfigError("config.checkpoint.init_from: model_from_init needs a checkpoint")
    is_resumed = has_checkpoint(workdir)
    source = _describe(find(workdir if is_resumed else config.checkpoint.init_from))
    if source.kind == "resnet":
        raise CheckpointError(f"{config.checkpoint.init_from}: a ResNet is a teacher, no start")
    keys = (*_TRAINING_KEYS, *(_HEAD_KEYS if source.kind == "towers" else ()))
    theirs, ours = dataclasses.asdict(source.config), dataclasses.asdict(config.model)
    model = theirs | {key: ours[key] for key in keys}
    for tower in ("image", "text"):
        model[tower] |= {key: ours[tower][key] for key in _TRAINING_TOWER_KEYS}
    if config.model.image.last_block == "values":  # asked for; the parameters serve both
        model["image"]["last_block"] = "values"
    if source.kind == "towers" and source.config.text.pooling == "end_token":
        model["text"]["num_positions"] = min(
            source.config.text.num_positions, config.model.text.num_positions
        )
    if config.checkpoint.image_size:
        model["image_size"] = config.checkpoint.image_size
    if any(re.match(pattern, "objectness_head/") for pattern in config.checkpoint.fresh):
        model["has_objectness_head"] = config.model.has_objectness_head
    tree = dataclasses.asdict(config)
    tree |= {"model": model, "preprocess": dataclasses.asdict(source.preprocess)}
    tree["data"]["tokenizer"] = config.data.tokenizer or source.tokenizer
    return resolve(tree)


def adapt(loaded: LoadedModel, config: Config) -> Params:
    """Parameters of another run, or towers alone, as the start of this one.

    Position grids are resized linearly, and the first of more text positions are taken (not of a
    text tower that pools at the last). Contrastive parameters that the config has no use for are
    left out; heads that towers lack are made from `config.seed`, as the authors do: CLIP's visual
    projection is dropped and the class head starts from random numbers.

    With `checkpoint.class_head_from_projection` the class head's embedding starts from the towers'
    visual projection instead, its bias from the projection's or from zeros. In towers without a
    class token the class embeddings are then those of `Detector.embed_patches`. Where the class
    token is merged into the tokens, the projection reads norm(token · class token), which it has
    not seen in contrastive training: it starts in the right space, not with the right values.

    What `checkpoint.fresh` names comes from `config.seed` too. A tower all of whose parameters it
    names may have another architecture than the checkpoint's.

    Any other difference raises `CheckpointError` with the first parameter or setting that does not
    fit, as do towers without a visual projection where it is asked for.
    """
    where = f"{config.checkpoint.init_from} (config.checkpoint.init_from)"
    if loaded.kind == "resnet":
        raise CheckpointError(f"{where}: a ResNet is a teacher; no detector starts from it")
    if config.checkpoint.class_head_from_projection:
        _check_has_projection(loaded, where)
    target = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    is_fresh = _is_fresh(target, config.checkpoint.fresh)
    anew = [name for name, part in is_fresh.items() if all(jax.tree.leaves(part))]
    towers = [name for name in ("image", "text") if name not in anew]
    keeps_heads = loaded.kind == "detector" and not {*target} <= {*TOWERS, *anew}
    _check_same_architecture(loaded.config, config.model, where, towers, keeps_heads)
    # Towers have no heads, which are made below; a detector may lack the objectness head.
    theirs = {*TOWERS, *loaded.params} if loaded.kind == "towers" else {*target}
    params = loaded.params | {name: target[name] for name in anew if name in theirs}
    image, text = dict(params["image"]), dict(params["text"])
    image["position_embedding"] = _resize_positions(
        image["position_embedding"], target["image"]["position_embedding"].shape[0]
    )
    num_positions = target["text"]["position_embedding"].shape[0]
    if config.model.text.pooling == "end_token" and "text" in towers:
        text["position_embedding"] = text["position_embedding"][:num_positions]
    params = {**params, "image": image, "text": text}
    if config.model.contrastive == "none":
        params, dropped = without_contrastive(params)
        if dropped:
            logging.info(
                "Left out: %s, which only contrastive training uses (config.model.contrastive "
                "is none)",
                ", ".join(dropped),
            )
    if loaded.kind == "towers":
        _compare(params, _towers_of(target), where)
        params |= _fresh_heads(config)
    if config.checkpoint.class_head_from_projection:
        projection = loaded.params["image"]["visual_projection"]
        params["class_head"] = _with_projection(params["class_head"], projection)
    _compare(params, target, where)
    return _with_fresh(params, is_fresh, config)


def _is_fresh(target: PyTree, patterns: tuple[str, ...]) -> PyTree:
    """Which parameters start anew. Raises `ConfigError` for a pattern that fits none."""
    rules = [*((pattern, True) for pattern in patterns), ("", False)]
    return path_rules.apply_rules(target, rules, optional=("",))


def _with_fresh(params: Params, is_fresh: PyTree, config: Config) -> Params:
    if not any(jax.tree.leaves(is_fresh)):
        return params
    made = jax.jit(lambda: build.init_params(config, jax.random.key(config.seed)))()
    logging.info("Freshly initialised: %s", ", ".join(config.checkpoint.fresh))
    return jax.tree.map(lambda old, new, fresh: new if fresh else old, params, made, is_fresh)


def _check_has_projection(loaded: LoadedModel, where: str) -> None:
    if loaded.kind != "towers":
        raise CheckpointError(
            f"{where}: a {loaded.kind} has a class head of its own; unset "
            "config.checkpoint.class_head_from_projection"
        )
    if "visual_projection" not in loaded.params["image"]:
        raise CheckpointError(
            f"{where}: these towers have no visual projection; unset "
            "config.checkpoint.class_head_from_projection"
        )


def _with_projection(class_head: Params, projection: Params) -> Params:
    """The head with the projection's kernel and bias (zeros, if it has none) as its embedding."""
    kernel = projection["kernel"]
    bias = projection.get("bias", jnp.zeros(kernel.shape[1], kernel.dtype))
    logging.info("The class head starts from the visual projection %s", kernel.shape)
    return {**class_head, "embedding": {"kernel": kernel, "bias": bias}}


def _check_same_architecture(
    theirs: ModelConfig, ours: ModelConfig, where: str, towers: Sequence[str], has_heads: bool
) -> None:
    """Settings that change what towers and heads compute but no parameter's shape."""
    keys = ["activation", "norm_epsilon"]
    keys += ["head_activation", "merge_norm_epsilon", "box_bias"] if has_heads else []
    pairs = [(f"model.{key}", getattr(theirs, key), getattr(ours, key)) for key in keys]
    for name in towers:
        a, b = dataclasses.asdict(getattr(theirs, name)), dataclasses.asdict(getattr(ours, name))
        pairs += [(f"model.{name}.{key}", a[key], b[key]) for key in _SAME_IN_TOWERS if key in a]
    for key, a, b in pairs:
        if a != b:
            raise CheckpointError(
                f"{where}: another architecture; {key} is {a!r} there and {b!r} in the config; set "
                "config.checkpoint.model_from_init to take the checkpoint's"
            )


def _fresh_heads(config: Config) -> Params:
    def heads() -> Params:
        params = build.init_params(config, jax.random.key(config.seed))
        return {name: value for name, value in params.items() if name not in TOWERS}

    made = jax.jit(heads)()
    logging.info("Towers loaded; freshly initialised: %s", ", ".join(sorted(made)))
    return made


def _resize_positions(positions: jax.Array, num_positions: int) -> jax.Array:
    """Resizes the grid; a class token's position, in front of a square number of others, stays."""
    if positions.shape[0] == num_positions:
        return positions
    old, new = math.isqrt(positions.shape[0]), math.isqrt(num_positions)
    first = positions[: positions.shape[0] - old * old]
    logging.info("Position grid resized from %d x %d to %d x %d", old, old, new, new)
    grid = positions[first.shape[0] :].reshape(old, old, -1)
    grid = jax.image.resize(grid, (new, new, grid.shape[-1]), "linear")
    return jnp.concatenate([first, grid.reshape(new * new, -1)])


def _tokenizer_entry(file: str) -> dict[str, str] | None:
    """Name and SHA-256 of a tokeniser's file, for the run file."""
    if not file:
        return None
    path = Path(file)
    if path.name not in tokenizer.FILES.values():
        names = " or ".join(sorted(set(tokenizer.FILES.values())))
        raise CheckpointError(f"{path}: a tokeniser file is called {names}")
    return {"file": path.name, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise CheckpointError(f"{path}: more than {MAX_TOKENIZER_BYTES} bytes")
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def _copy_tokenizer(file: Path, folder: Path) -> None:
    target = folder / "tokenizer" / file.name
    if target.exists() and target.samefile(file):
        return
    with files.atomic(target) as partial:
        shutil.copyfile(file, partial)


def _find_tokenizer(folder: Path, entry: Any) -> str:
    """The file that a run file's entry means: in the checkpoint, or in its workdir."""
    if entry is None:
        return ""
    if not isinstance(entry, dict) or entry.get("file") not in tokenizer.FILES.values():
        raise CheckpointError(f"{folder}/run: tokenizer {entry!r} is no known file")
    places = (folder, folder.absolute().parent.parent)
    for path in (place / "tokenizer" / entry["file"] for place in places):
        if path.is_file():
            if _sha256(path) != entry.get("sha256"):
                raise CheckpointError(f"{path}: not the tokeniser of this checkpoint")
            return str(path)
    raise CheckpointError(
        f"{folder}: its tokeniser {entry['file']} is not there; copy the workdir's folder "
        "tokenizer into the checkpoint"
    )


def _of_examples(data: dict[str, Any]) -> dict[str, Any]:
    """The keys of a config's data that change the examples.

    Where the files lie and how many threads read them does not. The tokeniser has its own entry.
    """
    apart = ("path", "tokenizer", "num_workers", "eval", "eval_prompts")
    kept = {key: value for key, value in data.items() if key not in apart}
    sources = kept.get("train", {}).items()
    kept["train"] = {n: {k: v for k, v in x.items() if k != "path"} for n, x in sources}
    return kept


def _run_file(config: Config, step: int, input_version: str) -> dict[str, Any]:
    data = _of_examples(dataclasses.asdict(config.data))
    return {
        "format": FORMAT,
        "kind": "detector" if config.task == "detection" else "towers",
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


def _check_shapes(folder: Path, template: PyTree) -> None:
    """Compares the saved shapes with the model's, from the metadata alone."""
    _compare(_metadata(folder / "params"), template, str(folder))


def _compare(saved: PyTree, template: PyTree, where: str) -> None:
    """Raises `CheckpointError` at the first parameter that is missing, unknown or misshapen."""
    saved_shapes = {
        path_rules.path_name(path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(saved)
    }
    wanted = {
        path_rules.path_name(path): tuple(leaf.shape)
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
