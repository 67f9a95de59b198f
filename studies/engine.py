"""Runs the arms of a study in order, several at once if asked to, each where it was left.

A killed study goes on with the arm it was in: trainings resume from their own checkpoints,
annotation from its own shards.
"""

import itertools
import json
import platform
import shlex
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from owl_det import files
from owl_det.errors import UserError
from studies.result_files import (
    as_json,
    digest,
    is_finished,
    outcome_digest,
    read_result,
    result_file,
    write_result,
)
from studies.study import ROOT, Arm, Study
from studies.workers import Workers


def run(
    study: Study, names: Iterable[str], seeds: Sequence[int], workdir: Path, jobs: int = 1
) -> None:
    """Runs the arms that are not finished and those they need, `jobs` at once, seed by seed.

    Raises `UserError` where a command fails; its log says why.
    """
    workdir = workdir.resolve()
    workers = Workers(jobs)
    wanted = _with_needs(study, names)
    every = (
        (arm.seed(seed), arm) for seed in seeds for arm in _to_run(study, wanted, workdir, seed)
    )
    todo = list(dict.fromkeys(every))  # a shared arm once
    started = time.time()
    count = itertools.count(1)

    def work(task: tuple[int, Arm]) -> None:
        seed, arm = task
        number, passed = next(count), time.time() - started
        left = passed / (number - jobs) * (len(todo) - number + 1) if number > jobs else 0
        eta = f", about {left / 60:.0f} min left" if left else ""
        print(f"[{number}/{len(todo)}] seed {seed}: {arm.name}{eta}", flush=True)
        _run_arm(study, arm, seed, workdir, workers)

    needs = {
        (seed, arm): [
            other
            for other in todo
            if other[1].name in arm.needs and other[0] == other[1].seed(seed)
        ]
        for seed, arm in todo
    }
    workers.run(todo, needs, work)
    print(f"{len(todo)} arms in {(time.time() - started) / 60:.1f} min", flush=True)


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


def _to_run(study: Study, wanted: Sequence[Arm], workdir: Path, seed: int) -> list[Arm]:
    """Of the wanted arms those that are not finished, and what must be made again for them.

    Of an arm finished elsewhere the numbers are kept, the weights are not: it runs again, and its
    numbers are written anew, so that they are those of the weights that others start from.
    """
    chosen: set[str] = set()

    def add(arm: Arm) -> None:
        chosen.add(arm.name)
        for needed in map(study.arm, arm.needs):
            if not _Progress(_folder(workdir, seed, needed), digest(study, needed)).is_done:
                add(needed)

    for arm in wanted:
        if not is_finished(study, arm, seed):
            add(arm)
    return [arm for arm in wanted if arm.name in chosen]


def _folder(workdir: Path, seed: int, arm: Arm) -> Path:
    return workdir / f"seed{arm.seed(seed)}" / arm.name


def _run_arm(study: Study, arm: Arm, seed: int, workdir: Path, workers: Workers) -> None:
    folder = _folder(workdir, seed, arm)
    places = {other.name: str(_folder(workdir, seed, other)) for other in study.arms}
    places |= {"out": str(folder), "seed": str(seed)}
    progress = _Progress(folder, digest(study, arm))
    progress.start()
    for command in arm.commands:
        workers.call([part.format_map(places) for part in command], folder / "log.txt", ROOT)
    _require_whole(folder)
    metrics = arm.read(folder)
    result = {
        "study": study.name,
        "arm": arm.name,
        "seed": seed,
        "commit": progress.commits[-1],
        "commits": progress.commits,
        "is_dirty": _is_dirty(),
        "commands": [shlex.join(["python", "-m", *command]) for command in arm.commands],
        "digest": digest(study, arm),
        "seconds": round(progress.finish(), 1),
        "machine": _machine(workers.cores_each),
        "needs": {
            name: outcome_digest(read_result(result_file(study, study.arm(name), seed)))
            for name in arm.needs
        },
        "metrics": metrics,
    }
    write_result(study, result)


def _require_whole(folder: Path) -> None:
    """Raises `UserError` if the folder holds a training that was stopped on the way."""
    config, log = folder / "config.json", folder / "metrics.jsonl"
    if config.exists() and log.exists():
        wanted = json.loads(config.read_text())["num_steps"]
        last = max((json.loads(line)["step"] for line in log.read_text().splitlines()), default=0)
        if last < wanted:
            raise UserError(
                f"{folder}: its training was stopped at step {last} of {wanted}; "
                "the same command goes on from there"
            )


class _Progress:
    """What an arm's folder holds, in arm.json: which version of the arm, for how long, if all."""

    def __init__(self, folder: Path, digest: str):
        self._folder, self._file, self._digest = folder, folder / "arm.json", digest
        self._state: dict[str, Any] = {"digest": digest, "is_done": False, "seconds": 0.0}
        if self._file.exists():
            self._state = json.loads(self._file.read_text())

    @property
    def is_done(self) -> bool:
        return self._state["is_done"] and self._state["digest"] == self._digest

    @property
    def commits(self) -> list[str]:
        """Of the code that has run, in order."""
        return self._state.get("commits", [])

    def start(self) -> None:
        """Raises `UserError` if the folder is another version's: half of that is no start."""
        if self._state["digest"] != self._digest or (
            self._folder.exists() and not self._file.exists()
        ):
            raise UserError(
                f"{self._folder}: holds another version of this arm; remove it or name a new "
                "--workdir"
            )
        log = self._folder / "log.txt"
        if "started" in self._state and log.exists():
            # The attempt before was killed; its last line is from when it was still running.
            self._state["seconds"] += max(0.0, log.stat().st_mtime - self._state["started"])
        commit = _git("rev-parse", "HEAD") or "no repository"
        if self.commits[-1:] != [commit]:
            self._state["commits"] = [*self.commits, commit]
        self._write(is_done=False, started=time.time())

    def finish(self) -> float:
        """Seconds of all attempts together."""
        seconds = self._state["seconds"] + time.time() - self._state.pop("started")
        self._write(is_done=True, seconds=seconds)
        return seconds

    def _write(self, **changes: Any) -> None:
        self._state.update(changes)
        self._folder.mkdir(parents=True, exist_ok=True)
        files.write_atomic(self._file, as_json(self._state))


def _git(*arguments: str) -> str:
    """What git prints; nothing where there is no repository."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _is_dirty() -> bool:
    """True if code differs from the commit; results of studies are no code."""
    paths = ("--", ":/", ":(top,exclude)studies/results")
    return bool(_git("status", "--porcelain", "--untracked-files=no", *paths))


def _machine(num_cores: int) -> str:
    """`num_cores` are those that the arm could use."""
    return f"{platform.machine()}, {num_cores} cores, Python {platform.python_version()}"
