"""The annotation benchmark, on a few images."""

import json

import pytest

from benchmarks import annotate


@pytest.mark.nightly
def test_all_parts_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--num_images", "2", "--batch_size", "2", "--source_size", "64"]
    arguments += ["--num_curated", "8", "--max_ngrams", "8", "--queries", "8", "16"]
    assert annotate.main([*arguments, "--prompts", "none"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["stages"]) == {"decode", "image_tower", "text_tower", "heads", "writing"}
    assert sum(stage["share"] for stage in result["stages"].values()) == pytest.approx(1)
    assert result["job"]["images_per_second"] > 0
    assert [row["queries"] for row in result["growth"]] == [8, 16]


def test_useless_arguments_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert annotate.main(["--num_images", "1"]) == 2
    assert "--num_images" in capsys.readouterr().err
