"""Names of categories: how they are written, and which of them are the same."""

import re
import unicodedata
from collections.abc import Iterable

from owl_det.errors import DataError

# Characters without a shape that text picks up on its way: control characters, byte order marks,
# zero width spaces, soft hyphens, marks of direction. Joiners stay: some scripts need them.
_UNSEEN = re.compile(
    r"[\x00-\x08\x0e-\x1b\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]"
)


def plain(name: str) -> str:
    """A name as it is asked for: `traffic_light ` → `traffic light`.

    Unicode's composed form (NFC) without control characters; underscores are spaces, and so is any
    run of white space. Upper case stays: lower case is the prompts' matter.
    """
    seen = _UNSEEN.sub("", re.sub(r"[\s_]", " ", name))
    return re.sub(r" +", " ", unicodedata.normalize("NFC", seen)).strip()


def visible(text: str) -> str:
    """A text in Unicode's composed form (NFC) without characters that nobody sees."""
    return unicodedata.normalize("NFC", _UNSEEN.sub("", text))


def require_distinct(names: Iterable[str], where: str) -> None:
    """Names are the keys under which everything is asked and evaluated.

    Raises `DataError`, which begins with `where`, on a name that is empty, and on two that are one
    text to the model: they differ in case, white space, underscores or Unicode form only.
    """
    seen: dict[str, str] = {}
    for name in names:
        key = plain(name).lower()
        if not key:
            raise DataError(f"{where}: a category has an empty name; give it one")
        if key in seen and seen[key] == name:
            raise DataError(f"{where}: two categories are called {name!r}; rename or merge them")
        if key in seen:
            raise DataError(
                f"{where}: the categories {seen[key]!r} and {name!r} are one text to the model; "
                "rename or merge them"
            )
        seen[key] = name
