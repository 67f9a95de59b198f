"""Which file was meant, where a path names none: another case, form of Unicode or separator."""

import os
import unicodedata
from pathlib import Path


def hint(path: str | os.PathLike[str]) -> str:
    """`; did you mean 'a/IMG.JPG'?` if that file differs only in how it is spelt, else nothing.

    To be put after the message that `path` does not exist.
    """
    meant = _meant(os.fspath(path))
    return f"; did you mean {meant!r}?" if meant else ""


def _meant(text: str) -> str:
    """The path that exists and differs from `text` only in spelling; empty = there is none."""
    turned = text.replace("\\", "/")
    for spelt in (turned, text.replace("\\", "")):  # of another system; escaped for a shell
        if spelt != text and os.path.exists(spelt):
            return spelt
    expanded = Path(turned).expanduser() if turned.startswith("~") else Path(turned)
    known = Path(expanded.anchor)
    for part in expanded.parts[1 if expanded.anchor else 0 :]:
        step = known / part
        if not os.path.lexists(step):
            similar = _similar(known, part)
            if similar is None:
                return ""
            step = known / similar
        known = step
    return str(known) if str(known) != text and known.exists() else ""


def _similar(folder: Path, name: str) -> str | None:
    """The entry of the folder that is `name` but for case, Unicode form and outer spaces."""
    try:
        entries = sorted(os.listdir(folder))
    except OSError:
        return None
    return next((entry for entry in entries if _key(entry) == _key(name)), None)


def _key(name: str) -> str:
    # Folded again: composed letters may fold to others.
    folded = unicodedata.normalize("NFKC", name).casefold().strip()
    stem, suffix = os.path.splitext(unicodedata.normalize("NFKC", folded))
    return stem + {".jpeg": ".jpg", ".tiff": ".tif"}.get(suffix, suffix)
