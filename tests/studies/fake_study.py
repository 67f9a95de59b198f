"""A study whose arms take no time: `python -m tests.studies.fake_study arm …` is its program.

As a study: `python -m tests.studies.fake_study study RESULTS WORKDIR ARMS`.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studies import command
from studies.study import Arm, Claim, Study

MODULE = "tests.studies.fake_study"


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def arm(name: str, *options: str, needs: Sequence[str] = (), **fields: Any) -> Arm:
    """Writes its value, plus those of the arms it needs; notes each call in calls.txt."""
    command = (MODULE, "arm", "--out={out}", "--seed={seed}", *options)
    command += tuple(f"--add={{{needed}}}" for needed in needs)
    return Arm(name=name, commands=(command,), read=read, needs=tuple(needs), **fields)


def study(results: Path, *study_arms: Arm, **fields: Any) -> Study:
    given = {"name": "fake", "title": "A study", "claims": (), "main": (study_arms[0].name,)}
    return Study(results=results, arms=study_arms, **{**given, **fields})


def chain(results: Path) -> Study:
    """`second` needs `first`, `third` needs `second`."""
    return study(
        results,
        arm("first", "--value=1"),
        arm("second", "--value=10", needs=("first",)),
        arm("third", "--value=100", needs=("second",)),
        claims=(Claim(statement="More", arm="second", control="first", metric="value"),),
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--value", type=float, default=0.0)
    parser.add_argument("--add", type=Path, action="append", default=[])
    parser.add_argument("--config", help="ignored, as far as the program goes")
    parser.add_argument("--wait_for", type=Path, help="sleeps until this file is there")
    parser.add_argument("--fail_without", type=Path)
    arguments = parser.parse_args(argv)
    with (arguments.out / "calls.txt").open("a") as file:
        file.write("call\n")
    print("a line of the log", flush=True)
    while arguments.wait_for and not arguments.wait_for.exists():
        time.sleep(0.02)
    if arguments.fail_without and not arguments.fail_without.exists():
        sys.exit("what went wrong")
    values = [
        json.loads((folder / "metrics.json").read_text())["value"] for folder in arguments.add
    ]
    metrics = {"value": arguments.value + arguments.seed + sum(values)}
    (arguments.out / "metrics.json").write_text(json.dumps(metrics))
    return 0


def run_study(results: str, workdir: str, wait_for: str) -> int:
    """`slow` needs `first`, and ends when there is a file `wait_for`."""
    slow = arm("slow", f"--wait_for={wait_for}", needs=("first",))
    whole = study(Path(results), arm("first", "--value=1"), slow)
    settings = {"draw": False, "workdir": Path(workdir), "report": True, "arms": "", "seeds": 1}
    settings["jobs"] = 1
    namespace = argparse.Namespace(**settings)
    return command.execute(whole, namespace, lambda study, _: study.results)


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    sys.exit(run_study(*rest) if kind == "study" else main(rest))
