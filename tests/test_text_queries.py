"""Queries as callers give them: what is taken as meant, and what is refused in one line."""

import logging
import re
from typing import Any

import numpy as np
import pytest

from data_pipelines import tokenizer
from owl_det.config import TextTowerConfig
from owl_det.errors import DataError
from owl_det.inference import text_queries
from owl_det.inference.detections import Detections


@pytest.mark.parametrize(
    "queries",
    [
        ["cat", "dog"],
        ("cat", "dog"),
        [["cat", "dog"]],
        np.array(["cat", "dog"]),
        np.array([["cat", "dog"]]),
        (name for name in ("cat", "dog")),
    ],
)
def test_lists_of_every_kind_are_taken(queries: Any) -> None:
    assert text_queries.texts(queries) == ("cat", "dog")
    assert text_queries.texts("cat") == ("cat",)


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ([], "queries: are empty; give a list of texts"),
        (None, "queries: got None"),
        (3, "queries: got int"),
        (b"cat", "queries: got bytes"),
        ({"cat": "animal"}, "queries: a dict"),
        ({"cat", "dog"}, "a set has no order"),
        (["cat", 3], "queries: 1: 3 is no text"),
        (["cat", None], "queries: 1: None is no text"),
        (["cat", ""], "queries: 1: '' is an empty text"),
        (["cat", " \t\u200b"], "queries: 1: .* is an empty text"),
        ([["cat"], ["dog"]], "a list of lists; .* asked of all its images"),
    ],
)
def test_what_is_no_list_of_texts_is_one_clear_line(queries: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        text_queries.texts(queries)


def test_a_text_is_asked_once() -> None:
    asked = text_queries.is_asked(["cat", "Dog", "dog ", "CAT", "cats"])
    assert asked.tolist() == [True, True, False, False, True]


def test_a_text_of_which_nothing_is_read_is_refused() -> None:
    words = tokenizer.build(TextTowerConfig())
    text_queries.check_read(["cat"], words)
    with pytest.raises(DataError, match="queries: 1: .* has nothing that the text tower reads"):
        text_queries.check_read(["cat", "&nbsp;"], words)


@pytest.mark.parametrize(
    ("queries", "said"),
    [
        (["red square, blue circle"], "'red square', 'blue circle'"),
        (["cat . dog ."], "'cat', 'dog'"),
        (["cat; dog", "a|b"], r"\(and 1 more\)"),
        (["cat", "Cat"], "'Cat' is asked twice"),
    ],
)
def test_what_is_probably_not_meant_is_said(
    queries: list[str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="absl"):
        text_queries.warn(["a red cat.", "St. Bernard", "black-and-white dog"])
        assert not caplog.messages
        text_queries.warn(queries)
    assert len(caplog.messages) == 1
    assert re.search(said, caplog.messages[0])


def test_detections_print_what_they_found() -> None:
    boxes = np.array([[10, 20, 110, 95], [0, 5, 40, 60.4]], np.float32)
    scores, labels = np.array([0.912, 0.33], np.float32), np.array([1, 0], np.int32)
    found = Detections(boxes, scores, labels, ("dog", "cat"))
    assert repr(found) == "Detections(2: cat 0.91 [10 20 110 95], dog 0.33 [0 5 40 60])"
    assert repr(Detections(boxes, scores, labels)).startswith("Detections(2: query 1 0.91 ")
    nothing = Detections(boxes[:0], scores[:0], labels[:0], ("dog",))
    assert repr(nothing) == "Detections(0)"
