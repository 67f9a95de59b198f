"""What the annotator is asked for: curated names, word N-grams of captions, or both.

Source: Minderer et al. 2023 (arXiv 2306.09683), appendices A.1 to A.3, whose rules and word lists
these are. The code printed in A.1 leaves Visual Genome out of its sum; the published size of the
curated space can only be reached with it, so every given list is merged here.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owl_det.errors import DataError

MAX_NGRAM_WORDS = 10
MAX_NGRAMS = 300  # of one image
CURATED_FACTOR = 0.3  # on curated scores where both spaces are asked (A.3)
MAX_VOCABULARY_BYTES = 1 << 30

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


# --- curated -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Curated:
    """A merged vocabulary, and what the merge did to each given name."""

    names: tuple[str, ...]  # sorted
    dropped: tuple[tuple[str, str], ...]  # given name, reason


def merge_vocabularies(vocabularies: Iterable[Iterable[str]]) -> Curated:
    """One label space of several class lists (A.1).

    Names are lower-cased and made unique; x + "s" and x + "es" go where x is there. The result is
    sorted, because the order of a Python set differs between processes.
    """
    names: set[str] = set()
    dropped: list[tuple[str, str]] = []
    for given in (name for vocabulary in vocabularies for name in vocabulary):
        lower = given.lower()
        if lower in names:
            dropped.append((given, f"duplicate of {lower!r}"))
        names.add(lower)
    plurals = {name + suffix: name for name in sorted(names) for suffix in ("es", "s")}
    plurals = {plural: name for plural, name in plurals.items() if plural in names}
    dropped += [(plural, f"plural of {name!r}") for plural, name in sorted(plurals.items())]
    return Curated(names=tuple(sorted(names - plurals.keys())), dropped=tuple(dropped))


def read_vocabulary(where: str) -> tuple[str, ...]:
    """The names of one list.

    `where` is a text file of one name a line (blank lines and lines after # are skipped), a JSON
    file with COCO `categories`, `tfds:BUILDER` (such as tfds:lvis, whose names need no data), or
    `shapes_world`, its names with boxes in training. Raises `DataError` if it cannot be read or
    holds no names.
    """
    if where == "shapes_world":
        from data_pipelines.shapes_world import object_names

        names = tuple(entry.name for entry in object_names() if entry.group == "base")
    elif where.startswith("tfds:"):
        names = _tfds_names(where.removeprefix("tfds:"))
    else:
        names = _file_names(Path(where))
    if not names:
        raise DataError(f"{where}: holds no names; give a list of at least one")
    return names


def _file_names(path: Path) -> tuple[str, ...]:
    try:
        if path.stat().st_size > MAX_VOCABULARY_BYTES:
            raise DataError(f"{path}: larger than {MAX_VOCABULARY_BYTES >> 30} GiB; no label list")
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); name a UTF-8 label list") from None
    if path.suffix == ".json":
        return _coco_names(text, path)
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return tuple(line for line in lines if line)


def _coco_names(text: str, path: Path) -> tuple[str, ...]:
    try:
        content = json.loads(text)
        names = [category["name"] for category in content["categories"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no COCO JSON with categories ({error!r})") from None
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise DataError(f"{path}: a category's name is empty or no text; correct `categories`")
    is_lvis = all("synset" in category for category in content["categories"])
    return tuple(name.replace("_", " ").strip() if is_lvis else name.strip() for name in names)


def _tfds_names(builder: str) -> tuple[str, ...]:
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise DataError(
            f"tfds:{builder}: needs TensorFlow Datasets; install it with pip install owl-det[tfds]"
        ) from None
    try:
        features: Any = tfds.builder(builder).info.features
        names = features["objects"]["label"].names
    except Exception as error:  # TFDS raises many kinds for builders it does not know
        raise DataError(
            f"tfds:{builder}: no detection builder with class names ({error})"
        ) from None
    return tuple(name.replace("_", " ") for name in names)


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


_WORD_OR_MARK = re.compile(r"[^\W_]+(?:['’&.-][^\W_]+)*|\S")


def split_words(text: str) -> list[list[str]]:
    """Lower-cased words, in runs that no punctuation interrupts."""
    runs: list[list[str]] = [[]]
    for token in _WORD_OR_MARK.findall(text.lower()):
        if token[0].isalnum():
            runs[-1].append(token)
        else:
            runs.append([])
    return [run for run in runs if run]


# --- label spaces --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LabelSpace:
    """What is asked of an image: names shared by all images, and N-grams of its own texts."""

    curated: Curated = Curated(names=(), dropped=())
    uses_ngrams: bool = False
    max_ngrams: int = MAX_NGRAMS
    curated_factor: float = 1.0

    def of_image(self, texts: Sequence[str], counts: Counter[str] | None = None) -> tuple[str, ...]:
        """The image's own queries: distinct N-grams of its texts, at most `max_ngrams`."""
        if not self.uses_ngrams:
            return ()
        counts = Counter() if counts is None else counts
        queries: list[str] = []
        for text in texts:
            left = self.max_ngrams - len(queries)
            queries += ngrams(text, max_ngrams=left, counts=counts)
        distinct = tuple(dict.fromkeys(queries))
        counts["repeated in an image"] += len(queries) - len(distinct)
        return distinct

    def describe(self) -> dict[str, object]:
        """What decides which queries are asked, for comparing two runs."""
        return {
            "curated": list(self.curated.names),
            "uses_ngrams": self.uses_ngrams,
            "max_ngrams": self.max_ngrams,
            "curated_factor": self.curated_factor,
        }


def make(labels: str, vocabularies: Sequence[str], max_ngrams: int = MAX_NGRAMS) -> LabelSpace:
    """The label space that `--labels` names.

    `curated` and `union` merge `vocabularies` (see `read_vocabulary`); `ngrams` takes none. Any
    other value is itself a list of names, taken as curated. Raises `DataError` if the lists are
    missing, unreadable or given in vain.
    """
    if labels == "ngrams":
        if vocabularies:
            raise DataError("--vocabulary: --labels ngrams asks no vocabulary; use union for both")
        return LabelSpace(uses_ngrams=True, max_ngrams=max_ngrams)
    if labels not in ("curated", "union"):
        if vocabularies:
            raise DataError(f"--vocabulary: --labels {labels} is a list itself; use curated")
        vocabularies = (labels,)
    if not vocabularies:
        raise DataError(f"--vocabulary: --labels {labels} needs at least one list of names")
    curated = merge_vocabularies(map(read_vocabulary, vocabularies))
    is_union = labels == "union"
    return LabelSpace(
        curated=curated,
        uses_ngrams=is_union,
        max_ngrams=max_ngrams,
        curated_factor=CURATED_FACTOR if is_union else 1.0,
    )


# --- tables --------------------------------------------------------------------------------------


def table(space: LabelSpace, counts: Mapping[str, int]) -> dict[str, object]:
    """What was kept and dropped, and by which rule; `counts` as `ngrams` adds them up."""
    prefix = "generic word: "
    words = {key.removeprefix(prefix): n for key, n in counts.items() if key.startswith(prefix)}
    rules = {key: n for key, n in counts.items() if not key.startswith(prefix)}
    if words:
        rules["generic words"] = sum(words.values())
    return {
        "curated_kept": list(space.curated.names),
        "curated_dropped": [list(entry) for entry in space.curated.dropped],
        "ngrams": dict(sorted(rules.items())),
        "generic_words": dict(sorted(words.items(), key=lambda item: (-item[1], item[0]))),
    }


def table_markdown(space: LabelSpace, counts: Mapping[str, int], max_rows: int = 50) -> str:
    """The same as tables to read; long lists are cut and say so."""
    content = table(space, counts)
    lines = ["## Label space", ""]
    if space.curated.names:
        dropped = space.curated.dropped
        lines += [f"Curated names: {len(space.curated.names)} kept, {len(dropped)} dropped.", ""]
        rows = [[name, why] for name, why in dropped]
        lines += _markdown_rows(["dropped name", "why"], rows, max_rows)
    if space.uses_ngrams:
        for key, title in (("ngrams", "N-grams"), ("generic_words", "dropped generic word")):
            entries: dict[str, int] = content[key]  # pyright: ignore[reportAssignmentType]
            rows = [[name, f"{n:,}"] for name, n in entries.items()]
            lines += _markdown_rows([title, "count"], rows, max_rows)
    return "\n".join(lines) + "\n"


def _markdown_rows(header: list[str], rows: list[list[str]], max_rows: int) -> list[str]:
    if not rows:
        return []
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    lines += [f"| {' | '.join(escape_markdown(cell) for cell in row)} |" for row in rows[:max_rows]]
    if len(rows) > max_rows:
        lines.append(f"| … {len(rows) - max_rows} more |" + " |" * (len(header) - 1))
    return [*lines, ""]


def escape_markdown(text: str) -> str:
    """Text of unknown origin for a table cell: no markup, no line breaks."""
    escaped = "".join(f"\\{c}" if c in "\\`*_{}[]<>#|!" else c for c in text)
    return " ".join(escaped.split())
