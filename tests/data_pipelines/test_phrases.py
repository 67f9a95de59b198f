"""Phrases of captions: the rules of arXiv 2306.09683, A.2, on examples worked by hand."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import phrases

TOKENS = (
    "a",
    "the",
    "red",
    "dog",
    "dogs",
    "running",
    "cross",
    "stock",
    "12",
    "o'clock",
    "r&b",
    ",",
)


def test_everygrams_go_by_start_then_by_length() -> None:
    grams = [" ".join(gram) for gram in phrases.everygrams("a b c d".split(), 3)]
    assert grams == ["a", "a b", "a b c", "b", "b c", "b c d", "c", "c d", "d"]


def test_ngrams_of_a_web_caption() -> None:
    """'free', 'stock' and 'photo' are generic, 'of' and 'the' alone are stop words."""
    found = phrases.ngrams("Free stock photo of the Red Panda")
    assert found == [
        "of the red",
        "of the red panda",
        "the red",
        "the red panda",
        "red",
        "red panda",
        "panda",
    ]


def test_words_are_split_at_white_space_alone() -> None:
    """Generic words go before the N-grams are made, so those beside them become neighbours."""
    assert phrases.ngrams("dog image, cat\timage bird") == [
        *("dog", "dog image,", "dog image, cat", "dog image, cat bird"),
        *("image,", "image, cat", "image, cat bird"),
        *("cat", "cat bird", "bird"),
    ]


def test_ngrams_have_at_most_ten_words_and_are_cut_in_order() -> None:
    words = [f"w{i}" for i in range(40)]
    found = phrases.ngrams(" ".join(words))
    assert len(found) == 300
    assert max(len(gram.split()) for gram in found) == 10
    assert found[:11] == [" ".join(words[:n]) for n in range(1, 11)] + ["w1"]
    assert found[-1] == " ".join(words[29:39])  # 30 starts of ten N-grams each


def test_rules_are_counted() -> None:
    counts: Counter[str] = Counter()
    found = phrases.ngrams("the stock photo of stock", max_ngrams=2, counts=counts)
    assert found == []
    assert counts == {
        **{"generic word: stock": 2, "generic word: photo": 1, "stop words only": 3},
        "kept": 0,
    }
    phrases.ngrams("a b c", max_ngrams=2, counts=counts)
    assert (counts["kept"], counts["beyond the limit of an image"]) == (2, 3)


def test_word_lists_are_of_the_published_size() -> None:
    assert len(phrases.STOP_WORDS) == 127
    assert len(phrases.GENERIC_WORDS) == 61
    assert not phrases.STOP_WORDS & phrases.GENERIC_WORDS


# --- noun phrases --------------------------------------------------------------------------------


def test_words_are_split_without_punctuation() -> None:
    assert phrases.split_words("The man's T-shirt, size_42 (U.S.): rock 'n' roll!") == [
        *(["the", "man's", "t-shirt"], ["size"], ["42"], ["u.s"], ["rock"], ["n"], ["roll"])
    ]
    assert phrases.split_words(" \n") == phrases.split_words("-- !") == []


def test_phrases_in_a_text_do_not_cross_punctuation() -> None:
    assert list(phrases.phrases_in("Red dog, cat")) == ["red", "red dog", "dog", "cat"]


@pytest.fixture
def textblob() -> None:
    pytest.importorskip("textblob", reason="needs the extra phrases")


def uses_textblob(test: Any) -> Any:
    """TextBlob leaves its lexicon open after reading it."""
    ignored = pytest.mark.filterwarnings("ignore:unclosed file.*textblob:ResourceWarning")
    return ignored(pytest.mark.usefixtures("textblob")(test))


@uses_textblob
@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (
            "a picture of a striped red star, a blue cross and an orange ring",
            ["striped red star", "blue cross", "orange ring"],
        ),
        ("we found a pink heart and a white arrow here", ["pink heart", "white arrow"]),
        ("drawing of a blue circle, high resolution", ["blue circle"]),
        ("purple triangle free png download", ["purple triangle"]),
        (
            "Two small dogs chasing a frisbee on the green grass of Central Park",
            ["small dogs", "frisbee", "green grass", "central park"],
        ),
        (
            "Stock Photo: beautiful woman holding a cup of hot coffee 2019",
            ["beautiful woman", "cup", "hot coffee"],
        ),
        ("black running shoes for men, size 42", ["black running shoes", "men", "size"]),
        ("A STOP SIGN next to the old fire hydrant", ["stop sign", "old fire hydrant"]),
        ("running dogs", ["running dogs"]),
        ("dogs running", ["dogs"]),
        ("very nice", []),
        ("", []),
        ("… !?", []),
    ],
)
def test_noun_phrases_of_captions(caption: str, expected: list[str]) -> None:
    found = phrases.noun_phrases(caption)
    assert found == expected
    assert set(found) <= set(phrases.phrases_in(caption))


@uses_textblob
def test_noun_phrases_are_limited_and_counted() -> None:
    counts: Counter[str] = Counter()
    caption = "a dog, a cat and stock photo of the cow"
    assert phrases.noun_phrases(caption, max_phrases=2, counts=counts) == ["dog", "cat"]
    assert counts == {
        **{"generic word: stock": 1, "generic word: photo": 1, "kept": 2},
        "beyond the limit of an image": 1,
    }
    long = " ".join(["red"] * 12) + " dog"
    assert phrases.noun_phrases(long) == [" ".join(["red"] * 9) + " dog"]


@uses_textblob
@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from(TOKENS), max_size=12).map(" ".join))
def test_any_text_has_noun_phrases_of_its_own_words(text: str) -> None:
    found = phrases.noun_phrases(text)
    assert set(found) <= set(phrases.phrases_in(text))
