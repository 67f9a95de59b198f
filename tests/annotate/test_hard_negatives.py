"""Which names are taken for wrongly detected, on examples worked by hand."""

import numpy as np

from owl_det.annotate import hard_negatives


def _choose(scores: dict[str, float], count: int, found: str = "", text: str = "") -> list[str]:
    names = list(scores)
    chosen = hard_negatives.choose(
        names,
        np.array(list(scores.values()), np.float32),
        count,
        found=[phrase for phrase in found.split(";") if phrase],
        texts=[text],
    )
    return [names[i] for i in chosen]


def test_the_highest_scores_come_first_and_no_more_than_asked() -> None:
    scores = {"cat": 0.2, "dog": 0.6, "owl": 0.2, "hen": 0.4}
    assert _choose(scores, 3) == ["dog", "hen", "cat"]
    assert _choose(scores, 10) == ["dog", "hen", "cat", "owl"]
    assert _choose(scores, 0) == []


def test_a_name_that_is_found_nowhere_is_no_hard_negative() -> None:
    assert _choose({"cat": 0.0, "dog": 0.1}, 2) == ["dog"]


def test_what_a_box_is_called_is_there_and_so_are_its_hypernyms() -> None:
    scores = {"dog": 0.9, "brown dog": 0.8, "small brown dogs": 0.7, "hot dog": 0.6, "cat": 0.5}
    assert _choose(scores, 5, found="brown dog") == ["hot dog", "cat"]
    assert _choose(scores, 5, found="dogs") == ["cat"]
    assert _choose(scores, 5, found="a dog,") == ["brown dog", "small brown dogs", "hot dog", "cat"]


def test_a_phrase_of_punctuation_alone_says_nothing() -> None:
    assert _choose({"cat": 0.9, "dog": 0.8}, 5, found="|;dog") == ["cat"]


def test_what_the_caption_mentions_may_be_there() -> None:
    scores = {"red bus": 0.9, "bus stop": 0.8, "box": 0.7, "fire hydrant": 0.6}
    assert _choose(scores, 4, text="Red buses; boxes and a hydrant, fire") == [
        "bus stop",
        "fire hydrant",
    ]
    # Only words next to each other are a mention.
    assert _choose({"red bus": 0.9}, 1, text="a bus in red") == ["red bus"]
    assert _choose({"red bus": 0.9}, 1, text="something red, buses") == ["red bus"]
