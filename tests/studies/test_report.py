"""The report's arithmetic against numbers by hand; what it lists, and that it escapes text."""

import dataclasses
import html
import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from owl_det.errors import UserError
from studies import claims, document, plots, report, result_files
from studies.claims import judge, read_results, value_of, verdict
from studies.study import Claim, Study
from tests.studies import fake_study

CLAIM = Claim(statement="Helps", arm="second", control="first", metric="AP50_novel")


@pytest.fixture
def study(tmp_path: Path) -> Study:
    results = tmp_path / "results"
    results.mkdir()
    return dataclasses.replace(fake_study.chain(results), claims=(CLAIM,))


@pytest.fixture
def put(study: Study) -> Callable[..., None]:
    """Writes the result of one arm and seed."""

    def write(arm: str, seed: int = 0, /, *, digest: str = "", **metrics: Any) -> None:
        content = {
            "arm": arm,
            "seed": seed,
            "commit": "0123456789abcdef",
            "is_dirty": False,
            "machine": "a machine",
            "commands": ["python -m a <b> & c"],
            "seconds": 90.0,
            "digest": digest or result_files.digest(study, study.arm(arm)),
            "metrics": metrics,
        }
        result_files.result_file(study, study.arm(arm), seed).write_text(json.dumps(content))

    return write


def _rows(file: Path, first: str) -> list[list[str]]:
    """Cells of the table rows that begin so, without escapes."""
    lines = file.read_text().replace("\\", "").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    return [row for row in rows if row[0] == first]


# --- claims --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at_least", "expected"),
    [
        # Differences 1, 2, 3: mean 2, standard error 1 / √3 = 0.577, 4.303 of them 2.484.
        (-0.49, "held"),
        (-0.48, "held, within noise"),
        (2.0, "held, within noise"),
        (2.1, "not held, within noise"),
        (4.48, "not held, within noise"),
        (4.49, "not held"),
    ],
)
def test_verdict_of_three_seeds(at_least: float, expected: str) -> None:
    assert verdict([1.0, 2.0, 3.0], at_least) == expected
    assert claims.standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))


def test_verdict_of_fewer_seeds_says_that_noise_is_unknown() -> None:
    assert verdict([0.1], 0.0) == verdict([0.1, 0.2], 0.0) == "held, noise unknown"
    assert verdict([-0.1], 0.0) == "not held, noise unknown"
    assert verdict([-0.1], -0.2) == "held, noise unknown"


def test_differences_are_paired_over_common_seeds(study: Study, put: Callable[..., None]) -> None:
    for seed, value in enumerate((0.1, 0.2, 0.3)):
        put("first", seed, AP50_novel=value)
    put("second", 0, AP50_novel=0.2)
    put("second", 2, AP50_novel=0.25)
    put("second", 3, AP50_novel=0.9)
    judgement = judge(CLAIM, read_results(study))
    assert judgement is not None
    assert judgement.arm == (0.2, 0.25) and judgement.control == (0.1, 0.3)
    assert judgement.differences == pytest.approx((0.1, -0.05))
    assert judgement.num_in_favour == 1
    (row,) = _rows(report.write(study, None), "Helps")
    # Standard deviations √2 · 0.025 and √2 · 0.1; standard error 0.075.
    assert row[1:7] == [
        *("✓ held, noise unknown", "+2.5 ± 7.5", "second: 22.5 ± 3.5", "first: 20.0 ± 14.1"),
        *("AP50_novel", "1 of 2 seeds"),
    ]


def test_a_shared_arm_is_compared_with_every_seed(study: Study, put: Callable[..., None]) -> None:
    first, *others = study.arms
    study = dataclasses.replace(study, arms=(dataclasses.replace(first, is_shared=True), *others))
    put("first", AP50_novel=0.1)
    for seed, value in enumerate((0.2, 0.3, 0.4)):
        put("second", seed, AP50_novel=value)
    (row,) = _rows(report.write(study, None), "Helps")
    assert (row[2], row[6]) == ("+20.0 ± 5.8", "3 of 3 seeds")
    less = dataclasses.replace(CLAIM, arm="first", control="second")
    judgement = judge(less, read_results(study))
    assert judgement is not None
    assert judgement.differences == pytest.approx((-0.1, -0.2, -0.3))
    text = report.write(study, None).read_text()
    assert "Not yet run: third (seeds 0, 1, 2)." in text


