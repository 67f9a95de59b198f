"""What the annotator is asked for: curated names, phrases of captions, or both.

Source: Minderer et al. 2023 (arXiv 2306.09683), appendices A.1 to A.3, whose rules these are. The
code printed in A.1 leaves Visual Genome out of its sum; the published size of the curated space can
only be reached with it, so every list is merged here. `data_pipelines.phrases` finds the phrases.
"""

import importlib.metadata
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from absl import logging

from data_pipelines import names as name_lib
from data_pipelines.phrases import MAX_NGRAMS, ngrams, noun_phrases
from owl_det import files
from owl_det.errors import DataError
from owl_det.optional import installation, is_installed

CURATED_FACTOR = 0.3  # on curated scores where both spaces are asked (A.3)
MAX_VOCABULARY_BYTES = 1 << 30


# --- curated -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Curated:
    """A merged vocabulary, and what the merge did to each given name."""

    names: tuple[str, ...]  # sorted
    dropped: tuple[tuple[str, str], ...]  # given name, reason


def merge_vocabularies(vocabularies: Iterable[Iterable[str]]) -> Curated:
    """One label space of several class lists (A.1).

    Names are made plain (`names.plain`), lower-cased and unique; x + "s" and x + "es" go where x is
    there. The result is sorted, because the order of a Python set differs between processes.
    """
    names: set[str] = set()
    dropped: list[tuple[str, str]] = []
    for given in (name for vocabulary in vocabularies for name in vocabulary):
        lower = name_lib.plain(given).lower()
        if lower in names:
            dropped.append((given, f"duplicate of {lower!r}"))
        names.add(lower)
    plurals = {name + suffix: name for name in sorted(names) for suffix in ("es", "s")}
    plurals = {plural: name for plural, name in plurals.items() if plural in names}
    dropped += [(plural, f"plural of {name!r}") for plural, name in sorted(plurals.items())]
    return Curated(names=tuple(sorted(names - plurals.keys())), dropped=tuple(dropped))


def read_vocabulary(where: str) -> tuple[str, ...]:
    """The names of one list.

    `where` is a text file of one name a line (`name_lists.read_list`), a JSON file with COCO
    `categories` or a list of names, `tfds:BUILDER` (such as tfds:lvis, whose names need no data),
    or `shapes_world`, its names with boxes in training. Names that are one text to the model are
    logged. Raises `UserError` if it cannot be read, is a list of another format or holds no names.
    """
    if where == "shapes_world":
        from data_pipelines.shapes_names import object_names

        names = tuple(entry.name for entry in object_names() if entry.group == "base")
    elif where.startswith("tfds:"):
        names = _tfds_names(where.removeprefix("tfds:"))
    else:
        names = _file_names(files.local(where, "--vocabulary"))
    if not names:
        raise DataError(f"{where}: holds no names; give a list of at least one")
    _warn_of_repeated(names, where)
    return names


def _warn_of_repeated(names: Sequence[str], where: str) -> None:
    counts = Counter(name_lib.plain(name).lower() for name in names)
    repeated = [name for name in names if counts[name_lib.plain(name).lower()] > 1]
    if repeated:
        logging.warning(
            "%s: %d names are %d texts to the model and are merged: %s",
            *(where, len(repeated), sum(n > 1 for n in counts.values())),
            ", ".join(repr(name) for name in repeated[:4]) + (", …" if len(repeated) > 4 else ""),
        )


def _file_names(path: Path) -> tuple[str, ...]:
    from data_pipelines import name_lists, text_file

    try:
        if path.stat().st_size > MAX_VOCABULARY_BYTES:
            raise DataError(f"{path}: larger than {MAX_VOCABULARY_BYTES >> 30} GiB; no label list")
        if path.suffix.lower() != ".json":
            return name_lists.read_list(path)
        text = text_file.decode(files.read_bytes(path), path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); name a UTF-8 label list") from None
    return _json_names(text, path)


def _json_names(text: str, path: Path) -> tuple[str, ...]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no JSON ({error}); name a UTF-8 label list") from None
    is_coco = isinstance(content, dict) and isinstance(content.get("categories"), list)
    entries = content["categories"] if is_coco else content
    if not isinstance(entries, list):
        raise DataError(f"{path}: has no list `categories`, as COCO JSON has, and is no list")
    names: list[str] = []
    for i, entry in enumerate(entries):
        where = f"{path}: categories[{i}]" if is_coco else f"{path}: entry {i}"
        name = entry.get("name") if is_coco and isinstance(entry, dict) else entry
        if not isinstance(name, str) or not name_lib.plain(name):
            raise DataError(f"{where}: its name is empty or no text: {str(name)[:60]!r}")
        names.append(name)
    return _plain(names, is_lvis=is_coco and all("synset" in entry for entry in entries))


def _plain(names: Iterable[str], *, is_lvis: bool) -> tuple[str, ...]:
    if not is_lvis:
        return tuple(map(name_lib.plain, names))
    from data_pipelines.readers.coco_file import plain_name

    return tuple(map(plain_name, names))


