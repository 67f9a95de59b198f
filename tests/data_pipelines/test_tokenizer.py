"""The tokeniser against ids of OpenAI's CLIP, and what happens to texts that do not fit."""

import numpy as np
import pytest

from data_pipelines.tokenizer import END, PAD, START, ClipTokenizer, clean


def _words(text: str, num_positions: int = 16) -> list[int]:
    ids = ClipTokenizer(num_positions).encode(text).tolist()
    assert ids[0] == START and ids.count(END) == 1
    end = ids.index(END)
    assert all(i == PAD for i in ids[end + 1 :])
    return ids[1:end]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("", []),
        ("  A  photo\n of a CAT ", [320, 1125, 539, 320, 2368]),
    ],
)
def test_known_ids(text: str, ids: list[int]) -> None:
    assert _words(text) == ids


def test_cleaning() -> None:
    assert clean("  Caf&amp;eacute;\t&lt;b&gt; ") == "café <b>"
    assert clean("schÃ¶n") == "schön"
    assert _words("cat &amp; dog") == _words("cat & dog")


@pytest.mark.parametrize("text", ["<|endoftext|> cat", "<|startoftext|>"])
def test_special_tokens_cannot_be_written(text: str) -> None:
    """The end token marks where the text is pooled: a caption must not be able to forge it."""
    assert not {START, END} & set(_words(text))


def test_a_text_that_does_not_fit_keeps_its_end_token() -> None:
    tokenizer = ClipTokenizer(6)
    assert tokenizer.fits("one two three four")
    assert not tokenizer.fits("one two three four five")
    long, short = (
        tokenizer.encode("one two three four five"),
        tokenizer.encode("one two three four"),
    )
    np.testing.assert_array_equal(long, short)
    assert long[-1] == END


def test_shapes_of_many_and_of_none() -> None:
    tokenizer = ClipTokenizer(8)
    assert tokenizer.encode_all([]).shape == (0, 8)
    many = tokenizer.encode_all(("cat", "dog"))
    assert many.dtype == np.int32 and many.shape == (2, 8)
    np.testing.assert_array_equal(many[1], tokenizer.encode("dog"))
    with pytest.raises(ValueError, match="read-only"):
        tokenizer.encode("dog")[0] = 1
