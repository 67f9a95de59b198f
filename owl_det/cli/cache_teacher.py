"""`owl-det cache-teacher`: computes what distillation's teachers say, once."""

import argparse
import json

from owl_det.cli.options import Commands, local_path
from owl_det.errors import ExitCode


def add_cache_teacher(commands: Commands) -> None:
    parser = commands.add_parser(
        "cache-teacher", help="compute what distillation's teachers say of every training image"
    )
    parser.add_argument(
        "--config",
        type=local_path,
        required=True,
        metavar="FILE",
        help="of the training; .py, .json",
    )
    parser.add_argument(
        "--set", action="append", default=[], dest="changes", metavar="KEY=VALUE", help="repeat"
    )
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


def _cache_teacher(arguments: argparse.Namespace) -> int:
    """One JSON object of counts on stdout; 1 if images could not be read."""
    from owl_det.distillation import cache_teacher

    counts = cache_teacher.run(
        cache_teacher.read_config(arguments.config, arguments.changes),
        arguments.out,
        shard_size=arguments.shard_size,
        batch_size=arguments.batch_size,
        shard_index=arguments.shard_index,
        shard_step=arguments.shard_step,
    )
    print(json.dumps({"wrote": arguments.out, **counts}))
    return ExitCode.LOSSES if counts["unreadable"] else ExitCode.DONE