def _tfds_names(builder: str) -> tuple[str, ...]:
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise DataError(
            f"tfds:{builder}: needs TensorFlow Datasets: {installation('tfds')}"
        ) from None
    try:
        features: Any = tfds.builder(builder).info.features
        names = features["objects"]["label"].names
        has_boxes = "bbox" in features["objects"]
    except Exception as error:  # TFDS raises many kinds for builders it does not know
        raise DataError(
            f"tfds:{builder}: no detection builder with class names ({error})"
        ) from None
    if not has_boxes or any(name.startswith("/m/") for name in names):
        raise DataError(
            f"tfds:{builder}: its classes are labels of whole images, or ids in place of names; "
            "give a text file of names"
        )
    return _plain(names, is_lvis="neg_category_ids" in features)


# --- label spaces --------------------------------------------------------------------------------

Phrases = Literal["none", "ngrams", "noun_phrases"]
# Which phrases of the texts each value of --labels asks; all others ask none.
_PHRASES: dict[str, Phrases] = {
    "ngrams": "ngrams",
    "union": "ngrams",
    "noun_phrases": "noun_phrases",
    "union_noun_phrases": "noun_phrases",
}


@dataclass(frozen=True, kw_only=True)
class LabelSpace:
    """What is asked of an image: names shared by all images, and phrases of its own texts."""

    curated: Curated = Curated(names=(), dropped=())
    phrases: Phrases = "none"
    max_ngrams: int = MAX_NGRAMS  # or noun phrases
    curated_factor: float = 1.0

    def of_image(self, texts: Sequence[str], counts: Counter[str] | None = None) -> tuple[str, ...]:
        """The image's own queries: distinct phrases of its texts, at most `max_ngrams`."""
        if self.phrases == "none":
            return ()
        counts = Counter() if counts is None else counts
        queries: list[str] = []
        for text in texts:
            left = self.max_ngrams - len(queries)
            if self.phrases == "ngrams":
                queries += ngrams(text, max_ngrams=left, counts=counts)
            else:
                queries += noun_phrases(text, max_phrases=left, counts=counts)
        distinct = tuple(dict.fromkeys(queries))
        counts["repeated in an image"] += len(queries) - len(distinct)
        return distinct

    def describe(self) -> dict[str, object]:
        """What decides which queries are asked, for comparing two runs."""
        content: dict[str, object] = {
            "curated": list(self.curated.names),
            "uses_ngrams": self.phrases == "ngrams",
            "max_ngrams": self.max_ngrams,
            "curated_factor": self.curated_factor,
        }
        if self.phrases == "noun_phrases":
            content["tagger"] = f"textblob {importlib.metadata.version('textblob')}"
        return content


def make(labels: str, vocabularies: Sequence[str], max_ngrams: int = MAX_NGRAMS) -> LabelSpace:
    """The label space that `--labels` names.

    `curated`, `union` and `union_noun_phrases` merge `vocabularies` (see `read_vocabulary`);
    `ngrams` and `noun_phrases` take none. Any other value is itself a list of names, taken as
    curated. Raises `DataError` if the lists are missing, unreadable or given in vain, or if noun
    phrases are asked for without TextBlob.
    """
    phrases = _PHRASES.get(labels, "none")
    if phrases == "noun_phrases" and not is_installed("textblob"):
        raise DataError(f"--labels {labels}: needs TextBlob: {installation('phrases')}")
    if labels in ("ngrams", "noun_phrases"):
        if vocabularies:
            union = "union" if labels == "ngrams" else "union_noun_phrases"
            raise DataError(
                f"--vocabulary: --labels {labels} asks no vocabulary; use {union} for both"
            )
        return LabelSpace(phrases=phrases, max_ngrams=max_ngrams)
    if labels != "curated" and phrases == "none":
        if vocabularies:
            raise DataError(f"--vocabulary: --labels {labels} is a list itself; use curated")
        is_name = labels == "shapes_world" or labels.startswith("tfds:")
        if not is_name and not files.local(labels, "--labels").exists():
            known = ", ".join(("curated", *_PHRASES))
            raise DataError(f"--labels: {labels!r} is neither a file nor one of {known}")
        vocabularies = (labels,)
    if not vocabularies:
        raise DataError(f"--vocabulary: --labels {labels} needs at least one list of names")
    return LabelSpace(
        curated=merge_vocabularies(map(read_vocabulary, vocabularies)),
        phrases=phrases,
        max_ngrams=max_ngrams,
        curated_factor=1.0 if phrases == "none" else CURATED_FACTOR,
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
        "phrases": dict(sorted(rules.items())),
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
    if space.phrases != "none":
        kind = {"ngrams": "N-grams", "noun_phrases": "noun phrases"}[space.phrases]
        for key, title in (("phrases", kind), ("generic_words", "dropped generic word")):
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
