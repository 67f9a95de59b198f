"""Arms of a study: commands a user would type, run in order, resumable, one small JSON each.

An arm is finished when `RESULTS/<arm>-seed<k>.json` is there and names the same commands, and what
it started from has not been run again with another outcome. A killed study goes on with the arm it
was in: trainings resume from their own checkpoints, annotation from its own shards.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import platform
import runpy
import shlex
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from owl_det import config as schema
from owl_det.errors import UserError
from owl_det.optional import installation, is_installed
from studies.workers import Workers

ROOT = Path(__file__).resolve().parents[1]  # where commands run
REPORT_SEEDS = 3  # of every arm, so that a claim can be told from noise
SPEEDS = ("images_per_second",)  # metrics that no two runs share
Metrics = dict[str, Any]
DETECTION_COLUMNS = (
    ("AP50 base", "AP50_base"),
    ("AP50 novel", "AP50_novel"),
    ("AP50 novel combination", "AP50_novel_combination"),
    ("AP50 novel word", "AP50_novel_word"),
    ("region top-1 base", "region_top1_base"),
    ("region top-1 novel combination", "region_top1_novel_combination"),
    ("region top-1 novel word", "region_top1_novel_word"),
)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training, annotation or evaluation.

    In its commands `{out}` is the arm's own folder, `{seed}` the seed, and `{name}` the folder of
    another arm, which `needs` names and which is run before. `read` takes the folder and gives the
    metrics to keep. Commands must be such that running one again goes on with it.

    A shared arm is run once, with seed 0, and serves every seed: a teacher, say, that all students
    have in common.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]  # arguments after "python -m"
    read: Callable[[Path], Metrics]
    needs: tuple[str, ...] = ()
    title: str = ""  # what it is, for the report
    is_shared: bool = False

    def seed(self, seed: int) -> int:
        """The seed of its run that serves `seed`."""
        return 0 if self.is_shared else seed


@dataclass(frozen=True, kw_only=True)
class Claim:
    """arm − times · control is at least `at_least`; a row of the report.

    `metric` is a key of the arms' metrics, or `curve:KEY`, the mean over the steps of their curve.
    Without a control the metric itself is at least `at_least`.
    """

    statement: str
    arm: str
    control: str
    metric: str
    at_least: float = 0.0  # in the metric's unit; -0.01 of an AP costs at most a point
    times: float = 1.0  # 2: the arm at least doubles the control
    note: str = ""  # a thought on the outcome, written once the numbers are there


@dataclass(frozen=True, kw_only=True)
class Study:
    name: str
    title: str
    arms: tuple[Arm, ...]
    main: tuple[str, ...]  # the arms of the short run: every stage once
    claims: tuple[Claim, ...]
    results: Path  # where the JSON of finished arms is kept, with the report
    extras: tuple[tuple[str, str], ...] = ()  # packages that arms need, and the extra of each
    # Of the tables, header and metric, and the metrics drawn as bars, with their labels.
    columns: tuple[tuple[str, str], ...] = DETECTION_COLUMNS
    bars: tuple[tuple[str, str], ...] = (("AP50_novel", "AP50 of novel names (percent)"),)
    curves: tuple[str, ...] = ()  # trainings that are drawn over their steps
    thresholds: tuple[tuple[float, str], ...] = ()  # scores that images must have, and their arms
    pictures: tuple[tuple[str, str, str], ...] = ()  # caption, arm, file in the arm's folder

    def __post_init__(self) -> None:
        """Raises `ValueError` if an arm is named that is not there, or not before it is needed.

        So it does where a shared arm needs one that is not.
        """
        known: list[str] = []
        for arm in self.arms:
            places = {"out", "seed", *arm.needs}
            if not set(arm.needs) <= set(known) or not set(_places(arm)) <= places:
                raise ValueError(f"arm {arm.name}: needs an arm that is not there before it")
            if arm.name in (*known, "out", "seed"):
                raise ValueError(f"arm {arm.name}: the name is taken")
            if arm.is_shared and not all(self.arm(name).is_shared for name in arm.needs):
                raise ValueError(f"arm {arm.name}: shared, but needs an arm that is not")
            known.append(arm.name)
        named = [*self.main, *self.curves, *(arm for _, arm in self.thresholds)]
        named += [arm for _, arm, _ in self.pictures]
        named += [name for claim in self.claims for name in (claim.arm, claim.control) if name]
        if unknown := set(named) - set(known):
            raise ValueError(f"study {self.name}: there is no arm {sorted(unknown)[0]}")

    def arm(self, name: str) -> Arm:
        """Raises `UserError` if there is none of that name."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise UserError(f"no arm {name!r}; there are {', '.join(arm.name for arm in self.arms)}")


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


