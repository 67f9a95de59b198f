"""CLIP's byte-pair tokeniser, offline.

Texts are cleaned as OpenAI's code does (ftfy, HTML unescape, white space, lower case) before the
`instant-clip-tokenizer` package, which holds the vocabulary, splits them.
"""

import html
import re
from functools import lru_cache

import ftfy
import numpy as np
from instant_clip_tokenizer import (
    Tokenizer as InstantTokenizer,  # pyright: ignore[reportAttributeAccessIssue]  # compiled
)
from jaxtyping import Int32

START, END, PAD = 49406, 49407, 0


def clean(text: str) -> str:
    """Mends mojibake and HTML entities, folds white space, lower-cases."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip().lower()


class ClipTokenizer:
    """Texts to ids: start, words, end, then zeros up to `num_positions`."""

    def __init__(self, num_positions: int):
        self.num_positions = num_positions
        self._tokenizer = InstantTokenizer()
        self._encode = lru_cache(maxsize=1 << 20)(self._encode_one)

    def encode(self, text: str) -> Int32[np.ndarray, " l"]:
        """Ids of one text; the array is shared and read-only.

        A text that does not fit loses its last words and keeps its end token; see `fits`.
        """
        return self._encode(text)[0]

    def fits(self, text: str) -> bool:
        """False if `encode` cuts the text."""
        return self._encode(text)[1]

    def encode_all(self, texts: list[str] | tuple[str, ...]) -> Int32[np.ndarray, "u l"]:
        empty = np.zeros((0, self.num_positions), np.int32)
        return np.stack([self.encode(text) for text in texts]) if texts else empty

    def _encode_one(self, text: str) -> tuple[Int32[np.ndarray, " l"], bool]:
        words = self._tokenizer.encode(clean(text))
        fits = len(words) <= self.num_positions - 2
        ids = [START, *words[: self.num_positions - 2], END]
        padded = np.full(self.num_positions, PAD, np.int32)
        padded[: len(ids)] = ids
        padded.flags.writeable = False
        return padded, fits
