"""`python -m owl_det.main --config=configs/x.py --workdir=…`: trains and evaluates one config."""

import logging as std_logging
import os
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from owl_det import checkpoint, train
from owl_det import config as config_lib
from owl_det.errors import UserError
from owl_det.optional import is_installed, leave_accelerators_to_jax
from owl_det.resolve import resolve

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and pictures go.")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print config, parameters, FLOPs and memory; read no data, write nothing."
)
_DRY_RUN_DEVICES = flags.DEFINE_integer(
    "dry_run_devices", 0, "As if there were so many devices; 0 = those there are."
)
_DRY_RUN_MEMORY_GIB = flags.DEFINE_float(
    "dry_run_memory_gib", 0.0, "Memory of a device to hold the estimate against; 0 = its own."
)
_DRY_RUN_COMPILE = flags.DEFINE_bool(
    "dry_run_compile", True, "Compile the step, for the memory of activations and XLA's count."
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    """Joins the other processes, resolves the config and runs it."""
    if len(argv) > 1:
        raise UserError(f"unknown arguments {argv[1:]}")
    try:
        tree = _CONFIG.value.to_dict()
    except OSError as error:  # the file is read when the config is first looked at
        raise UserError(f"--config: {error}") from None
    config = resolve(tree)
    if _DRY_RUN.value:
        _dry_run(config)
        return
    _join_processes()
    if is_installed("tensorflow"):
        leave_accelerators_to_jax()
    logging.set_verbosity(logging.INFO if jax.process_index() == 0 else logging.WARNING)
    _quiet_libraries()
    config = checkpoint.take_model(config, str(_WORKDIR.value))
    train.run(config, str(_WORKDIR.value))


def _dry_run(config: config_lib.Config) -> None:
    """Prints what the run would be; with `--dry_run_devices` for CPU devices that are not there."""
    from owl_det import dry_run

    if _DRY_RUN_DEVICES.value:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", _DRY_RUN_DEVICES.value)
    dry_run.run(
        checkpoint.take_model(config, str(_WORKDIR.value)),
        memory_gib=_DRY_RUN_MEMORY_GIB.value,
        with_compile=_DRY_RUN_COMPILE.value,
    )


def _join_processes() -> None:
    """Starts the distributed runtime if a launcher has set its environment (see launch/)."""
    environment = os.environ
    if environment.get("OWL_DET_DISTRIBUTED") == "auto":
        jax.distributed.initialize()
    elif "OWL_DET_COORDINATOR_ADDRESS" in environment:
        jax.distributed.initialize(
            coordinator_address=environment["OWL_DET_COORDINATOR_ADDRESS"],
            num_processes=int(environment["OWL_DET_NUM_PROCESSES"]),
            process_id=int(environment["OWL_DET_PROCESS_ID"]),
        )


def _quiet_libraries() -> None:
    """Orbax logs every step of a save through absl; only its warnings are of interest."""
    logging.get_absl_handler().addFilter(
        lambda record: record.levelno > std_logging.INFO or "/orbax/" not in record.pathname
    )


def _fail(error: Exception) -> None:
    # Input threads may still be logging what they skip: the error shall be the last line.
    logging.set_verbosity(logging.FATAL)
    text = str(error if isinstance(error, OSError) or not error.args else error.args[0])
    if "Traceback (most recent call last)" in text:  # of an error in a config file
        text = text.strip().splitlines()[-1]
    print(f"owl_det: {' '.join(text.split())}", file=sys.stderr, flush=True)
    _exit(2)


def _exit(code: int) -> None:
    """Where others wait for this process, JAX's farewell at exit would wait for them: 300 s."""
    if jax.distributed.is_initialized():  # a count of processes would start the accelerator
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; a bad flag or config key is one line and exit code 2."""
    try:
        return flags.FLAGS(argv)
    except (
        *(flags.Error, UserError, AttributeError, KeyError, TypeError, ValueError),
        *(OSError, ImportError),
    ) as error:
        _fail(error)
        raise


def _main(argv: list[str]) -> None:
    try:
        main(argv)
    except UserError as error:
        _fail(error)


if __name__ == "__main__":
    app.run(_main, flags_parser=_parse)
