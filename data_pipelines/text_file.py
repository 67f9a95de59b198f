"""Text files that other tools wrote: their encodings and their ends of lines."""

import codecs
import re
from pathlib import Path

from owl_det.errors import DataError

# UTF-32's mark begins with that of UTF-16, so it is looked for first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def decode(content: bytes, file: Path) -> str:
    """The text of a file: UTF-8, or whatever Unicode encoding its byte order mark says.

    Raises `DataError`, naming the file, if it is neither, or holds NUL characters.
    """
    mark, encoding = next((m for m in _MARKS if content.startswith(m[0])), (b"", "utf-8"))
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 text ({error}); convert it to UTF-8") from None
    if "\0" in text:
        number = text[: text.index("\0")].count("\n") + 1
        raise DataError(
            f"{file}: line {number}: has a NUL character, so it is no UTF-8 text or it is "
            "damaged; write it anew as UTF-8"
        )
    return text


def lines(text: str) -> list[str]:
    """The lines of a text: ends of Unix, Windows and old Macs.

    `str.splitlines` also splits at form feeds and at Unicode's separators, which no editor counts
    as ends of lines.
    """
    return re.split(r"\r\n|\n|\r", text)
