"""Lists of names in text files: one name a line, and nothing else."""

import re
from collections.abc import Sequence
from pathlib import Path

from data_pipelines import image_files, text_file
from data_pipelines.features import Names
from data_pipelines.names import plain
from owl_det import files
from owl_det.errors import DataError

_MARKS = {
    ",": "a comma",
    "\uff0c": "a comma",
    ";": "a semicolon",
    "\t": "a tab",
    "|": "a bar",
}
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "`": "`"}
_NUMBERED = re.compile(r"\d+\s*[.:)\]]\s*[^\d\s]|[(\[]\d+[)\]]|n\d{8}\b|/m/\w+\b")
_LEADING_NUMBER = re.compile(r"(\d{1,9})\s+\S")
# Of all lines: a count, a class number or a score that stands beside each name.
_BESIDE = re.compile(r"(?P<first>\d{1,9})-(?P<a>\D.*)|(?P<b>.*\D)[\s=](?P<last>\d{1,9}(\.\d+)?)")


def read_list(file: str | Path, *, is_numbered: bool = False) -> Names:
    """The plain names of a text list, one a line; empty lines are left out.

    What follows a `#` at the start of a line or after white space is a comment. `is_numbered`: the
    place of a name is its class number, so that an empty line or a comment in between is an error.

    Raises `DataError`, naming the line, if the file cannot be read or holds no name, or if it is
    no such list: CSV, YAML, JSON, XML, names with numbers before them, names in quotes.
    """
    return tuple(map(plain, read_written(file, is_numbered=is_numbered)))


def read_written(file: str | Path, *, is_numbered: bool = False) -> Names:
    """As `read_list`, the names as they are written: two spellings stay two."""
    file = Path(file)
    try:
        content = files.read_bytes(file)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; name a text list, one name a line") from error
    return _rows(text_file.decode(content, file), str(file), is_numbered)


def parse_list(text: str, where: str, *, is_numbered: bool = False) -> Names:
    """As `read_list`, of the text of a list; messages begin with `where`."""
    return tuple(map(plain, _rows(text, where, is_numbered)))


def _rows(text: str, where: str, is_numbered: bool) -> Names:
    """The lines of a list that have a name."""
    rows = text_file.lines(text.removeprefix("\ufeff"))
    if is_numbered:
        rows = _without_gaps([row.strip() for row in rows], where)
    else:
        rows = [re.split(r"(?:^|\s)#", row, maxsplit=1)[0].strip() for row in rows]
    entries = [(number, row) for number, row in enumerate(rows, start=1) if plain(row)]
    if not entries:
        raise DataError(f"{where}: holds no names; write one name a line")
    for number, row in entries:
        fault = _fault(row)
        if fault:
            raise DataError(
                f"{where}: line {number}: {row[:60]!r} {fault}; a list has one name a line and "
                "nothing else"
            )
    _refuse_numbers(entries, where)
    return tuple(row for _, row in entries)


def _without_gaps(rows: Sequence[str], where: str) -> list[str]:
    """The rows up to the last that has text; raises `DataError` at one in between that has none."""
    count = max((i for i, row in enumerate(rows, start=1) if plain(row)), default=0)
    for number, row in enumerate(rows[:count], start=1):
        if not plain(row) or row.startswith("#"):
            kind = "a comment" if row else "empty"
            raise DataError(
                f"{where}: line {number}: is {kind}, and a line's place is its class number; "
                "remove the line, or write the name that belongs there"
            )
    return list(rows[:count])


def _fault(row: str) -> str:
    """What shows that a row is no bare name; empty = nothing does."""
    if row.startswith(("{", "[", "]", "}")):
        return "is JSON or YAML"
    if row.endswith(("{", "[")):
        return "begins a group of another format"
    if row.startswith("<") and row.endswith(">"):
        return "is XML or HTML"
    if row.rstrip(",")[-1:] == _QUOTES.get(row[0], "") and len(row.rstrip(",")) > 1:
        return "is in quotes"
    for mark, name in _MARKS.items():
        if mark in row:
            return f"has {name}, as a table (CSV) has"
    if image_files.is_image(row):
        return "is the name of a file"
    if row.startswith(("- ", "* ", "• ", "---")) or row == "-":
        return "is an item of a YAML list or of prose"
    if _NUMBERED.match(row):
        return "begins with a number or an id"
    if re.search(r":(\s|$)", row):
        return "is a line of YAML"
    return ""


def _refuse_numbers(entries: Sequence[tuple[int, str]], where: str) -> None:
    """Raises `DataError` where names are numbered: `0 cat`, `1 dog`. A `2 door car` is a name."""
    matches = [_LEADING_NUMBER.match(row) for _, row in entries]
    numbers = [int(match[1]) if match else -2 for match in matches]
    follows = [a + 1 == b for a, b in zip(numbers, numbers[1:], strict=False)]
    index = 0 if all(matches) else follows.index(True) if any(follows) else None
    fault = "begins with a number"
    if index is None and _have_numbers_beside([row for _, row in entries]):
        index, fault = 0, "has a number beside the name"
    if index is not None:
        number, row = entries[index]
        raise DataError(
            f"{where}: line {number}: {row[:60]!r} {fault}; a list has one name a line and "
            "nothing else"
        )


def _have_numbers_beside(rows: Sequence[str]) -> bool:
    """True for `1-cat`, `2-dog`; `cat 0`, `dog 1`; `cat=3`, `dog=7`; and `cat 0.93`, `dog 0.12`.

    `team 1`, `team 2` are names, and so are `boeing 747`, `boeing 767`.
    """
    matches = [match for row in rows if (match := _BESIDE.fullmatch(row))]
    names = {match["a"] or match["b"].strip() for match in matches}
    if not len(rows) == len(matches) == len(names) > 1:
        return False
    numbers = [match["first"] or match["last"] for match in matches]
    if all("." in number for number in numbers) or all("=" in row for row in rows):
        return True
    return any(numbers == [str(i + start) for i in range(len(rows))] for start in (0, 1))
