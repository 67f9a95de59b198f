"""Names that the annotator wrongly detects in an image: the negatives that teach most.

The idea is SAM 3's (arXiv 2511.16719), where 30 such names an image raised cgF1 from 28.3 to 43.0;
there other models verify them. Here nothing does, so a name is taken for absent only if nothing
that the annotator knows speaks for it:

- no box is labelled with it: of every box that is recorded another query is the best, also before
  the factor on curated scores;
- no box's phrase holds it or is held by it ("dog" and "brown dog"): both may be right;
- the image's texts do not mention it.

A synonym that loses to a better one on every box ("puppy" to "dog") passes all three, and so does
an object that the annotator calls by a wrong name: use a vocabulary of distinct names, and measure
with `owl-det annotate-precision` where the truth is known.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

from data_pipelines.phrases import split_words

_ENDINGS = ("s", "es")  # of plurals, as the merge of vocabularies knows them


def choose(
    names: Sequence[str],
    scores: Float[np.ndarray, " c"],
    count: int,
    *,
    found: Iterable[str],
    texts: Sequence[str],
) -> list[int]:
    """Indices of up to `count` of the c names, hardest first: by `scores`, then by their order.

    `scores` are each name's best over the image's boxes; a name of score 0 is never chosen. `found`
    are the phrases of boxes, and names that would be. Both are compared word by word without
    punctuation, singular and plural alike.
    """
    # A phrase of punctuation alone ("|") has no words and says nothing.
    phrases = [words for phrase in dict.fromkeys(found) if (words := _words(phrase))]
    captions = [word_list for text in texts for word_list in split_words(text)]
    chosen: list[int] = []
    for index in map(int, np.argsort(-scores, kind="stable")):
        if len(chosen) == count or not scores[index] > 0:
            break
        words = _words(names[index])
        if not _is_mentioned(words, captions) and not any(_is_part(words, p) for p in phrases):
            chosen.append(index)
    return chosen


def _words(phrase: str) -> list[str]:
    return [word for words in split_words(phrase) for word in words]


def _is_part(a: Sequence[str], b: Sequence[str]) -> bool:
    """True if all words of one are among the other's."""
    return all(any(_is_same(x, y) for y in b) for x in a) or all(
        any(_is_same(x, y) for x in a) for y in b
    )


def _is_mentioned(words: Sequence[str], captions: Sequence[Sequence[str]]) -> bool:
    """True if the words stand next to each other in one of the captions."""
    return any(
        all(_is_same(x, y) for x, y in zip(words, caption[start:], strict=False))
        for caption in captions
        for start in range(len(caption) - len(words) + 1)
    )


def _is_same(a: str, b: str) -> bool:
    return a == b or any(a + end == b or b + end == a for end in _ENDINGS)
