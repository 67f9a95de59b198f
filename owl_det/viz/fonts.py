"""Fonts for names in any script."""

import unicodedata
from functools import cache
from pathlib import Path

from absl import logging
from PIL import ImageFont


def font(text: str, size: int) -> ImageFont.FreeTypeFont | None:
    """A font of this size (pixels) that has every character of `text`.

    DejaVu Sans where it does (Latin, Greek, Cyrillic, Arabic and more), else one that is installed.
    None, and a warning, where there is none.
    """
    file = _file(frozenset(c for c in text if not unicodedata.category(c).startswith("M")))
    return _load(file, size) if file else None


def plain(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with Matplotlib."""
    return _load(_dejavu(), size)


@cache
def _load(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


@cache
def _dejavu() -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")


@cache
def _characters(file: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError) as error:  # a damaged or unusual font is one less to choose from
        logging.info("Font %s cannot be read: %s", file, error)
        return frozenset()


@cache
def _file(characters: frozenset[str]) -> str | None:
    codes = {ord(character) for character in characters}
    if codes <= _characters(_dejavu()):
        return _dejavu()
    from matplotlib import font_manager

    regular = [
        entry.fname
        for entry in font_manager.fontManager.ttflist
        if entry.style == "normal"
        and str(entry.weight) in ("400", "normal", "regular")
        and not entry.name.startswith("Last Resort")  # it has a box for everything
    ]
    for file in sorted(regular, key=lambda file: ("Sans" not in file, file)):
        if codes <= _characters(file):
            return file
    missing = "".join(sorted(c for c in characters if ord(c) not in _characters(_dejavu())))
    logging.warning(
        "No font on this machine shows %r: pictures have numbers in place of such names; install "
        "one, such as Noto Sans (Debian: fonts-noto-cjk for Chinese, Japanese, Korean)",
        missing[:20],
    )
    return None
