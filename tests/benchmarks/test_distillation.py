"""The benchmark of distillation: what its variants switch on, and its arithmetic."""

import json
from pathlib import Path

import pytest

from benchmarks import distillation as benchmark
from owl_det.errors import ConfigError


def test_variants_switch_their_branches_on() -> None:
    made = {name: benchmark.make_config(name, "T", 4) for name in benchmark.VARIANTS}
    assert list(made["plain"].distill.active()) == []
    for name in benchmark.BRANCHES:
        assert list(made[name].distill.active()) == [name]
    assert set(made["all"].distill.active()) == set(benchmark.BRANCHES)
    for count in benchmark.PROPOSALS:
        distill = made[f"regions_{count}"].distill
        assert list(distill.active()) == ["clipself"]
        assert (distill.regions.kind, distill.regions.max_regions) == ("proposals", count)
    cached = benchmark.make_config("clipself", "T", 4, "C").distill
    assert (cached.teacher, cached.cache) == ("T", "C")
    with pytest.raises(ConfigError, match="--variants: no 'clipsef'; known: plain, gridclip_grid"):
        benchmark.make_config("clipsef", "T", 4)


def test_costs_are_ratios_of_steps() -> None:
    seconds = {"gridclip_image": 2.0, "gridclip_image cached": 1.0, "regions_20": 6.0}
    measured = {name: {"step_seconds": value} for name, value in seconds.items()}
    costs = {"regions_20_over_image": 3.0, "regions_20_over_image_cached": 6.0}
    assert benchmark.alignment_costs(measured) == costs
    assert benchmark.alignment_costs({"plain": {"step_seconds": 1.0}}) == {}


def test_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--steps=0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.nightly
def test_measures_online_and_cached(tmp_path: Path) -> None:
    out = tmp_path / "measured.json"
    options = ["--variants=gridclip_image,regions_20", "--batch_size=2", "--steps=1"]
    assert benchmark.main([*options, f"--out={out}"]) == 0
    content = json.loads(out.read_text())
    names = {"plain", "gridclip_image", "gridclip_image cached", "regions_20"}
    assert set(content["variants"]) == names
    assert content["variants"]["plain"]["over_plain"] == 1.0
    assert content["gridclip"]["regions_20_over_image"] > 1
