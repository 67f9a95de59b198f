"""`owl-det ensemble`: averages two checkpoints of one model."""

import argparse
import json

from owl_det.cli.options import Commands, local_path
from owl_det.errors import ExitCode, UserError


def add_ensemble(commands: Commands) -> None:
    parser = commands.add_parser("ensemble", help="average two checkpoints of one model")
    parser.add_argument(
        "--self_trained",
        type=local_path,
        required=True,
        metavar="DIR",
        help="has weight 1 - w",
    )
    parser.add_argument(
        "--fine_tuned",
        type=local_path,
        required=True,
        metavar="DIR",
        help="has weight w",
    )
    parser.add_argument("--weight", type=float, help="w; writes the checkpoint")
    weights = "0,0.2,0.4,0.6,0.8,1"
    parser.add_argument(
        "--sweep",
        nargs="?",
        const=weights,
        metavar="WEIGHTS",
        help=f"evaluates weights instead, by default {weights}",
    )
    parser.add_argument(
        "--out", type=local_path, metavar="DIR", help="default: runs/ensemble, runs/sweep"
    )
    source = "kind=shapes_world,split=test"
    parser.add_argument(
        "--in_domain",
        default=f"{source},group=base",
        help="with --sweep: a source as in a config, and a group of its names",
    )
    parser.add_argument("--out_of_domain", default=f"{source},group=novel", help="likewise")
    parser.add_argument("--max_images", type=int, default=512, help="of each; 0 = all")
    parser.set_defaults(run=_ensemble)


def _ensemble(arguments: argparse.Namespace) -> int:
    """Writes one checkpoint, or evaluates a range of weights and draws the trade-off."""
    from owl_det.evaluation import ensemble

    if (arguments.weight is None) == (arguments.sweep is None):
        raise UserError("ensemble: give either --weight or --sweep")
    if arguments.weight is not None:
        out = arguments.out or "runs/ensemble"
        ensemble.save(arguments.self_trained, arguments.fine_tuned, arguments.weight, out)
        print(json.dumps({"wrote": out, "weight": arguments.weight}))
        return ExitCode.DONE
    points = ensemble.sweep(
        arguments.self_trained,
        arguments.fine_tuned,
        ensemble.parse_weights(arguments.sweep),
        arguments.out or "runs/sweep",
        in_domain=arguments.in_domain,
        out_of_domain=arguments.out_of_domain,
        max_images=arguments.max_images,
    )
    for point in points:
        print(json.dumps(point))
    return ExitCode.DONE
