"""The command line of a study, `python -m studies.<name>`."""

import argparse
import dataclasses
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from owl_det.errors import UserError
from owl_det.optional import installation, is_installed
from studies import engine
from studies.study import REPORT_SEEDS, Study


def run_study(study: Study, description: str | None, argv: Sequence[str] | None) -> int:
    """`python -m studies.<name>`: runs arms and draws the report. Returns 2 for a user's error."""
    arguments: Any = _parser(study, description).parse_args(argv)
    from studies import report  # its plots take a second, which help need not wait for

    try:
        return execute(study, arguments, report.write)
    except UserError as error:
        print(f"studies.{study.name}: {error}", file=sys.stderr)
        return 2


def _parser(study: Study, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m studies.{study.name}", description=description
    )
    parser.add_argument("--workdir", type=Path, help="checkpoints, records, logs, results")
    parser.add_argument("--seeds", type=int, help="how many, from 0; default: 1, of --report 3")
    parser.add_argument("--jobs", type=int, default=1, help="arms at once, which share the cores")
    parser.add_argument(
        "--report", action="store_true", help="every arm; adds to the results of the repository"
    )
    parser.add_argument("--arms", default="", help="only these, separated by commas")
    parser.add_argument(
        "--draw",
        action="store_true",
        help="draw the report of what is there, run nothing; without --workdir the repository's",
    )
    return parser


def execute(
    study: Study, arguments: Any, write_report: Callable[[Study, Path | None], Path]
) -> int:
    """What a study's command does with its arguments."""
    if arguments.workdir and not arguments.report:
        # a run of one's own: what is committed neither ends nor mixes in
        study = dataclasses.replace(study, results=arguments.workdir / "results")
    if arguments.draw:
        print(write_report(study, arguments.workdir))
        return 0
    if arguments.workdir is None:
        raise UserError("--workdir: name a folder for checkpoints, records and logs")
    for package, extra in study.extras:  # now, not after hours
        if not is_installed(package):
            raise UserError(f"this study needs {package}: {installation(extra)}")
    names = [arm.name for arm in study.arms] if arguments.report else list(study.main)
    if arguments.arms:
        names = arguments.arms.split(",")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    seeds = arguments.seeds or (REPORT_SEEDS if arguments.report else 1)
    try:
        engine.run(study, names, range(seeds), arguments.workdir, arguments.jobs)
    finally:
        print(write_report(study, arguments.workdir))
    return 0
