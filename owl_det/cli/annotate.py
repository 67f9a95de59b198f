"""`owl-det annotate` and `annotate-precision`: pseudo-boxes, and how many are right."""

import argparse
import json
import sys
from pathlib import Path

from owl_det.cli.options import Commands, add_checkpoint, local_path
from owl_det.errors import ExitCode


def add_annotate(commands: Commands) -> None:
    parser = commands.add_parser("annotate", help="pseudo-boxes for image-text pairs (OWL-ST)")
    add_checkpoint(parser, "the annotator")
    parser.add_argument(
        "--input",
        required=True,
        help="folder of .tar or .tfrecord files or of images, or shapes_world:SPLIT:NUM[:SIZE]",
    )
    parser.add_argument(
        "--output",
        type=local_path,
        required=True,
        metavar="DIR",
        help="folder of the records",
    )
    _add_labels(parser)
    _add_floors(parser)
    _add_shards(parser)
    parser.set_defaults(run=_annotate)


def _add_labels(parser: argparse.ArgumentParser) -> None:
    """What the annotator is asked for."""
    parser.add_argument(
        "--labels",
        default="union",
        help="curated, ngrams, noun_phrases, union (curated and ngrams), union_noun_phrases, or a "
        "list of names as in --vocabulary",
    )
    parser.add_argument(
        "--vocabulary",
        dest="vocabularies",
        action="append",
        default=[],
        help="curated names: text or COCO JSON file, tfds:BUILDER, shapes_world; repeat to merge",
    )
    parser.add_argument(
        "--max_ngrams", type=int, default=300, help="N-grams or noun phrases of one image"
    )
    parser.add_argument(
        "--prompts", default="", choices=["", "none", "clip", "clip_best7"], help="ensemble of"
    )


def _add_floors(parser: argparse.ArgumentParser) -> None:
    """Which boxes the records keep, and which of them training takes."""
    parser.add_argument("--min_box_score", type=float, default=0.1, help="of a box that trains")
    parser.add_argument("--min_image_score", type=float, default=0.3, help="of an image's best box")
    parser.add_argument(
        "--keep_below",
        type=float,
        default=0.05,
        help="weaker boxes stay in the records down to this score; 1 = none do",
    )
    parser.add_argument(
        "--hard_negatives",
        type=int,
        default=0,
        help="of each image, so many curated names that are wrongly detected; 0 = none",
    )


def _add_shards(parser: argparse.ArgumentParser) -> None:
    """How the work is cut, and what runs it."""
    parser.add_argument("--batch_size", type=int, default=8, help="images at once")
    parser.add_argument("--num_threads", type=int, default=0, help="that decode; 0 = one a core")
    parser.add_argument(
        "--shards",
        dest="num_shards",
        type=int,
        default=0,
        help="cut a folder of images or shapes world into so many; files are shards already",
    )
    parser.add_argument("--shard_index", type=int, help="do only this shard")
    parser.add_argument("--shard_step", type=int, default=0, help="and every so-many-th after it")
    parser.add_argument("--runner", choices=["direct", "beam"], default="direct", help="engine")
    parser.add_argument(
        "--beam_option", action="append", default=[], help="--beam_option=--runner=…; repeat"
    )


def _annotate(arguments: argparse.Namespace) -> int:
    """Prints the counts of all complete shards as one JSON line, and on stderr what was found.

    `LOSSES` if of the images of this process's shards more than one, and more than 1 %, were
    unreadable, if a shard gave no image, or if one is damaged.
    """
    from owl_det.annotate import summary
    from owl_det.annotate.run import run_job, settings_of, shard_range

    done = run_job(
        settings_of(arguments),
        shard_index=arguments.shard_index,
        shard_step=arguments.shard_step,
        runner=arguments.runner,
        beam_options=arguments.beam_option,
    )
    print(json.dumps(summary.as_json(done.counts())))
    mine = shard_range(len(done.shards), arguments.shard_index, arguments.shard_step)
    said = summary.of_job(done, mine)
    for line in (*said.lines, *said.losses):
        print(f"owl-det: {line}", file=sys.stderr)
    return ExitCode.LOSSES if said.losses else ExitCode.DONE


def add_annotate_precision(
    commands: Commands,
) -> None:
    parser = commands.add_parser(
        "annotate-precision", help="share of right pseudo-boxes, where the truth is known"
    )
    parser.add_argument(
        "records", type=local_path, metavar="RECORDS", help="what owl-det annotate wrote"
    )
    parser.add_argument(
        "--source",
        default="",
        help="the truth: shapes_world:SPLIT:NUM[:SIZE] (default: the job's --input), or of a "
        "folder of images a source as in a config, kind=coco,path=ROOT,annotations=FILE,images=DIR",
    )
    parser.add_argument("--min_box_score", type=float, help="as in training; default: the job's")
    parser.add_argument("--min_image_score", type=float, help="likewise")
    parser.add_argument(
        "--out",
        type=local_path,
        metavar="FILE.json",
        help="where to write the same as JSON",
    )
    parser.set_defaults(run=_annotate_precision)


def _annotate_precision(arguments: argparse.Namespace) -> int:
    """A table on stdout; JSON with `--out`."""
    from data_pipelines import pseudo_records
    from owl_det.annotate import precision

    content = precision.run(
        arguments.records,
        arguments.source,
        min_box_score=arguments.min_box_score,
        min_image_score=arguments.min_image_score,
    )
    print(precision.table(content))
    if arguments.out:
        pseudo_records.write_json(Path(arguments.out), content)
    return 0