def result_file(study: Study, arm: Arm, seed: int) -> Path:
    return study.results / f"{arm.name}-seed{arm.seed(seed)}.json"


def is_finished(study: Study, arm: Arm, seed: int) -> bool:
    """True if the arm's result is there, and is current."""
    file = result_file(study, arm, seed)
    return file.exists() and is_current(study, read_result(file))


def is_current(study: Study, result: Mapping[str, Any]) -> bool:
    """True if a result is of these commands and configs, and of the needed arms' present results.

    An arm that is run again elsewhere may come out otherwise; what started from it is then of other
    weights than its result says.
    """
    arm, seed = study.arm(result["arm"]), result["seed"]
    if result["digest"] != digest(study, arm):
        return False
    for name, outcome in result.get("needs", {}).items():
        file = result_file(study, study.arm(name), seed)
        if not file.exists():
            continue
        needed = read_result(file)
        if _outcome(needed) != outcome or not is_current(study, needed):
            return False
    return True


def _outcome(result: Mapping[str, Any]) -> str:
    """Twelve hex digits of an arm's numbers, but for its speed."""
    kept = {key: x for key, x in result["metrics"].items() if key not in SPEEDS}
    return schema.digest(kept)


def read_result(file: Path) -> dict[str, Any]:
    """Raises `UserError` if the file is no result of an arm."""
    try:
        result = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: no JSON ({error}); remove it") from None
    keys = {"arm": str, "seed": int, "digest": str, "metrics": dict, "seconds": int | float}
    keys |= {"commit": str, "is_dirty": bool, "machine": str, "commands": list}
    for key, kind in keys.items():
        if not isinstance(result, dict) or not isinstance(result.get(key), kind):
            raise UserError(f"{file}: {key!r} is missing or of a wrong type; remove the file")
    return result


def digest(study: Study, arm: Arm) -> str:
    """Twelve hex digits of all that decides an arm's result but seed, code and machine.

    Its commands and configs, and those of the arms that it needs.
    """
    needed = [digest(study, study.arm(name)) for name in arm.needs]
    files = [
        part.removeprefix("--config=")
        for command in arm.commands
        for part in command
        if part.startswith("--config=")
    ]
    parts = [needed, arm.commands, [_config_digest(file) for file in files]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


@cache
def _config_digest(file: str) -> str:
    """Of the keys that a config sets: a new key of the schema, off by default, changes nothing."""
    tree = runpy.run_path(str(ROOT / file))["get_config"]().to_dict()
    told = _differences(tree, dataclasses.asdict(schema.Config()))
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _differences(tree: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of nested mappings that are not as in the defaults."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            default = defaults.get(key)
            found[key] = _differences(value, default if isinstance(default, Mapping) else {})
        elif key not in defaults or value != defaults[key]:
            found[key] = value
    return {key: value for key, value in found.items() if value != {}}


def _places(arm: Arm) -> Iterator[str]:
    """What stands in braces in the arm's commands."""
    for command in arm.commands:
        for part in command:
            yield from (
                name for _, name, _, _ in string.Formatter().parse(part) if name is not None
            )


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
            name: _outcome(read_result(result_file(study, study.arm(name), seed)))
            for name in arm.needs
        },
        "metrics": metrics,
    }
    study.results.mkdir(parents=True, exist_ok=True)
    _write_json(result_file(study, arm, seed), result)


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
        _write_json(self._file, self._state)


def _write_json(file: Path, content: Any) -> None:
    """The file appears once it is complete."""
    partial = file.with_suffix(".tmp")
    partial.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    partial.replace(file)


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


def command(study: Study, description: str | None, argv: Sequence[str] | None) -> int:
    """`python -m studies.<name>`: runs arms and draws the report. Returns 2 for a user's error."""
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
    arguments: Any = parser.parse_args(argv)
    from studies import report  # it imports this module, and plots, which take a second

    try:
        return main(study, arguments, report.write)
    except UserError as error:
        print(f"studies.{study.name}: {error}", file=sys.stderr)
        return 2


def main(study: Study, arguments: Any, write_report: Callable[[Study, Path | None], Path]) -> int:
    """What a study's command does with its arguments."""
    if arguments.workdir and not arguments.report:
        # a run of one's own: what is committed neither ends nor mixes in
        study = dataclasses.replace(study, results=arguments.workdir / "results")
    if not arguments.draw:
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
            run(study, names, range(seeds), arguments.workdir, arguments.jobs)
        finally:
            print(write_report(study, arguments.workdir))
        return 0
    print(write_report(study, arguments.workdir))
    return 0
