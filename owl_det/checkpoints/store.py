"""Checkpoints of a training: Orbax directories that it resumes from and inference loads.

    <workdir>/checkpoints/<step>/params      parameters
                                /optimizer   optimiser state and step
                                /run         JSON: model, preprocessing, input position
    <workdir>/tokenizer/                     the tokeniser's file, if it has one

A checkpoint is complete or absent: Orbax writes to a temporary name and renames.
"""

import dataclasses
import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from owl_det import files
from owl_det.checkpoints import arrays, run_file, step_folders, tokenizer_file
from owl_det.checkpoints.damage import DamagedError
from owl_det.config import Config
from owl_det.errors import CheckpointError
from owl_det.modeling import build
from owl_det.types import TrainState


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
        self._tokenizer = tokenizer_file.entry_of(config.data.tokenizer)
        self._saved_step = step_folders.latest_step(workdir)

    @property
    def latest_step(self) -> int | None:
        return self._saved_step

    def begin(self) -> None:
        """Makes the folder and copies the tokeniser's file; what a killed run left half goes."""
        if self._tokenizer is not None and jax.process_index() == 0:
            tokenizer_file.copy(Path(self.config.data.tokenizer), self._workdir)
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
                f"({arrays.reason(error)}){stays}; once it can, the same command goes on from there"
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
        from owl_det.checkpoints import same_run

        saved = run_file.read(folder)
        same_run.check_same_model(saved, current, folder)
        model = build.model_params(template.params)
        arrays.check_shapes(folder, model)
        same_run.check_same_input(saved, current, folder, self._explain)
        training = _training_item(template)
        self._check_optimizer(folder, training)
        params = arrays.read(folder / "params", model)
        optimizer = arrays.read(folder / "optimizer", training)
        branches = {build.BRANCHES: optimizer["branches"]} if "branches" in optimizer else {}
        return TrainState(
            step=optimizer["step"], params={**params, **branches}, opt_state=optimizer["state"]
        )

    def _check_optimizer(self, folder: Path, template: PyTree) -> None:
        """Compares shapes alone: the names of an optimiser's leaves are Orbax's own."""
        saved = arrays.leaf_shapes(arrays.metadata(folder / "optimizer"))
        if saved != arrays.leaf_shapes(template):
            told = [text for part in ("optimizer", "distill") if (text := self._explain(part))]
            raise CheckpointError(
                f"{folder}: its optimiser state does not fit config.optimizer and config.distill "
                f"({'; '.join(told) or 'a key of theirs is another now'}); a new workdir with "
                "config.checkpoint.init_from takes its weights alone"
            )

    def _explain(self, section: str) -> str:
        """Which keys of a section are not what config.json says; empty = it does not tell."""
        from owl_det.checkpoints import same_run

        try:
            before = json.loads(files.read_text(self._workdir / "config.json"))[section]
        except (OSError, ValueError, KeyError, TypeError):
            return ""
        now = json.loads(json.dumps(dataclasses.asdict(self.config)))[section]
        if not isinstance(before, dict):
            return ""
        if section == "data":
            before, now = run_file.of_examples(before), run_file.of_examples(now)
        return same_run.differences(before, now, f"config.{section}.")

    def _run_file(self, step: int, input_version: str) -> dict[str, Any]:
        of_run = {"tokenizer": self._tokenizer, "teachers": self._teacher_ids}
        return (
            run_file.of_training(self.config, step, input_version) | of_run | {"names": self._names}
        )

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
    from owl_det.checkpoints.load import load_model

    try:
        load_model(folder)
        if (folder / "optimizer").is_dir():
            arrays.read(folder / "optimizer", arrays.metadata(folder / "optimizer"))
    except CheckpointError:
        return False
    return True


def _training_item(state: TrainState) -> dict[str, Any]:
    """What only training needs: step, optimiser, parameters of distillation branches."""
    item = {"step": state.step, "state": state.opt_state}
    branches = state.params.get(build.BRANCHES)
    return item | ({"branches": branches} if branches else {})
