"""Arms of a study: commands a user would type, run in order, resumable, one small JSON each.

An arm is finished when `RESULTS/<arm>-seed<k>.json` is there and names the same commands. A killed
study goes on with the arm it was in: trainings resume from their own checkpoints, annotation from
its own shards.
"""

import hashlib
import importlib
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from owl_det.errors import UserError

Metrics = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training, annotation or evaluation.

    In its commands `{out}` is the arm's own folder, `{seed}` the seed, and `{name}` the folder of
    another arm, which is run before. `read` takes the folder and gives the metrics to keep.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]  # arguments after "python -m"
    read: Callable[[Path], Metrics]
    needs: tuple[str, ...] = ()
    title: str = ""  # what it is, for the report


@dataclass(frozen=True, kw_only=True)
class Claim:
    """`arm` beats `control` on `metric`, if it holds; a row of the report."""

    statement: str
    arm: str
    control: str
    metric: str
    # The claim is that arm - control is at least this (in the metric's unit; -0.01: costs at most a
    # point).
    at_least: float = 0.0
    note: str = ""  # a thought on the outcome, written once the numbers are there


@dataclass(frozen=True, kw_only=True)
class Study:
    name: str
    title: str
    arms: tuple[Arm, ...]
    main: tuple[str, ...]  # the arms of the short run: every stage once
    claims: tuple[Claim, ...]
    results: Path  # where the JSON of finished arms is kept, with the report
    pictures: tuple[tuple[str, str, str], ...] = ()  # caption, arm, file in the arm's folder

    def arm(self, name: str) -> Arm:
        """Raises `UserError` if there is none of that name."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise UserError(f"no arm {name!r}; there are {', '.join(arm.name for arm in self.arms)}")


def run(study: Study, names: Iterable[str], seeds: Sequence[int], workdir: Path) -> None:
    """Runs the arms that are not finished, those they need first, seed by seed.

    Raises `UserError` where a command fails; its log says why.
    """
    wanted = _with_needs(study, names)
    todo = [(seed, arm) for seed in seeds for arm in wanted if not is_finished(study, arm, seed)]
    started = time.time()
    for done, (seed, arm) in enumerate(todo):
        passed = time.time() - started
        eta = f", about {passed / done * (len(todo) - done) / 60:.0f} min left" if done else ""
        print(f"[{done + 1}/{len(todo)}] seed {seed}: {arm.name}{eta}", flush=True)
        _run_arm(study, arm, seed, workdir)
    print(f"{len(todo)} arms in {(time.time() - started) / 60:.1f} min", flush=True)


def result_file(study: Study, arm: Arm, seed: int) -> Path:
    return study.results / f"{arm.name}-seed{seed}.json"


def is_finished(study: Study, arm: Arm, seed: int) -> bool:
    """True if the arm's result is there, and of these commands and configs."""
    file = result_file(study, arm, seed)
    return file.exists() and json.loads(file.read_text())["digest"] == digest(study, arm)


def digest(study: Study, arm: Arm) -> str:
    """Twelve hex digits of all that decides an arm's result but seed, code and machine.

    Its commands and configs, and those of the arms that it needs.
    """
    parts = [digest(study, study.arm(needed)) for needed in arm.needs]
    for command in arm.commands:
        parts += command
        configs = [part.removeprefix("--config=") for part in command if "--config=" in part]
        parts += [_config_digest(Path(file).stem) for file in configs]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


@cache
def _config_digest(name: str) -> str:
    tree = importlib.import_module(f"configs.{name}").get_config().to_dict()
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _with_needs(study: Study, names: Iterable[str]) -> list[Arm]:
    """The arms and all they need, each after what it needs."""
    ordered: list[Arm] = []

    def add(name: str) -> None:
        arm = study.arm(name)
        for needed in arm.needs:
            add(needed)
        if arm not in ordered:
            ordered.append(arm)

    for name in names:
        add(name)
    return ordered


def _shown(arm: Arm) -> list[str]:
    """The commands as the result keeps them: without folders and seeds."""
    return [shlex.join(["python", "-m", *command]) for command in arm.commands]


def _run_arm(study: Study, arm: Arm, seed: int, workdir: Path) -> None:
    root = workdir / f"seed{seed}"
    folders = {other.name: str(root / other.name) for other in study.arms}
    places = {**folders, "out": folders[arm.name], "seed": str(seed)}
    folder = Path(folders[arm.name])
    for needed in arm.needs:
        if not Path(folders[needed]).exists():
            # Finished elsewhere: its numbers are kept, its weights are not.
            _run_arm(study, study.arm(needed), seed, workdir)
    _claim_folder(folder, digest(study, arm))
    started = time.time()
    for command in arm.commands:
        _call([part.format_map(places) for part in command], folder)
    result = {
        "study": study.name,
        "arm": arm.name,
        "seed": seed,
        "commit": _git("rev-parse", "HEAD"),
        "is_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "commands": _shown(arm),
        "digest": digest(study, arm),
        "seconds": round(time.time() - started, 1),
        "machine": f"{platform.machine()}, {_num_cores()} cores, Python {platform.python_version()}",
        "metrics": arm.read(folder),
    }
    study.results.mkdir(parents=True, exist_ok=True)
    file = result_file(study, arm, seed)
    partial = file.with_suffix(".tmp")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(file)


def _claim_folder(folder: Path, digest: str) -> None:
    """A folder belongs to one version of an arm: what is half done of another is no start."""
    file = folder / "digest"
    if not folder.exists():
        folder.mkdir(parents=True)
        file.write_text(digest)
    if not file.exists() or file.read_text() != digest:
        raise UserError(
            f"{folder}: holds another version of this arm; remove it or name a new --workdir"
        )


def _call(arguments: Sequence[str], folder: Path) -> None:
    """Runs `python -m …`; output goes to the arm's log, a failure's last lines to the screen."""
    log = folder / "log.txt"
    with log.open("a") as file:
        file.write(f"$ python -m {shlex.join(arguments)}\n")
        file.flush()
        done = subprocess.run([sys.executable, "-m", *arguments], stdout=file, stderr=file)
    if done.returncode:
        lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
        tail = "\n".join(line for line in lines[-15:] if line.strip())
        raise UserError(f"python -m {shlex.join(arguments)} failed; {log} ends with:\n{tail}")


def _git(*arguments: str) -> str:
    root = Path(__file__).parent
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "no repository"


def _num_cores() -> int:
    import psutil

    return len(psutil.Process().cpu_affinity() or []) or psutil.cpu_count() or 1


def main(study: Study, arguments: Any, write_report: Callable[[Study, Path | None], Path]) -> int:
    """What a study's command does with its arguments."""
    if not arguments.draw:
        if arguments.workdir is None:
            raise UserError("--workdir: name a folder for checkpoints, records and logs")
        names = [arm.name for arm in study.arms] if arguments.report else list(study.main)
        if arguments.arms:
            names = arguments.arms.split(",")
        run(study, names, range(arguments.seeds), arguments.workdir)
    print(write_report(study, arguments.workdir))
    return 0
