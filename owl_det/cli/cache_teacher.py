"""`owl-det cache-teacher`: computes what distillation's teachers say, once."""

import argparse
import json
from typing import Any

from owl_det.cli.options import Commands, local_path
from owl_det.errors import ExitCode

_CHANGES = "--config.KEY=VALUE changes a key of the config, as in python -m owl_det.main"


def add_cache_teacher(commands: Commands) -> None:
    parser = commands.add_parser(
        "cache-teacher",
        help="compute what distillation's teachers say of every training image",
        epilog=_CHANGES,
        takes_changes=True,
    )
    parser.add_argument(
        "--config",
        type=local_path,
        required=True,
        metavar="FILE",
        help="of the training; .py, .json",
    )
    parser.add_argument("--set", action=_Refused, help=argparse.SUPPRESS)
    parser.add_argument(
        "--out",
        type=local_path,
        required=True,
        metavar="DIR",
        help="the training's distill.cache",
    )
    parser.add_argument("--shard_size", type=int, default=256, help="images in a file")
    parser.add_argument("--batch_size", type=int, default=8, help="images at once")
    parser.add_argument("--shard_index", type=int, default=0, help="first shard of this process")
    parser.add_argument("--shard_step", type=int, default=1, help="and every so-many-th after it")
    parser.set_defaults(run=_cache_teacher)


class _Refused(argparse.Action):
    """An option of earlier versions: its error says what to write in its place."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        change = str(values).removeprefix("config.")
        parser.error(f"--set is no option any more; write --config.{change}")


def _cache_teacher(arguments: argparse.Namespace) -> int:
    """One JSON object of counts on stdout; 1 if images could not be read."""
    from owl_det.config import config_file
    from owl_det.distillation import cache_teacher

    counts = cache_teacher.run(
        config_file.read(arguments.config, arguments.changes),
        arguments.out,
        shard_size=arguments.shard_size,
        batch_size=arguments.batch_size,
        shard_index=arguments.shard_index,
        shard_step=arguments.shard_step,
    )
    print(json.dumps({"wrote": arguments.out, **counts}))
    return ExitCode.LOSSES if counts["unreadable"] else ExitCode.DONE
