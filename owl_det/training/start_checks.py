"""What is looked at before a run's first step: whether it is done, and whether it can be done."""

from collections.abc import Mapping
from pathlib import Path

import jax
from absl import logging

from data_pipelines.input import TrainInput
from data_pipelines.source import Source
from owl_det import files
from owl_det.checkpoints import step_folders
from owl_det.config import Config
from owl_det.evaluation import data_check
from owl_det.modeling import build
from owl_det.training import gradients, optim, step_shapes
from owl_det.training.processes import value_of_first_process


def is_done(config: Config, folder: Path) -> bool:
    """True if the workdir is at the config's last step or beyond it, and has been evaluated."""
    latest = step_folders.latest_step(folder)
    step = value_of_first_process(-1 if latest is None else latest)
    if step < config.num_steps:
        return False
    if step == config.num_steps and lacks_evaluation(config, folder, step):
        return False
    logging.log(
        logging.INFO if step == config.num_steps else logging.WARNING,
        "%s is already at %s of %s steps: there is nothing to do; another run needs another "
        "--workdir, a longer one a larger config.num_steps",
        *(folder, f"{step:,}", f"{config.num_steps:,}"),
    )
    return True


def check_data(config: Config, data: TrainInput, evaluated: Mapping[str, Source]) -> None:
    """Logs what was read. Raises `DataError` where nothing can be learnt or measured."""
    trained = dict(zip(config.data.train, data.sources, strict=True))
    data_check.log_what_was_read("train", trained)
    data_check.log_what_was_read("eval", evaluated)
    data_check.require_training_labels(config, trained)
    data_check.require_ground_truth(config, evaluated)
    schedule = config.schedule
    if schedule.warmup_steps >= config.num_steps:
        logging.warning(
            "config.schedule.warmup_steps: the warm-up of %d steps is no shorter than the run of "
            "%d: the learning rate never exceeds %.2g",
            *(schedule.warmup_steps, config.num_steps),
            config.optimizer.learning_rate * config.num_steps / schedule.warmup_steps,
        )


def check_before_reading(config: Config, num_data_shards: int) -> None:
    """Raises `ConfigError` for what only branches, devices and the parameters' names tell."""
    if config.distill.active():
        from owl_det.distillation import branches

        branches.check(config)
    step_shapes.batch_shapes(config, num_data_shards)
    if config.optimizer.clip.is_per_example:
        gradients.microbatch_size(config.optimizer.clip, config.batch_size // num_data_shards)
    params = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    optim.groups(params, config.optimizer)


def lacks_evaluation(config: Config, folder: Path, step: int) -> bool:
    """True if an evaluation of this step was due and is not in the log; the same everywhere."""
    is_last = step >= config.num_steps
    if not config.data.eval or not (is_last or is_due(step, config.evaluation.every_steps)):
        return False
    lacks = True
    if jax.process_index() == 0:
        file = folder / "metrics.jsonl"
        lines = files.read_text(file).splitlines() if file.exists() else []
        entries = (line for line in lines if line.startswith(f'{{"step": {step},'))
        # A line that was cut short has no end; the evaluation is done again.
        is_logged = any('"eval/' in line and line.endswith("}") for line in entries)
        is_written = not is_last or (folder / "eval" / "summary.json").exists()
        lacks = not (is_logged and is_written)
    return bool(value_of_first_process(lacks))


def is_due(step: int, every: int) -> bool:
    """Whether what happens `every` steps (0 = never) happens after this one."""
    return every > 0 and step % every == 0
