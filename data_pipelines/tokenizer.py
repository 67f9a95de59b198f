"""Texts to ids, offline: the byte-pair rules of CLIP, the pieces of SigLIP and SigLIP 2.

CLIP's vocabulary is built in (`instant-clip-tokenizer`); a `tokenizer.json` beside a checkpoint
takes its place. SigLIP needs its `spiece.model`, SigLIP 2 its `tokenizer.json`. No text can write
a special token: the end token marks where a text is pooled.
"""

import html
import re
import string
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import ftfy
import numpy as np
from instant_clip_tokenizer import (
    Tokenizer as InstantTokenizer,  # pyright: ignore[reportAttributeAccessIssue]  # compiled
)
from jaxtyping import Int32

from owl_det.config import TextTowerConfig
from owl_det.errors import DataError

START, END, PAD = 49406, 49407, 0  # CLIP

# The file that each kind reads; CLIP's may be absent.
FILES = {"clip": "tokenizer.json", "siglip": "spiece.model", "siglip2": "tokenizer.json"}

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean(text: str) -> str:
    """Mends mojibake and HTML entities, folds white space, lower-cases: OpenAI's code for CLIP."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip().lower()


def canonicalise(text: str) -> str:
    """Lower-cases, removes ASCII punctuation, folds white space: SigLIP, as in transformers.

    big_vision's evaluations turn underscores of class names into spaces before; here readers do.
    """
    return re.sub(r"\s+", " ", text.lower().translate(_PUNCTUATION)).strip()


class Tokenizer:
    """Texts to ids: start, words, end, then padding up to `num_positions`."""

    def __init__(
        self,
        num_positions: int,
        words: Callable[[str], Sequence[int]],
        *,
        start: tuple[int, ...],
        end: int,
        pad: int,
    ):
        """`words` gives the ids of a text without start, end and padding."""
        self.num_positions = num_positions
        self._words, self._start, self._end, self._pad = words, start, end, pad
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
        words = self._words(text)
        room = self.num_positions - len(self._start) - 1
        ids = [*self._start, *words[:room], self._end]
        padded = np.full(self.num_positions, self._pad, np.int32)
        padded[: len(ids)] = ids
        padded.flags.writeable = False
        return padded, len(words) <= room


class ClipTokenizer(Tokenizer):
    """CLIP's rules with the vocabulary that is built in."""

    def __init__(self, num_positions: int):
        instant = InstantTokenizer()
        super().__init__(
            num_positions,
            lambda text: instant.encode(clean(text)),
            start=(START,),
            end=END,
            pad=PAD,
        )


def build(text: TextTowerConfig, file: str | Path = "") -> Tokenizer:
    """The tokeniser of a text tower.

    `file` is the `tokenizer.json` or `spiece.model` that came with the weights; only CLIP does
    without. Raises `DataError`, naming the file or the missing package, if it cannot be read or
    has more entries than the tower's vocabulary.
    """
    if text.tokenizer == "clip" and not file:
        if text.vocabulary_size <= END:
            raise DataError(
                f"config.model.text.vocabulary_size: {text.vocabulary_size} is smaller than CLIP's "
                "vocabulary, which is built in; name the model's tokenizer.json in "
                "config.data.tokenizer"
            )
        return ClipTokenizer(text.num_positions)
    if not file:
        raise DataError(
            f"config.data.tokenizer: a {text.tokenizer} text tower needs the "
            f"{FILES[text.tokenizer]} of its model"
        )
    if not Path(file).is_file():
        raise DataError(f"{file}: no such tokeniser file (config.data.tokenizer)")
    builders = {"clip": _clip_json, "siglip": _siglip, "siglip2": _siglip2}
    return builders[text.tokenizer](text, Path(file))


def _clip_json(text: TextTowerConfig, file: Path) -> Tokenizer:
    from data_pipelines import vocabulary_file

    library = vocabulary_file.read_json(file, text.vocabulary_size)
    start, end = (
        vocabulary_file.id_of(library, token, file)
        for token in ("<|startoftext|>", "<|endoftext|>")
    )
    if end != max(library.get_vocab().values()):
        # The text tower finds the end of a text by its id.
        raise DataError(f"{file}: <|endoftext|> is not the last id; no CLIP vocabulary")
    return Tokenizer(
        text.num_positions,
        lambda words: library.encode(clean(words), add_special_tokens=False).ids,
        start=(start,),
        end=end,
        pad=PAD,
    )


def _siglip2(text: TextTowerConfig, file: Path) -> Tokenizer:
    """Gemma's vocabulary over lower-cased text; punctuation stays."""
    from data_pipelines import vocabulary_file

    library = vocabulary_file.read_json(file, text.vocabulary_size)
    return Tokenizer(
        text.num_positions,
        lambda words: library.encode(words.lower(), add_special_tokens=False).ids,
        start=(),
        end=vocabulary_file.id_of(library, "<eos>", file),
        pad=vocabulary_file.id_of(library, "<pad>", file),
    )


def _siglip(text: TextTowerConfig, file: Path) -> Tokenizer:
    """Sentencepiece over canonical text; the end token is the padding too."""
    from data_pipelines import vocabulary_file

    pieces = vocabulary_file.read_sentencepiece(file, text.vocabulary_size)
    return Tokenizer(
        text.num_positions,
        lambda words: pieces.encode(canonicalise(words)),
        start=(),
        end=pieces.eos_id(),
        pad=pieces.eos_id(),
    )