def test_factor_bound_and_claims_without_control(study: Study, put: Callable[..., None]) -> None:
    put("first", AP50_novel=0.1)
    put("second", AP50_novel=0.19)
    doubled = dataclasses.replace(CLAIM, statement="Doubles", times=2.0)
    costs = dataclasses.replace(CLAIM, statement="Costs", arm="first", control="second")
    costs = dataclasses.replace(costs, at_least=-0.1)
    alone = dataclasses.replace(CLAIM, statement="Alone", control="", at_least=0.2)
    study = dataclasses.replace(study, claims=(doubled, costs, alone))
    file = report.write(study, None)
    (row,) = _rows(file, "Doubles")
    assert row[1:3] == ["✗ not held, noise unknown", "-1.0"]
    assert (row[4], row[6]) == ("2 · first: 10.0", "0 of 1 seeds")
    (row,) = _rows(file, "Costs")
    assert row[1:3] == ["✓ held, noise unknown", "-9.0 (bound -10)"]
    (row,) = _rows(file, "Alone")
    assert row[1:3] == ["✗ not held, noise unknown", "+19.0 (bound +20)"] and row[4] == "–"


def test_area_under_a_curve_is_the_mean_of_its_steps() -> None:
    curve = [{"step": 1, "x": 0.1}, {"step": 2, "y": 0.5}, {"step": 3, "x": 0.4}]
    assert value_of({"curve": curve}, "curve:x") == pytest.approx(0.25)
    assert value_of({"curve": curve}, "curve:z") is None
    assert value_of({}, "curve:x") is None


def test_values_that_are_no_numbers_are_absent() -> None:
    metrics = {"nan": math.nan, "none": None, "text": "0.5", "number": 1}
    assert [value_of(metrics, key) for key in ("nan", "none", "text", "lacks")] == [None] * 4
    assert value_of(metrics, "number") == 1.0


@pytest.mark.parametrize("metrics", [{}, {"AP50_novel": None}])
def test_claim_without_both_arms_is_not_yet_measured(
    metrics: dict, study: Study, put: Callable[..., None]
) -> None:
    put("first", AP50_novel=0.1)
    put("second", **metrics)
    (row,) = _rows(report.write(study, None), "Helps")
    assert row[1:7] == ["– not yet measured", "–", "second", "first", "AP50_novel", "–"]


def test_rates_are_no_percentages(study: Study, put: Callable[..., None]) -> None:
    put("first", images_per_second=100.0)
    put("second", images_per_second=125.5)
    faster = dataclasses.replace(CLAIM, metric="images_per_second")
    (row,) = _rows(report.write(dataclasses.replace(study, claims=(faster,)), None), "Helps")
    assert row[2:5] == ["+25.5", "second: 125.5", "first: 100.0"]


# --- tables --------------------------------------------------------------------------------------


def test_report_without_results_lists_every_arm(study: Study) -> None:
    file = report.write(study, None)
    text = file.read_text()
    assert file == study.results / "report.md"
    missing = "; ".join(f"{name} (seeds 0, 1, 2)" for name in ("first", "second", "third"))
    assert f"Not yet run: {missing}." in text
    assert _rows(file, "Helps")[0][1] == "– not yet measured"
    assert "## Summary" not in text
    assert not list((study.results / "plots").iterdir())


def test_missing_seeds_and_outdated_files_are_listed(
    study: Study, put: Callable[..., None]
) -> None:
    put("first", 0, AP50_novel=0.5)
    put("first", 1, AP50_novel=0.5)
    put("second", 1, AP50_novel=0.9, digest="old")
    text = report.write(study, None).read_text().replace("\\", "")
    assert "Not yet run: first (seed 2); second (seeds 0, 1, 2); third (seeds 0, 1, 2)." in text
    assert "has changed since: second-seed1.json." in text
    assert "90.0" not in text


