"""What the report of an annotation job says beside its numbers."""

from owl_det.annotate import report

CURATED = {"curated": [3, 0], "ngrams": [1, 1], "noun_phrases": [0, 0]}


def test_why_curated_scores_stop_is_said_where_both_spaces_are_asked() -> None:
    for labels in ("union", "union_noun_phrases"):
        (line, _) = report._why_scores_stop(CURATED, labels)
        assert "Scores of curated names end at 0.3" in line
    assert report._why_scores_stop(CURATED, "curated") == [], "they do not stop"
    assert report._why_scores_stop(CURATED, "ngrams") == []
    assert report._why_scores_stop({**CURATED, "curated": [0, 0]}, "union") == []


def test_the_table_of_phrases_has_a_title_that_says_what_is_left_out() -> None:
    assert "## Phrases kept" in report._phrases_title(report.NUM_PHRASES)
    assert "## Phrases kept: the 50 most frequent of 1,234" in report._phrases_title(1234)
