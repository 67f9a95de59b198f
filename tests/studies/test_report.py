"""The report's arithmetic against numbers by hand; what it lists, and that it escapes text."""

import dataclasses
import html
import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from owl_det.errors import UserError
from studies import arms, claims, document, report
from studies.arms import Claim, Study
from studies.claims import judge, read_results, value_of, verdict
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
            "digest": digest or arms.digest(study, study.arm(arm)),
            "metrics": metrics,
        }
        arms.result_file(study, study.arm(arm), seed).write_text(json.dumps(content))

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
        *("AP50_novel", "second: 22.5 ± 3.5", "first: 20.0 ± 14.1"),
        *("+2.5 ± 7.5", "1 of 2 seeds", "held, noise unknown"),
    ]


def test_a_shared_arm_is_compared_with_every_seed(study: Study, put: Callable[..., None]) -> None:
    first, *others = study.arms
    study = dataclasses.replace(study, arms=(dataclasses.replace(first, is_shared=True), *others))
    put("first", AP50_novel=0.1)
    for seed, value in enumerate((0.2, 0.3, 0.4)):
        put("second", seed, AP50_novel=value)
    (row,) = _rows(report.write(study, None), "Helps")
    assert row[4:6] == ["+20.0 ± 5.8", "3 of 3 seeds"]
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
    assert row[3:7] == ["2 · first: 10.0", "-1.0", "0 of 1 seeds", "not held, noise unknown"]
    (row,) = _rows(file, "Costs")
    assert row[4:7] == ["-9.0 (bound -10)", "1 of 1 seeds", "held, noise unknown"]
    (row,) = _rows(file, "Alone")
    assert row[3:7] == ["–", "+19.0 (bound +20)", "0 of 1 seeds", "not held, noise unknown"]


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
    assert row[2:7] == ["second", "first", "–", "–", "not yet measured"]


def test_rates_are_no_percentages(study: Study, put: Callable[..., None]) -> None:
    put("first", images_per_second=100.0)
    put("second", images_per_second=125.5)
    faster = dataclasses.replace(CLAIM, metric="images_per_second")
    (row,) = _rows(report.write(dataclasses.replace(study, claims=(faster,)), None), "Helps")
    assert row[2:5] == ["second: 125.5", "first: 100.0", "+25.5"]


# --- tables --------------------------------------------------------------------------------------


def test_report_without_results_lists_every_arm(study: Study) -> None:
    file = report.write(study, None)
    text = file.read_text()
    assert file == study.results / "report.md"
    missing = "; ".join(f"{name} (seeds 0, 1, 2)" for name in ("first", "second", "third"))
    assert f"Not yet run: {missing}." in text
    assert _rows(file, "Helps")[0][6] == "not yet measured"
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
    row = _rows(report.write(study, None), "first")[0]
    header = (column for column, _ in arms.DETECTION_COLUMNS)
    values = dict(zip(("arm", "title", *header, "seeds", "minutes"), row, strict=True))
    assert values["AP50 base"] == "50.0 ± 0.0"
    assert values["AP50 novel"] == "15.0 ± 7.1"  # √2 · 0.05
    assert values["AP50 novel word"] == "–"
    assert values["region top-1 base"] == "25.0"
    assert (values["seeds"], values["minutes"]) == ("2", "1.5 ± 0.0")


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
    files.append("pictures/1-first.png")
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
    known |= {"tbody", "tr", "th", "td", "figure", "img", "figcaption", "details", "summary", "pre"}
    assert page.tags <= known
    assert page.text.count(EVIL) == 4  # title, heading, statement, note
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