def test_headline_has_mean_deviation_seeds_and_minutes(
    study: Study, put: Callable[..., None]
) -> None:
    put("first", 0, AP50_base=0.5, AP50_novel=0.1, region_top1_base=0.25)
    put("first", 1, AP50_base=0.5, AP50_novel=0.2)
    file = report.write(study, None)
    row = _rows(file, "first")[0]
    header = _rows(file, "arm")[0]
    assert header == [
        "arm",
        "what it is",
        "AP50 base",
        "AP50 novel",
        "region top-1 base",
        *header[5:],
    ]
    assert row[2:5] == ["50.0 ± 0.0", "15.0 ± 7.1", "25.0"]  # √2 · 0.05
    assert dict(zip(header[5:], row[5:], strict=True)) == {"seeds": "2", "minutes": "1.5 ± 0.0"}


def test_arms_that_share_no_metric_have_tables_of_their_own(
    study: Study, put: Callable[..., None]
) -> None:
    put("first", AP50_novel=0.1, AP50_base=0.2)
    put("second", AP50_novel=0.3, boxes=0.1)
    put("third", stuff=0.4)
    columns = tuple((key, key) for key in ("AP50_novel", "AP50_base", "boxes", "stuff", "none"))
    study = dataclasses.replace(study, columns=columns, main=("first", "second", "third"))
    headers = [row[2:-2] for row in _rows(report.write(study, None), "arm")[:2]]
    assert headers == [["AP50_novel", "AP50_base", "boxes"], ["stuff"]]
    fewer = dataclasses.replace(
        study, arms=(*study.arms, fake_study.arm("fourth")), main=(*study.main, "fourth")
    )
    content = json.loads((study.results / "first-seed0.json").read_text())
    content |= {"arm": "fourth", "digest": result_files.digest(fewer, fewer.arm("fourth"))}
    (study.results / "fourth-seed0.json").write_text(json.dumps(content))
    headers = [row[2:-2] for row in _rows(report.write(fewer, None), "arm")[:2]]
    assert headers == [["AP50_novel", "AP50_base"], ["stuff"]], "boxes: one of three arms"
    assert "second, boxes: 10.0." in (study.results / "report.md").read_text()


def test_a_note_of_many_claims_is_written_once(study: Study, put: Callable[..., None]) -> None:
    notes = ("the same thought", "", "another thought", "the same thought")
    claims = tuple(
        dataclasses.replace(CLAIM, statement=f"Claim {i}", note=note)
        for i, note in enumerate(notes)
    )
    file = report.write(dataclasses.replace(study, claims=claims), None)
    text = file.read_text()
    assert text.count("the same thought") == 1
    assert [_rows(file, f"Claim {i}")[0][7] for i in range(4)] == ["1", "", "2", "1"]
    assert "2. another thought" in text


def test_summary_counts_verdicts_and_names_the_largest(
    study: Study, put: Callable[..., None]
) -> None:
    for seed in range(3):
        put("first", seed, AP50_novel=0.1 + 0.001 * seed, AP50_base=0.5)
        put("second", seed, AP50_novel=0.3, AP50_base=0.2 + 0.2 * seed)
    put("third", AP50_novel=0.05)
    claims = (
        dataclasses.replace(CLAIM, statement="Lifts much"),
        dataclasses.replace(CLAIM, statement="Lifts little", at_least=0.15),
        dataclasses.replace(CLAIM, statement="Noisy", metric="AP50_base"),
        dataclasses.replace(CLAIM, statement="Hurts", arm="third"),
        dataclasses.replace(CLAIM, statement="Unknown", metric="AP_small"),
    )
    study = dataclasses.replace(study, claims=claims)
    text = report.write(study, None).read_text().replace("\\", "")
    summary = text.split("## Summary")[1].split("## Arms")[0]
    assert "Of 5 claims: 2 held; 1 did not hold within noise; 1 did not hold, of too few" in summary
    assert "1 not yet measured" in summary
    assert "found: “Lifts much” (+19.9 points); “Lifts little” (+19.9 points, bound +15)" in summary
    assert "Farthest from what was claimed: “Hurts” (-5.0 points)." in summary
    assert "](plots/claims.png)" in summary
    page = (study.results / "report.html").read_text()
    for tone, sign in (("good", "✓ held"), ("unsure", "≈ not held, within noise")):
        assert f'<span class="{tone}">{sign}</span>' in page
    assert '<span class="bad-open">✗ not held, noise unknown</span>' in page


def test_controls_are_no_main_arms_in_bars() -> None:
    study = fake_study.study(Path(), fake_study.arm("a", title="control: nothing"))
    assert report._kind(study, study.arm("a")) == "control"
    assert report._label(study.arm("a")) == "nothing (a)"
    others = fake_study.study(Path(), fake_study.arm("a"), fake_study.arm("b"))
    assert [report._kind(others, arm) for arm in others.arms] == ["main", "variant"]


