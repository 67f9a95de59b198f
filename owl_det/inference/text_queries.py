"""Queries as callers give them, and what is said of those that are probably not meant."""

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from absl import logging

from data_pipelines.names import plain
from data_pipelines.tokenizer import Tokenizer
from owl_det.errors import DataError

_EXPECTED = "give a list of texts such as ['red circle', 'blue star']"
_BETWEEN_NAMES = re.compile(r"[,;|\n]| \. ")  # as other detectors want their names put together


def texts(queries: Any) -> tuple[str, ...]:
    """The texts in order. One text is a list of one; the list of one list is that list.

    Raises `DataError` for what is no such list, and for a text without a letter, naming its place.
    """
    listed = _listed(queries)
    if len(listed) == 1 and isinstance(listed[0], (list, tuple, np.ndarray)):
        listed = list(listed[0])  # transformers takes a list of texts for each image
    if not listed:
        raise DataError(f"queries: are empty; {_EXPECTED}")
    for index, query in enumerate(listed):
        if isinstance(query, (list, tuple, np.ndarray)):
            raise DataError(
                "queries: a list of lists; the queries of a call are asked of all its images: "
                "give one list, and call once for each list"
            )
        if not isinstance(query, str):
            raise DataError(f"queries: {index}: {query!r} is no text; {_EXPECTED}")
        if not plain(query):
            raise DataError(f"queries: {index}: {query!r} is an empty text; remove it")
    return tuple(str(query) for query in listed)


def is_asked(queries: Sequence[str]) -> np.ndarray:
    """False for a text that stands before: it is asked once, under its first place.

    Texts that differ only in case and white space are one text to the model.
    """
    seen: dict[str, int] = {}
    keys = (" ".join(query.lower().split()) for query in queries)
    first = [seen.setdefault(key, i) for i, key in enumerate(keys)]
    return np.array(first) == np.arange(len(queries))


def check_read(queries: Sequence[str], tokenizer: Tokenizer) -> None:
    """Raises `DataError` for a text of which the tokeniser keeps nothing."""
    nothing = tokenizer.encode("")
    for index, query in enumerate(queries):
        if np.array_equal(tokenizer.encode(query), nothing):
            raise DataError(
                f"queries: {index}: {query!r} has nothing that the text tower reads; remove it"
            )


def warn(queries: Sequence[str]) -> None:
    """Says once for all which texts seem to hold several names, and which stand twice."""
    joined = [query for query in queries if len(_parts(query)) > 1]
    if joined:
        more = f" (and {len(joined) - 1} more)" if len(joined) > 1 else ""
        logging.warning(
            "%r is asked as one query%s; several names are several queries: %s",
            *(joined[0], more, ", ".join(map(repr, _parts(joined[0])))),
        )
    twice = [queries[int(i)] for i in np.flatnonzero(~is_asked(queries))]
    if twice:
        more = f" (and {len(twice) - 1} more)" if len(twice) > 1 else ""
        logging.warning("%r is asked twice%s; what is found has the first label", twice[0], more)


def _parts(query: str) -> list[str]:
    return [part.strip() for part in _BETWEEN_NAMES.split(query + " ") if part.strip(" .")]


def _listed(queries: Any) -> list[Any]:
    if isinstance(queries, str):
        return [queries]
    if isinstance(queries, Mapping):
        raise DataError(f"queries: a {type(queries).__name__}; {_EXPECTED}")
    if isinstance(queries, Set):
        raise DataError(
            "queries: a set has no order, and a label is the place of its query; give sorted(…) "
            "of it"
        )
    if isinstance(queries, (bytes, bytearray)) or not isinstance(queries, Iterable):
        kind = "None" if queries is None else type(queries).__name__
        raise DataError(f"queries: got {kind}; {_EXPECTED}")
    return list(np.atleast_1d(queries)) if isinstance(queries, np.ndarray) else list(queries)
