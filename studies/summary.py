"""The top of a report: what was found, in three sentences and one chart."""

import statistics
from collections.abc import Mapping, Sequence

from owl_det.viz.plots import shorten
from studies import plots
from studies.claims import Judgement, Results, half_width, judge
from studies.document import Block, Heading, Mark, Picture, Text, Tone
from studies.study import Claim, Study

PLAIN = ("images_per_second",)  # metrics that are no shares, and are not shown in percent
NUM_NAMED = 3  # claims, in a sentence
_LABEL = 78  # characters of a claim in the chart

Judged = Sequence[tuple[Claim, Judgement]]


def mark(verdict: str) -> Mark:
    """A verdict with its colour, and a sign that does without colour."""
    tone = _tone(verdict)
    signs: Mapping[str, str] = {"good": "✓", "good-open": "✓", "bad": "✗", "bad-open": "✗"}
    return Mark(f"{signs.get(tone, '≈' if 'noise' in verdict else '–')} {verdict}", tone)


def _tone(verdict: str) -> Tone:
    if verdict.endswith("within noise") or not verdict.startswith(("held", "not held")):
        return "unsure"
    if verdict.endswith("noise unknown"):
        return "bad-open" if verdict.startswith("not") else "good-open"
    return "bad" if verdict.startswith("not") else "good"


def blocks(study: Study, results: Results) -> list[Block]:
    """Nothing if no claim has been measured. Draws `plots/claims.png`."""
    every = [(claim, judge(claim, results)) for claim in study.claims]
    judged = [(claim, judgement) for claim, judgement in every if judgement is not None]
    file = study.results / "plots" / "claims.png"
    file.unlink(missing_ok=True)  # one of results that are gone
    if not judged:
        return []
    texts = [_count(judged, len(every) - len(judged)), *_clearest(judged)]
    found: list[Block] = [Heading("Summary"), *map(Text, texts)]
    if margins := [_margin(claim, judgement) for claim, judgement in _shares(judged)]:
        plots.plot_margins(file, margins)
        caption = "Every claim: its difference, less the bound it must reach"
        if any(margin.width is not None for margin in margins):
            caption += ", with the 95 percent confidence interval over seeds"
        found.append(Picture(f"plots/{file.name}", caption))
    return found


def _count(judged: Judged, num_missing: int) -> str:
    verdicts = [judgement.verdict for _, judgement in judged]
    parts = [
        f"{sum(verdict == name for verdict in verdicts)} {text}"
        for name, text in (
            ("held", "held"),
            ("not held", "did not hold"),
            ("held, within noise", "held within noise"),
            ("not held, within noise", "did not hold within noise"),
            ("held, noise unknown", "held, of too few seeds to know the noise"),
            ("not held, noise unknown", "did not hold, of too few seeds to know the noise"),
        )
        if name in verdicts
    ]
    if num_missing:
        parts.append(f"{num_missing} not yet measured")
    return f"Of {len(judged) + num_missing} claims: {'; '.join(parts)}."


def _clearest(judged: Judged) -> list[str]:
    """The claims that are farthest from their bounds, on either side of it."""
    sentences: list[str] = []
    for tones, text in (
        (("good", "good-open"), "The largest effects that were claimed and found"),
        (("bad", "bad-open"), "Farthest from what was claimed"),
    ):
        ranked = sorted(
            (
                (abs(_middle(claim, judgement)), claim, judgement)
                for claim, judgement in _shares(judged)
                if _tone(judgement.verdict) in tones
            ),
            key=lambda entry: -entry[0],
        )
        named = [
            f"“{claim.statement}” ({_points(claim, judgement)})"
            for _, claim, judgement in ranked[:NUM_NAMED]
        ]
        if named:
            sentences.append(f"{text}: {'; '.join(named)}.")
    return sentences


def _points(claim: Claim, judgement: Judgement) -> str:
    difference = 100 * statistics.fmean(judgement.differences)
    if not claim.control:
        return f"{difference:.1f} percent, bound {100 * claim.at_least:g}"
    bound = f", bound {100 * claim.at_least:+g}" if claim.at_least else ""
    return f"{difference:+.1f} points{bound}"


def _shares(judged: Judged) -> Judged:
    return [(claim, judgement) for claim, judgement in judged if claim.metric not in PLAIN]


def _middle(claim: Claim, judgement: Judgement) -> float:
    return 100 * (statistics.fmean(judgement.differences) - claim.at_least)


def _margin(claim: Claim, judgement: Judgement) -> plots.Margin:
    width = half_width(judgement.differences)
    return plots.Margin(
        label=shorten(claim.statement, _LABEL),
        tone=_tone(judgement.verdict),
        middle=_middle(claim, judgement),
        width=None if width is None else 100 * width,
    )
