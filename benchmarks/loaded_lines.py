"""Counts the lines of our own modules that each entry point loads; prints JSON.

    python -m benchmarks.loaded_lines CHECKPOINT            # of this checkout
    python -m benchmarks.loaded_lines CHECKPOINT --root DIR # of another one, for comparison

What runs is what a user runs, on the embedded data set, each in a process of its own: `config`, a
config that is read and refused for a value out of range; `train`, one training step with its
checkpoint, without the evaluation that follows; `predict`, one picture; `annotate`, two pictures.
Lines are those of every module of `owl_det`, `data_pipelines` and `configs` that Python holds then.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import command
from owl_det.errors import UserError

PACKAGES = ("owl_det", "data_pipelines", "configs")
TRAIN = (
    *("--config=configs/quickstart.py", "--config.num_steps=1", "--config.batch_size=2"),
    *("--config.schedule.warmup_steps=0", "--config.evaluation.max_images=1"),
)

# Runs in the process that is measured. Evaluation starts where a file of its name is loaded.
_PROBE = """
import json, os, runpy, sys
root, packages, what, *argv = json.loads(os.environ["LOADED_LINES"])
sys.path.insert(0, root)
os.chdir(root)

def count():
    found = {}
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None) or ""
        for package in packages:
            if file.startswith(os.path.join(root, package) + os.sep):
                with open(file, "rb") as lines:
                    found[os.path.relpath(file, root)] = sum(1 for _ in lines)
    return found

def report(found):
    sys.stderr.flush()
    with open(os.environ["LOADED_LINES_OUT"], "w") as out:
        json.dump(found, out)

def at_first_step(event, arguments):
    if event == "open" and str(arguments[0]).endswith("metrics.jsonl") and not done:
        done.append(True)
        report(count())

done = []
if what == "predict":
    import numpy as np
    from owl_det import Predictor
    Predictor.load(argv[0]).detect(np.zeros((32, 32, 3), np.uint8), ["red circle"])
else:
    if what == "train":
        sys.addaudithook(at_first_step)
    sys.argv = argv
    try:
        runpy.run_module(argv[0], run_name="__main__")
    except SystemExit:
        pass
if not done:
    report(count())
"""


def measure(root: Path, checkpoint: Path) -> dict[str, Any]:
    """Lines and files of each entry point, and the largest files."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        arguments = {
            "config": ("owl_det.main", f"--workdir={out}/refused", *TRAIN, "--config.seed=-1"),
            "train": ("owl_det.main", f"--workdir={out}/run", *TRAIN),
            "predict": (str(checkpoint),),
            "annotate": (
                *("owl_det.cli", "annotate", "--checkpoint", str(checkpoint)),
                *("--input", "shapes_world:train:2", "--vocabulary", "shapes_world"),
                *("--output", f"{out}/records"),
            ),
        }
        return {name: _entry(root, name, argv, out) for name, argv in arguments.items()}


def _entry(root: Path, name: str, argv: tuple[str, ...], out: Path) -> dict[str, Any]:
    answer = out / f"{name}.json"
    environment = os.environ | {
        "LOADED_LINES": json.dumps([str(root), PACKAGES, name, *argv]),
        "LOADED_LINES_OUT": str(answer),
    }
    done = subprocess.run(
        [sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True
    )
    if not answer.is_file():
        raise UserError(f"{name} did not run in {root}: {done.stderr[-500:]}")
    found: dict[str, int] = json.loads(answer.read_text())
    largest = sorted(found, key=lambda file: -found[file])[:5]
    return {
        "lines": sum(found.values()),
        "files": len(found),
        "largest": {file: found[file] for file in largest},
    }


def main(argv: list[str] | None = None) -> int:
    parser: argparse.ArgumentParser = command.parser(__doc__)
    parser.add_argument("checkpoint", metavar="DIR", help="a detector's checkpoint or workdir")
    parser.add_argument(
        "--root", default=".", help="checkout that is measured (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    root, checkpoint = Path(arguments.root).resolve(), Path(arguments.checkpoint).resolve()
    return command.exit_code(
        "loaded_lines", lambda: print(json.dumps(measure(root, checkpoint), indent=2))
    )


if __name__ == "__main__":
    sys.exit(main())
