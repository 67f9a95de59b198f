"""Phrases of captions: all N-grams by the published rules, or noun phrases.

N-grams and the lists of words are those of Minderer et al. 2023 (arXiv 2306.09683, appendix A.2).
Noun phrases instead of all N-grams are an addition of this library.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

MAX_NGRAM_WORDS = 10
MAX_NGRAMS = 300  # of one image

STOP_WORDS = frozenset(
    """
    a about above after again against all am an and any are as at be because been before being
    below between both but by can did do does doing don down during each few for from further had
    has have having he her here hers herself him himself his how i if in into is it its itself just
    me more most my myself no nor not now of off on once only or other our ours ourselves out over
    own s same she should so some such t than that the their theirs them themselves then there
    these they this those through to too under until up very was we were what when where which
    while who whom why will with you your yours yourself yourselves
    """.split()
)
GENERIC_WORDS = frozenset(
    """
    alibaba aliexpress amazon available background blog buy co com description diy download
    facebook free gif hd ideas illustration illustrations image images img instagram jpg online org
    original page pdf photo photography photos picclick picture pictures png porn premium
    resolution royalty sale sex shutterstock stock svg thumbnail tumblr tumgir twitter uk uploaded
    vector vectors video videos wallpaper wallpapers wholesale www xxx youtube
    """.split()
)

_WORD_OR_MARK = re.compile(r"[^\W_]+(?:['’&.-][^\W_]+)*|\S")


# --- N-grams -------------------------------------------------------------------------------------


def everygrams(words: Sequence[str], max_words: int) -> Iterator[tuple[str, ...]]:
    """All runs of up to `max_words` words, by where they start, then by length (as NLTK does)."""
    for start in range(len(words)):
        for end in range(start + 1, min(start + max_words, len(words)) + 1):
            yield tuple(words[start:end])


def ngrams(
    caption: str,
    *,
    max_ngrams: int = MAX_NGRAMS,
    max_words: int = MAX_NGRAM_WORDS,
    counts: Counter[str] | None = None,
) -> list[str]:
    """Queries of one caption (A.2).

    Lower-cased and split at white space; generic words are dropped; of all N-grams of the rest, in
    the order of `everygrams`, those that hold stop words only are skipped and the first
    `max_ngrams` are taken. A phrase that occurs twice is listed twice, and counts twice.
    `counts` adds up what each rule kept and dropped, with "generic word: <word>" for the words.
    """
    counts = Counter() if counts is None else counts
    words = caption.lower().split()
    kept = [word for word in words if word not in GENERIC_WORDS]
    counts.update(f"generic word: {word}" for word in words if word in GENERIC_WORDS)
    queries: list[str] = []
    for gram in everygrams(kept, max_words):
        if STOP_WORDS.issuperset(gram):
            counts["stop words only"] += 1
        elif len(queries) < max_ngrams:
            queries.append(" ".join(gram))
        else:
            counts["beyond the limit of an image"] += 1
    counts["kept"] += len(queries)
    return queries


# --- noun phrases --------------------------------------------------------------------------------


def split_words(text: str) -> list[list[str]]:
    """Lower-cased words, in runs that no punctuation interrupts."""
    runs: list[list[str]] = [[]]
    for token in _WORD_OR_MARK.findall(text.lower()):
        if token[0].isalnum():
            runs[-1].append(token)
        else:
            runs.append([])
    return [run for run in runs if run]


def phrases_in(text: str, max_words: int = MAX_NGRAM_WORDS) -> Iterator[str]:
    """All N-grams of `split_words`: every noun phrase, and every part of one, is among them."""
    for run in split_words(text):
        for gram in everygrams(run, max_words):
            yield " ".join(gram)


def noun_phrases(
    caption: str, *, max_phrases: int = MAX_NGRAMS, counts: Counter[str] | None = None
) -> list[str]:
    """Queries of one caption: nouns with the adjectives and nouns in front of them.

    The words of `split_words` are tagged by TextBlob's rules (a lexicon and Brill's rules, files
    of the package). A phrase is a maximal run of adjectives and nouns, up to its last noun, that
    neither punctuation, a number nor a generic word interrupts; an adjective after a noun starts a
    new one. A participle counts as an adjective unless it follows a noun or pronoun ("running
    shoes", but "dogs running"); a verb right after a determiner, number or adjective counts as a
    noun, since that is what it is there ("a blue cross"). Of more than ten words the last ten are
    taken. `counts` as for `ngrams`.
    """
    counts = Counter() if counts is None else counts
    queries: list[str] = []
    for run in split_words(caption):
        for phrase in _noun_phrases_of_run(run, counts):
            if STOP_WORDS.issuperset(phrase):
                counts["stop words only"] += 1
            elif len(queries) < max_phrases:
                queries.append(" ".join(phrase[-MAX_NGRAM_WORDS:]))
            else:
                counts["beyond the limit of an image"] += 1
    counts["kept"] += len(queries)
    return queries


def _noun_phrases_of_run(words: Sequence[str], counts: Counter[str]) -> list[list[str]]:
    from textblob.en import tag  # pyright: ignore[reportMissingImports]  # not in the base install

    kinds: list[str] = []
    for word, (_, given) in zip(words, tag(" ".join(words), tokenize=False), strict=True):
        kind = _kind(given, kinds[-1] if kinds else "")
        if word in GENERIC_WORDS:
            kind = "generic"
            counts[f"generic word: {word}"] += 1
        kinds.append(kind)
    letters = "".join({"adjective": "a", "noun": "n"}.get(kind, "-") for kind in kinds)
    return [list(words[m.start() : m.end()]) for m in re.finditer("a*n+", letters)]


def _kind(tag: str, before: str) -> str:
    """What a word does, by its Penn Treebank tag and the kind of the word before it."""
    if tag.startswith("NN"):
        return "noun"
    if tag.startswith("JJ") or (tag in ("VBG", "VBN") and before not in ("noun", "pronoun")):
        return "adjective"
    if tag in ("DT", "PRP$", "CD"):
        return "determiner"
    if tag.startswith("VB") and before in ("determiner", "adjective"):
        return "noun"
    return "pronoun" if tag == "PRP" else "other"