def test_labels_of_plots_lie_apart_and_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Figure.savefig

    def check(figure: Figure, *args: Any, **options: Any) -> None:
        figure.draw_without_rendering()
        (axes,) = figure.axes
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            boxes = [tick.label1.get_window_extent() for tick in ticks]
            assert len(boxes) >= 2
            assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
            assert all(box.x0 >= 0 and box.y0 >= 0 for box in boxes)
        original(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", check)
    long = "a claim that needs many words, more than there is room for in one line of it"
    for scale in (1.0, 7.0):
        margins = [plots.Margin(f"{long} {i}", "good", scale**i - 9, 1.0) for i in range(3)]
        plots.plot_margins(tmp_path / "m.png", margins)
    bars = [plots.Bar(f"{long} {i}", "main", [1.0, 2.0]) for i in range(30)]
    plots.plot_bars(tmp_path / "b.png", bars, "AP50")
    lines = {"few": {float(k): [10.0] for k in (1, 3, 5, 10, 30, 100)}}
    plots.plot_thresholds(tmp_path / "t.png", lines, "k", "RC@k", is_log=True)
    for name in "mbt":
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width <= 1600


def test_a_study_may_name_its_columns(study: Study, put: Callable[..., None]) -> None:
    put("first", 0, boxes_top1=0.25, AP50_novel=0.5)
    study = dataclasses.replace(study, columns=(("boxes", "boxes_top1"),))
    assert _rows(report.write(study, None), "first")[0][2:] == ["25.0", "1", "1.5"]


def test_precision_by_group(study: Study, put: Callable[..., None]) -> None:
    for seed, precision in enumerate((0.5, 0.7)):
        group = {"pseudo_boxes": 1000 + 10 * seed, "precision": precision, "recall": None}
        group |= {"holds_name": 800 + 8 * seed}
        none = {"pseudo_boxes": 0, "precision": None, "recall": 0.0, "holds_name": 0}
        mined = [{"first": 1, "share": 0.9}, {"first": 2, "share": 0.8 - 0.1 * seed}]
        groups = {"base": group, "novel_word": none}
        put("second", seed, groups=groups, hard_negatives=mined)
    rows = _rows(report.write(study, None), "second")
    assert ["second", "boxes", "1,005 ± 7", "0 ± 0"] in rows
    assert ["second", "precision", "60.0 ± 14.1", "–"] in rows
    assert ["second", "names the object", "80.0 ± 0.0", "–"] in rows
    assert ["second", "recall", "–", "0.0 ± 0.0"] in rows
    assert ["second", "1", "90.0 ± 0.0"] in rows and ["second", "2", "75.0 ± 7.1"] in rows


def test_plateau_is_the_change_over_the_last_30_percent(
    study: Study, put: Callable[..., None]
) -> None:
    values = {200: 0.1, 600: 0.40, 800: 0.46, 1000: 0.42}
    put("first", 0, curve=[{"step": step, "AP_base": value} for step, value in values.items()])
    file = report.write(dataclasses.replace(study, curves=("first",)), None)
    assert ["first", "0", "600", "40.0", "42.0", "+2.0", "6.0"] in _rows(file, "first")


# --- pictures and rendering ----------------------------------------------------------------------


def _full(study: Study, put: Callable[..., None]) -> Study:
    curve = [{"step": s, "AP50_base": 0.1 * s, "AP50_novel": 0.05 * s} for s in (1, 2)]
    for seed in (0, 1):
        put("first", seed, AP50_base=0.5, AP50_novel=0.2, curve=curve)
        put("second", seed, AP50_base=0.4, AP50_novel=0.3)
        sides = {"in_domain_AP50": 0.5, "out_of_domain_AP50": 0.1}
        recall = {"few names": {"1": 0.2, "10": 0.6}, "many names": {"1": 0.1, "10": 0.3}}
        points = [{"weight": w, **sides} for w in (0, 1)]
        put("third", seed, points=points, recall=recall)
    thresholds = ((0.1, "first"), (0.3, "second"))
    pictures = (("A caption", "first", "pictures/shapes_*.png"),)
    return dataclasses.replace(
        study,
        curves=("first",),
        thresholds=thresholds,
        pictures=pictures,
        bars=(("AP50_novel", "novel"), ("AP50_base", "base")),
    )


def test_plots_and_pictures_are_linked_and_within(
    study: Study, put: Callable[..., None], tmp_path: Path
) -> None:
    study = _full(study, put)
    folder = tmp_path / "work" / "seed0" / "first" / "pictures"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (800, 600, 3), np.uint8)
    Image.new("RGB", (8, 8)).save(folder / "shapes_1.png")
    Image.fromarray(noise).save(folder / "shapes_2.png")
    Image.new("RGB", (8, 8)).save(folder / "training_curve.png")
    text = report.write(study, tmp_path / "work").read_text()
    bars = ("bars-AP50_novel", "bars-AP50_base", "recall")
    files = [f"plots/{name}.png" for name in (*bars, "curves", "ensemble", "thresholds")]
    files += ["pictures/1-first.png", "plots/claims.png"]
    for name in files:
        assert f"]({name})" in text
        with Image.open(study.results / name) as picture:
            assert picture.format == "PNG"
    picture = study.results / "pictures" / "1-first.png"
    assert picture.stat().st_size <= report.MAX_PICTURE_BYTES
    with Image.open(picture) as opened:
        assert opened.width / opened.height == pytest.approx(600 / 800, abs=0.01)
    page = (study.results / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == len(files) == page.count("<img")
    assert all(f'<a href="{name}"><img' in page for name in files), "each can be enlarged"
    # Without the workdir the picture stays, and the report is the same.
    assert report.write(study, None).read_text() == text


def test_plots_of_results_that_are_gone_go(study: Study, put: Callable[..., None]) -> None:
    put("first", AP50_novel=0.2)
    report.write(study, None)
    assert [file.name for file in (study.results / "plots").iterdir()] == ["bars-AP50_novel.png"]
    put("first", AP50_novel=0.2, digest="old")
    assert "bars-" not in report.write(study, None).read_text()
    assert not list((study.results / "plots").iterdir())


class _Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, content: str):
        super().__init__()
        self.tags: set[str] = set()
        self.text: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


