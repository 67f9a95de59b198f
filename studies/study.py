"""What a study is: arms, which are commands a user would type, and claims about their numbers."""

import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owl_det.errors import UserError

ROOT = Path(__file__).resolve().parents[1]  # where commands run
REPORT_SEEDS = 3  # of every arm, so that a claim can be told from noise
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


def _places(arm: Arm) -> Iterator[str]:
    """What stands in braces in the arm's commands."""
    for command in arm.commands:
        for part in command:
            yield from (
                name for _, name, _, _ in string.Formatter().parse(part) if name is not None
            )
