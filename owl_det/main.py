"""`python -m owl_det.main --config=configs/x.py --workdir=…`: trains and evaluates one config."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING

from owl_det import console, files
from owl_det.cli import options
from owl_det.errors import ConfigError, ExitCode, UserError
from owl_det.stop_signal import Stopped, StopSignal

if TYPE_CHECKING:
    from owl_det.config import Config

_KEYS = """\
keys of the config:
  --config.KEY=VALUE changes one, as --config.batch_size=16, --config.data.path=my/data,
  --config.optimizer.learning_rate=1e-4 or --config.data.augment.mosaic_sizes="(1, 2)".
  owl_det/config/ lists all keys with what they mean; --dry_run prints them as they are.

files in the workdir: config.json, metrics.jsonl, checkpoints/, eval/, pictures/. The same command
goes on from the latest checkpoint.

exit codes: 0 done, 2 refused (the last line says why), 75 told to stop (SIGTERM) before the end,
130 Ctrl-C; after both the same command goes on.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, or prints what a training would be; returns an exit code (`errors.ExitCode`)."""
    console.quiet_libraries()
    given = sys.argv[1:] if argv is None else argv
    return console.run("owl_det", lambda: _run(options.with_underscores(given)))


def _run(given: list[str]) -> int:
    from owl_det.config import config_file  # here, where Ctrl-C is one line

    arguments, changes = _parser().parse_known_args(given)
    # A value may stand behind its key: --config.seed 3.
    if changes and not options.is_change(changes[0]):
        raise UserError(f"unknown argument {changes[0]!r}; see python -m owl_det.main --help")
    workdir = _workdir(arguments.workdir)
    config = config_file.read(arguments.config, changes)
    if arguments.dry_run:
        _dry_run(config, workdir, arguments)
        return ExitCode.DONE
    with StopSignal(ends_process=True) as stop, console.timed_lines():
        try:
            return _train(config, workdir, stop)
        except (Stopped, Exception) as error:
            if not isinstance(error, Stopped) and not stop.breaks_off:
                raise
            print("owl_det: stopped before the training began; nothing is lost", file=sys.stderr)
            return stop.code


def _parser() -> argparse.ArgumentParser:
    parser = options.Parser(
        prog="python -m owl_det.main",
        usage="%(prog)s --config=FILE --workdir=FOLDER [--config.KEY=VALUE …]",
        description="Trains and evaluates a detector, or two towers, as a config says.",
        epilog=_KEYS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"owl-det {metadata.version('owl-det')}"
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument("--helpshort", "--helpfull", action="help", help=argparse.SUPPRESS)
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="a .py file with get_config(), a run's config.json, or a shipped config as quickstart",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="FOLDER",
        help="where checkpoints, metrics and pictures go, and where a run goes on",
    )
    _add_dry_run(parser)
    return parser


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    _add_switch(
        parser,
        "dry_run",
        False,
        "print config, parameters, FLOPs and memory; read no data, write nothing",
    )
    parser.add_argument(
        "--dry_run_devices",
        type=int,
        default=0,
        metavar="N",
        help="as if there were so many devices; 0 = those there are",
    )
    parser.add_argument(
        "--dry_run_memory_gib",
        type=float,
        default=0.0,
        metavar="GIB",
        help="memory of a device to hold the estimate against; 0 = its own",
    )
    _add_switch(
        parser,
        "dry_run_compile",
        True,
        "compile the step, for the memory of activations and XLA's count; --nodry_run_compile",
    )


def _add_switch(parser: argparse.ArgumentParser, name: str, default: bool, text: str) -> None:
    """`--name`, `--name=false` and `--noname`."""
    parser.add_argument(
        f"--{name}", nargs="?", const=True, default=default, type=_truth, metavar="BOOL", help=text
    )
    parser.add_argument(
        *(f"--no{name}", f"--no_{name}"),
        action="store_false",
        dest=name,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )


def _truth(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def _workdir(text: str) -> str:
    if not text.strip():
        raise ConfigError("--workdir: is empty; name a folder")
    folder = files.local(text, "--workdir")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--workdir: {folder} is a file, not a folder")
    return str(folder)


def _train(config: "Config", workdir: str, stop: StopSignal) -> int:
    """Joins the other processes, takes the model of a checkpoint if asked to, and runs."""
    import jax
    from absl import logging

    from owl_det.optional import is_installed, leave_accelerators_to_jax
    from owl_det.training import loop

    _join_processes()
    stop.join_processes()
    if is_installed("tensorflow"):
        leave_accelerators_to_jax()
    logging.set_verbosity(logging.INFO if jax.process_index() == 0 else logging.WARNING)
    return loop.run(_with_model(config, workdir), workdir, stop)


def _with_model(config: "Config", workdir: str) -> "Config":
    """`take_model`, imported only where the config asks for it."""
    if not config.checkpoint.model_from_init:
        return config
    from owl_det.checkpoints.inherited_model import take_model

    return take_model(config, workdir)


def _dry_run(config: "Config", workdir: str, arguments: argparse.Namespace) -> None:
    """Prints what the run would be; with `--dry_run_devices` for CPU devices that are not there."""
    import jax

    from owl_det.training import dry_run

    if arguments.dry_run_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", arguments.dry_run_devices)
    dry_run.run(
        _with_model(config, workdir),
        memory_gib=arguments.dry_run_memory_gib,
        with_compile=arguments.dry_run_compile,
    )


def _join_processes() -> None:
    """Starts the distributed runtime if a launcher has set its environment (see launch/)."""
    import jax

    environment = os.environ
    if environment.get("OWL_DET_DISTRIBUTED") == "auto":
        jax.distributed.initialize()
    elif "OWL_DET_COORDINATOR_ADDRESS" in environment:
        jax.distributed.initialize(
            coordinator_address=environment["OWL_DET_COORDINATOR_ADDRESS"],
            num_processes=int(environment["OWL_DET_NUM_PROCESSES"]),
            process_id=int(environment["OWL_DET_PROCESS_ID"]),
        )


def _exit(code: int) -> None:
    """Ends the process; after an error at once where others wait for it.

    JAX's farewell at exit would wait for them: 300 s. Told to stop, all of them leave together.
    """
    is_alone = not {"OWL_DET_DISTRIBUTED", "OWL_DET_COORDINATOR_ADDRESS"} & os.environ.keys()
    is_stopped = code in (ExitCode.UNFINISHED, ExitCode.INTERRUPTED)
    if is_stopped if is_alone else code == ExitCode.REFUSED:
        console.leave(code)
    sys.exit(code)


if __name__ == "__main__":
    _exit(main())