EVIL = '<script>alert("x")</script> & | `*_'


def test_text_is_escaped_everywhere(study: Study, put: Callable[..., None]) -> None:
    claim = dataclasses.replace(CLAIM, statement=EVIL, note=EVIL)
    study = dataclasses.replace(study, title=EVIL, claims=(claim,))
    put("first", AP50_novel=0.2)
    text = report.write(study, None).read_text()
    content = (study.results / "report.html").read_text()
    page = _Page(content)
    known = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "table", "thead"}
    known |= {
        "a",
        "span",
        "tbody",
        "tr",
        "th",
        "td",
        "figure",
        "img",
        "figcaption",
        "details",
        "summary",
        "pre",
    }
    assert page.tags <= known
    assert page.text.count(EVIL) == 3  # title, heading, statement
    assert f"1. {EVIL}" in page.text  # note
    assert any("a <b> & c" in part for part in page.text)
    assert "<script" not in text.replace("\\<", "") and content.count(html.escape(EVIL)) == 4


def test_both_formats_say_the_same() -> None:
    blocks: list[document.Block] = [
        document.Heading("A_b", 3),
        document.Table(("x", "y"), [("1 | 2", "–")]),
        document.Details("more <b>", [document.Code("python -m x\n\nend"), document.Text("a*b")]),
    ]
    assert document.markdown(blocks) == (
        "### A\\_b\n\n| x | y |\n| --- | --- |\n| 1 \\| 2 | – |\n\n"
        "<details><summary>more &lt;b&gt;</summary>\n\n"
        "    python -m x\n\n    end\n\na\\*b\n\n</details>\n"
    )
    page = document.html_page("T", blocks, Path())
    for part in ("<h3>A_b</h3>", "<td>1 | 2</td><td>–</td>", "<summary>more &lt;b&gt;</summary>"):
        assert part in page
    assert "<pre>python -m x\n\nend</pre>" in page and "<p>a*b</p>" in page


def test_malformed_results_raise(study: Study) -> None:
    (study.results / "first-seed0.json").write_text("{")
    with pytest.raises(UserError, match="first-seed0.json: no JSON"):
        report.write(study, None)
