"""What finished arms say about a study's claims.

A claim is judged by the paired differences arm − times · control over the seeds that both have
(without a control: the metric itself). It is "held" if their mean is at least `at_least`, else "not
held". With three or more seeds ", within noise" is added where `at_least` lies in the 95 %
confidence interval of the mean (Student's t: 4.3 standard errors either way with three seeds); with
fewer, noise is unknown and the verdict says so. An arm that is shared by all seeds is compared with
each of them. A result whose needed arms have been run again
since, with another outcome, counts as missing: what is compared comes from the same weights.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from studies.result_files import is_current, read_result
from studies.study import Claim, Metrics, Study


@dataclass(frozen=True)
class Results:
    """Results of the arms as they are now, by arm and seed."""

    by_arm: Mapping[str, Mapping[int, Mapping[str, Any]]]
    seeds: tuple[int, ...]
    shared: frozenset[str]  # arms that are run once for all seeds
    outdated: tuple[str, ...]  # files of other versions, or of other weights than are there now

    def metrics(self, arm: str) -> dict[int, Metrics]:
        return {seed: result["metrics"] for seed, result in self.by_arm[arm].items()}

    def values(self, arm: str, metric: str) -> dict[int, float]:
        """By seed; seeds whose arm lacks the metric are left out."""
        found = {seed: value_of(metrics, metric) for seed, metrics in self.metrics(arm).items()}
        return {seed: value for seed, value in found.items() if value is not None}


def read_results(study: Study) -> Results:
    """All `<arm>-seed<k>.json` of the study's arms; other files are no results."""
    by_arm: dict[str, dict[int, Mapping[str, Any]]] = {arm.name: {} for arm in study.arms}
    outdated: list[str] = []
    for file in sorted(study.results.glob("*-seed*.json")):
        result = read_result(file)
        name = result["arm"]
        if name in by_arm and is_current(study, result):
            by_arm[name][result["seed"]] = result
        else:
            outdated.append(file.name)
    seeds = sorted({seed for results in by_arm.values() for seed in results} or {0})
    shared = frozenset(arm.name for arm in study.arms if arm.is_shared)
    return Results(by_arm, tuple(seeds), shared, tuple(outdated))


def value_of(metrics: Metrics, metric: str) -> float | None:
    """A finite number, or None. `curve:KEY` is the mean over the steps that have the key."""
    if metric.startswith("curve:"):
        key = metric.removeprefix("curve:")
        values = [point[key] for point in metrics.get("curve", ()) if key in point]
        value = statistics.fmean(values) if values else None
    else:
        value = metrics.get(metric)
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None


@dataclass(frozen=True)
class Judgement:
    """Values of the seeds that arm and control share, and what follows from them."""

    arm: tuple[float, ...]
    control: tuple[float, ...]  # empty without a control
    differences: tuple[float, ...]
    num_in_favour: int
    verdict: str


def judge(claim: Claim, results: Results) -> Judgement | None:
    """None if no seed has both arm and control."""
    arm = results.values(claim.arm, claim.metric)
    control = results.values(claim.control, claim.metric) if claim.control else {}
    measured = arm.keys() | control.keys()
    # The one value of a shared arm stands beside every seed of the other.
    if claim.arm in results.shared and arm:
        arm = dict.fromkeys(measured, arm[0])
    if claim.control in results.shared and control:
        control = dict.fromkeys(measured, control[0])
    seeds = sorted(arm.keys() & control.keys()) if claim.control else sorted(arm)
    if not seeds:
        return None
    differences = tuple(arm[seed] - claim.times * control.get(seed, 0.0) for seed in seeds)
    return Judgement(
        arm=tuple(arm[seed] for seed in seeds),
        control=tuple(control[seed] for seed in seeds if claim.control),
        differences=differences,
        num_in_favour=sum(difference >= claim.at_least for difference in differences),
        verdict=verdict(differences, claim.at_least),
    )


def verdict(differences: Sequence[float], at_least: float) -> str:
    """The rule at the top of this file, for one difference or more."""
    middle = statistics.fmean(differences)
    outcome = "held" if middle >= at_least else "not held"
    width = half_width(differences)
    if width is None:
        return f"{outcome}, noise unknown"
    is_clear = abs(middle - at_least) > width
    return outcome if is_clear else f"{outcome}, within noise"


def half_width(differences: Sequence[float]) -> float | None:
    """Of the 95 % confidence interval of the mean; None with fewer than three seeds."""
    if len(differences) < 3:
        return None
    quantile = float(stats.t.ppf(0.975, len(differences) - 1))
    return quantile * standard_error(differences)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of two values or more."""
    return statistics.stdev(values) / math.sqrt(len(values))
