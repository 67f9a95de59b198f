"""The report of a study, in Markdown and HTML, from the JSON files of its finished arms."""

import statistics
from collections.abc import Mapping, Sequence, Set
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from owl_det.viz.plots import plot_trade_off, shorten
from studies import document, plots, summary
from studies.claims import Judgement, Results, judge, read_results, standard_error
from studies.document import Block, Cell, Code, Details, Heading, Picture, Table, Text
from studies.study import REPORT_SEEDS, Arm, Claim, Metrics, Study
from studies.summary import PLAIN, mark

NOVEL, BASE = "AP50_novel", "AP50_base"
PLATEAU = 0.7  # of the steps
MAX_PICTURE_BYTES = 300_000
MISSING = "–"
RULE = (
    "Held: the mean over seeds of arm − control (or arm − factor · control) is at least the bound, "
    "which is 0 where none is given. Within noise: with three or more seeds, the bound lies in the "
    "95 percent confidence interval of the mean (Student's t); with fewer seeds noise is unknown. "
    "Means are followed by the standard deviation over seeds, differences by their standard error. "
    "All in percent but images_per_second. Of so many claims some come out by chance."
)


def write(study: Study, workdir: Path | None) -> Path:
    """Writes report.md, report.html, plots and pictures; returns the Markdown file.

    Pictures come from seed 0 in `workdir`; without it, those of an earlier report stay. Raises
    `UserError` if a result file cannot be read.
    """
    results = read_results(study)
    folder = study.results
    for name in ("plots", "pictures"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    blocks = [
        Heading(study.title, 1),
        *summary.blocks(study, results),
        *_headline(study, results),
        *_claims(study, results),
        *_precision(study, results),
        *_plateau(study, results),
        *_plots(study, results),
        *_pictures(study, workdir),
        *_state(study, results),
        *_provenance(study, results),
    ]
    (folder / "report.html").write_text(document.html_page(study.title, blocks, folder), "utf-8")
    file = folder / "report.md"
    file.write_text(document.markdown(blocks), "utf-8")
    return file


# --- claims --------------------------------------------------------------------------------------


def _claims(study: Study, results: Results) -> list[Block]:
    header = ("claim", "verdict", "difference", "arm", "control", "metric", "in favour", "note")
    notes = list(dict.fromkeys(claim.note for claim in study.claims if claim.note))
    rows = [
        _claim_row(
            claim, judge(claim, results), str(notes.index(claim.note) + 1) if claim.note else ""
        )
        for claim in study.claims
    ]
    numbered = [Text(f"{number}. {note}") for number, note in enumerate(notes, start=1)]
    return [Heading("Claims"), Text(RULE), Table(header, rows), *numbered]


def _claim_row(claim: Claim, judgement: Judgement | None, note: str) -> list[Cell]:
    arm, control = claim.arm, claim.control or MISSING
    if claim.times != 1:
        control = f"{claim.times:g} · {control}"
    if judgement is None:
        verdict = mark("not yet measured")
        return [claim.statement, verdict, MISSING, arm, control, claim.metric, MISSING, note]
    scale = _scale(claim.metric)
    difference = f"{scale * statistics.fmean(judgement.differences):+.1f}"
    if len(judgement.differences) > 1:
        difference += f" ± {scale * standard_error(judgement.differences):.1f}"
    if claim.at_least:
        difference += f" (bound {scale * claim.at_least:+g})"
    if claim.control:
        control = f"{control}: {_mean(judgement.control, scale)}"
    num = len(judgement.differences)
    return [
        *(claim.statement, mark(judgement.verdict), difference),
        *(f"{arm}: {_mean(judgement.arm, scale)}", control, claim.metric),
        *(f"{judgement.num_in_favour} of {num} seeds", note),
    ]


# --- tables --------------------------------------------------------------------------------------


def _headline(study: Study, results: Results) -> list[Block]:
    main = [study.arm(name) for name in study.main]
    others = [arm for arm in study.arms if arm.name not in study.main]
    unit = (
        "An arm is one training, annotation or evaluation; other tables and plots call it by the "
        "name in the first column. AP50 and region accuracy in percent, mean ± standard deviation "
        "over seeds."
    )
    blocks: list[Block] = [Heading("Arms"), Text(unit), *_arm_tables(study, main, results)]
    if others:
        blocks.append(Details("Variants and controls", _arm_tables(study, others, results)))
    return blocks


def _arm_tables(study: Study, shown: Sequence[Arm], results: Results) -> list[Block]:
    """A table for the arms that share metrics, without columns that most of them lack."""
    tables: list[tuple[list[Arm], set[str]]] = []
    for arm in shown:
        has = {m for _, m in study.columns if results.values(arm.name, m)}
        alike = [table for table in tables if table[1] & has or not (table[1] or has)]
        for table in alike:
            tables.remove(table)
        members = [member for table in alike for member in table[0]]
        tables.append(([*members, arm], has.union(*(table[1] for table in alike))))
    order = [arm.name for arm in shown]
    for members, _ in tables:
        members.sort(key=lambda arm: order.index(arm.name))
    tables.sort(key=lambda table: order.index(table[0][0].name))
    return [block for members, has in tables for block in _arm_blocks(study, members, has, results)]


def _arm_blocks(
    study: Study, members: Sequence[Arm], has: Set[str], results: Results
) -> list[Block]:
    """A table, and what few of its arms have in words."""

    def count(metric: str) -> int:
        return sum(bool(results.values(arm.name, metric)) for arm in members)

    columns = [(header, metric) for header, metric in study.columns if metric in has]
    is_common = {metric: 2 * count(metric) >= len(members) for _, metric in columns}
    table = _arm_table(members, [c for c in columns if is_common[c[1]]], results)
    rare = [
        f"{arm.name}, {header}: {_mean(results.values(arm.name, metric).values())}"
        for header, metric in columns
        if not is_common[metric]
        for arm in members
        if results.values(arm.name, metric)
    ]
    return [table, *([Text(f"{'; '.join(rare)}.")] if rare else [])]


def _arm_table(shown: Sequence[Arm], columns: Sequence[tuple[str, str]], results: Results) -> Table:
    rows = []
    for arm in shown:
        cells = [_mean(results.values(arm.name, metric).values()) for _, metric in columns]
        minutes = [result["seconds"] / 60 for result in results.by_arm[arm.name].values()]
        num_seeds = str(len(minutes))
        rows.append([arm.name, arm.title, *cells, num_seeds, _mean(minutes, 1.0)])
    header = (column for column, _ in columns)
    return Table(("arm", "what it is", *header, "seeds", "minutes"), rows)


def _precision(study: Study, results: Results) -> list[Block]:
    """Of the annotation arms: those whose metrics have groups."""
    measures = (
        ("boxes", 1.0, 0, lambda row: row["pseudo_boxes"]),
        ("precision", 100.0, 1, lambda row: row["precision"]),
        ("names the object", 100.0, 1, _named_share),
        ("recall", 100.0, 1, lambda row: row["recall"]),
    )
    of_arms = {
        arm.name: [m["groups"] for m in results.metrics(arm.name).values() if "groups" in m]
        for arm in study.arms
    }
    groups = list(
        dict.fromkeys(g for by_seed in of_arms.values() for seed in by_seed for g in seed)
    )
    rows: list[list[str]] = []
    for arm, by_seed in of_arms.items():
        for name, scale, digits, measure in measures if by_seed else ():
            found = {g: [measure(seed[g]) for seed in by_seed if g in seed] for g in groups}
            shares = [[value for value in found[g] if value is not None] for g in groups]
            rows.append([arm, name, *(_mean(values, scale, digits) for values in shares)])
    if not rows:
        return []
    text = (
        "Precision: the share of pseudo-boxes that overlap a true box of their name by an IoU of "
        "0.5, each true box once; recall: the share of true boxes found. Names the object: the "
        "share of pseudo-boxes whose phrase is or holds the name of a true box they overlap. In "
        "percent."
    )
    header = ("arm", "", *(group.replace("_", " ") for group in groups))
    return [Heading("Pseudo-boxes"), Text(text), Table(header, rows), *_mined(study, results)]


def _named_share(row: Mapping[str, Any]) -> float | None:
    return row["holds_name"] / row["pseudo_boxes"] if row["pseudo_boxes"] else None


def _mined(study: Study, results: Results) -> list[Block]:
    """How many hard negatives are truly absent, of the arms that mined some."""
    rows: list[list[str]] = []
    for arm in study.arms:
        shares: dict[int, list[float]] = {}
        for metrics in results.metrics(arm.name).values():
            for row in metrics.get("hard_negatives", ()):
                shares.setdefault(row["first"], []).append(row["share"])
        rows += [[arm.name, str(first), _mean(values)] for first, values in shares.items()]
    if not rows:
        return []
    text = Text("Mined hard negatives: the share that is absent from the image, in percent.")
    return [text, Table(("arm", "the first", "absent"), rows)]


def _plateau(study: Study, results: Results) -> list[Block]:
    rows: list[list[str]] = []
    for name in study.curves:
        for seed, metrics in sorted(results.metrics(name).items()):
            curve = [point for point in metrics.get("curve", ()) if "AP_base" in point]
            since = [p for p in curve if p["step"] <= PLATEAU * curve[-1]["step"]]
            if not since:
                continue
            tail = [p["AP_base"] for p in curve if p["step"] >= since[-1]["step"]]
            change, span = tail[-1] - tail[0], max(tail) - min(tail)
            numbers = (f"{100 * x:.1f}" for x in (tail[0], tail[-1]))
            moved = (f"{100 * change:+.1f}", f"{100 * span:.1f}")
            rows.append([name, str(seed), str(since[-1]["step"]), *numbers, *moved])
    if not rows:
        return []
    text = "Base AP in percent from the last evaluation within the first 70 % of the steps to the "
    text += "end; the span is the largest less the smallest of the evaluations in between."
    header = ("arm", "seed", "from step", "AP base there", "at the end", "change", "span")
    return [Heading("Has training levelled off?"), Text(text), Table(header, rows)]


def _state(study: Study, results: Results) -> list[Block]:
    missing: list[str] = []
    wanted = sorted({*results.seeds, *range(REPORT_SEEDS)})
    for arm in study.arms:
        of_arm = [0] if arm.is_shared else wanted
        seeds = [str(seed) for seed in of_arm if seed not in results.by_arm[arm.name]]
        if seeds:
            missing.append(f"{arm.name} (seed{'s' * (len(seeds) > 1)} {', '.join(seeds)})")
    blocks: list[Block] = [Heading("What is missing")]
    blocks.append(Text(f"Not yet run: {'; '.join(missing) or 'nothing'}."))
    if results.outdated:
        names = ", ".join(results.outdated)
        blocks.append(Text(f"Left out, as what made them has changed since: {names}."))
    return blocks


def _provenance(study: Study, results: Results) -> list[Block]:
    rows = [
        [
            *(arm.name, str(seed), _commits(result), "yes" if result["is_dirty"] else "no"),
            *(result["machine"], f"{result['seconds']:.0f}"),
        ]
        for arm in study.arms
        for seed, result in sorted(results.by_arm[arm.name].items())
    ]
    commands = [
        "\n".join([f"# {arm.name}", *next(iter(results.by_arm[arm.name].values()))["commands"]])
        for arm in study.arms
        if results.by_arm[arm.name]
    ]
    header = ("arm", "seed", "commit", "changed files", "machine", "seconds")
    places = "{out} is the arm's own folder, {name} the folder of another arm."
    folded = [Table(header, rows), Text(places), Code("\n\n".join(commands))]
    return [Heading("Provenance"), Details("Commits, machines, times and commands", folded)]


def _commits(result: Mapping[str, Any]) -> str:
    """More than one where an arm was stopped and went on with later code."""
    return ", ".join(commit[:12] for commit in result.get("commits", [result["commit"]]))


def _mean(values: Any, scale: float = 100.0, digits: int = 1) -> str:
    """Mean ± standard deviation of any number of values."""
    scaled = [scale * value for value in values]
    if not scaled:
        return MISSING
    text = f"{statistics.fmean(scaled):,.{digits}f}"
    return text if len(scaled) == 1 else f"{text} ± {statistics.stdev(scaled):,.{digits}f}"


def _scale(metric: str) -> float:
    return 1.0 if metric in PLAIN else 100.0


# --- plots and pictures --------------------------------------------------------------------------


def _plots(study: Study, results: Results) -> list[Block]:
    drawn = [
        (_draw_curves, "curves", "AP50 during training: mean over seeds, least to greatest"),
        (_draw_ensemble, "ensemble", "Weights between the two ends, mean over seeds"),
        (_draw_thresholds, "thresholds", "AP50 by the score that an image's best box must have"),
        (_draw_recall, "recall", "Category recall of the whole image's embedding"),
    ]
    for number, (metric, label) in enumerate(study.bars):
        draw = partial(_draw_bars, metric=metric, label=label)
        drawn.insert(number, (draw, f"bars-{metric}", f"{label}, by arm"))
    blocks: list[Block] = [Heading("Plots")]
    for draw, name, caption in drawn:
        file = study.results / "plots" / f"{name}.png"
        file.unlink(missing_ok=True)  # one of results that are gone
        draw(study, results, file)
        if file.exists():
            blocks.append(Picture(f"plots/{file.name}", caption))
    return blocks if len(blocks) > 1 else []


def _draw_bars(study: Study, results: Results, file: Path, *, metric: str, label: str) -> None:
    bars = [
        plots.Bar(_label(arm), _kind(study, arm), _percent(results.values(arm.name, metric)))
        for arm in study.arms
        if results.values(arm.name, metric)
    ]
    if bars:
        plots.plot_bars(file, bars, label)


def _label(arm: Arm) -> str:
    """What an arm is, and its name."""
    title = arm.title.removeprefix("control: ")
    return f"{shorten(title, 56)} ({arm.name})" if title else arm.name


def _kind(study: Study, arm: Arm) -> plots.Kind:
    if arm.title.startswith("control"):
        return "control"
    return "main" if arm.name in study.main else "variant"


def _draw_curves(study: Study, results: Results, file: Path) -> None:
    styles: dict[str, plots.LineStyle] = {BASE: "-", NOVEL: "--"}
    curves = {name: {key: _curve(results, name, key) for key in styles} for name in study.curves}
    curves = {name: by_metric for name, by_metric in curves.items() if any(by_metric.values())}
    if curves:
        named = {_label(study.arm(name)): by_metric for name, by_metric in curves.items()}
        plots.plot_curves(file, named, styles, "AP50 (percent)")


def _curve(results: Results, arm: str, key: str) -> dict[int, list[float]]:
    curve: dict[int, list[float]] = {}
    for metrics in results.metrics(arm).values():
        for point in metrics.get("curve", ()):
            if key in point:
                curve.setdefault(point["step"], []).append(100 * point[key])
    return curve


def _draw_ensemble(study: Study, results: Results, file: Path) -> None:
    by_weight: dict[float, list[Metrics]] = {}
    for arm in study.arms:
        for metrics in results.metrics(arm.name).values():
            for point in metrics.get("points", ()):
                by_weight.setdefault(point["weight"], []).append(point)
    if not by_weight:
        return
    points = []
    for weight, found in sorted(by_weight.items()):
        x, y = (
            100 * statistics.fmean(point[f"{side}_AP50"] for point in found)
            for side in ("out_of_domain", "in_domain")
        )
        points.append((f"{weight:g}", x, y))
    plot_trade_off(file, points, "AP50 of novel names (percent)", "AP50 of base names (percent)")


def _draw_thresholds(study: Study, results: Results, file: Path) -> None:
    lines: dict[str, dict[float, list[float]]] = {}
    for name, metric in (("novel names", NOVEL), ("base names", BASE)):
        line = {score: _percent(results.values(arm, metric)) for score, arm in study.thresholds}
        lines[name] = {score: values for score, values in line.items() if values}
    if all(len(line) > 1 for line in lines.values()):
        xlabel = "score that an image's best pseudo-box must have"
        plots.plot_thresholds(file, lines, xlabel, "AP50 (percent)")


def _draw_recall(study: Study, results: Results, file: Path) -> None:
    """Of the arms whose metrics have it: `recall` holds RC@k by k, for each kind of image."""
    lines: dict[str, dict[float, list[float]]] = {}
    for arm in study.arms:
        for metrics in results.metrics(arm.name).values():
            for kind, by_rank in metrics.get("recall", {}).items():
                for rank, share in by_rank.items():
                    lines.setdefault(kind, {}).setdefault(float(rank), []).append(100 * share)
    if lines:
        plots.plot_thresholds(
            file, lines, "names that are taken (k)", "RC@k (percent)", is_log=True
        )


def _percent(values: Mapping[int, float]) -> list[float]:
    return [100 * value for value in values.values()]


def _pictures(study: Study, workdir: Path | None) -> list[Block]:
    blocks: list[Block] = [Heading("Pictures")]
    for number, (caption, arm, pattern) in enumerate(study.pictures, start=1):
        file = study.results / "pictures" / f"{number}-{arm}.png"
        found = sorted((workdir / "seed0" / arm).glob(pattern)) if workdir else []
        if found:
            file.write_bytes(_small_png(found[-1]))
        if file.exists():
            blocks.append(Picture(f"pictures/{file.name}", f"{caption} ({arm}, seed 0)"))
    return blocks if len(blocks) > 1 else []


def _small_png(file: Path) -> bytes:
    """The file itself, or in fewer colours and, if need be, fewer pixels."""
    content, scale = file.read_bytes(), 1.0
    with Image.open(file) as opened:
        whole = opened.convert("RGB")
    if len(content) > MAX_PICTURE_BYTES:
        buffer = BytesIO()
        whole.save(buffer, "PNG", optimize=True)
        content = buffer.getvalue()
    while len(content) > MAX_PICTURE_BYTES:
        size = max(1, round(scale * whole.width)), max(1, round(scale * whole.height))
        buffer = BytesIO()
        whole.resize(size, Image.Resampling.LANCZOS).quantize(256).save(buffer, "PNG")
        content, scale = buffer.getvalue(), 0.8 * scale
    return content
