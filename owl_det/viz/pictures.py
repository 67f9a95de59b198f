"""Pictures in rows, under titles, and as PNG files."""

import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from owl_det import files
from owl_det.viz import fonts

MAX_WIDTH = 1600  # pixels of a sheet; wider ones are shrunk where they are shown
PAIR_SIDE = 386  # pixels of a picture in a sheet of two pairs a row
_GAP = 8
_GREY = "#666666"
_SMALLEST = 12  # pixels of text; what is longer is cut


def pair(
    left: UInt8[np.ndarray, "h w 3"],
    right: UInt8[np.ndarray, "h w 3"],
    *,
    title: str,
    captions: tuple[str, str] = ("prediction", "ground truth"),
) -> UInt8[np.ndarray, "H W 3"]:
    """Two pictures of one image under their captions, and under a title."""
    both = [titled(left, captions[0], small=True), titled(right, captions[1], small=True)]
    joined = _rows(both, columns=2, gap=4)
    if (missing := PAIR_SIDE - joined.shape[1]) > 0:  # room for the title
        sides = ((0, 0), (missing // 2, missing - missing // 2), (0, 0))
        joined = np.pad(joined, sides, constant_values=255)
    return titled(joined, title)


def picture_grid(
    pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    columns: int = 0,
    max_width: int = MAX_WIDTH,
) -> UInt8[np.ndarray, "H W 3"]:
    """Pictures of any size in rows on white, at most `max_width` pixels wide.

    A row is as high as its highest picture, a column as wide as its widest; pictures that are too
    wide are shrunk. `columns` 0 takes about as many columns as rows. Raises `ValueError` without
    pictures.
    """
    if not pictures:
        raise ValueError("picture_grid: needs at least one picture")
    columns = columns or int(np.ceil(np.sqrt(len(pictures))))
    columns = min(columns, len(pictures))
    widest = (max_width - (columns + 1) * _GAP) // columns
    return _rows([_no_wider(picture, widest) for picture in pictures], columns, _GAP, border=True)


def _rows(
    pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]], columns: int, gap: int, border: bool = False
) -> UInt8[np.ndarray, "H W 3"]:
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    heights = [max(picture.shape[0] for picture in row) for row in rows]
    widths = [max(p.shape[1] for p in pictures[i::columns]) for i in range(columns)]
    edge = gap if border else 0
    height = sum(heights) + gap * (len(rows) - 1) + 2 * edge
    width = sum(widths) + gap * (columns - 1) + 2 * edge
    sheet = np.full((height, width, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            top = edge + sum(heights[:r]) + r * gap
            left = edge + sum(widths[:c]) + c * gap + (widths[c] - picture.shape[1]) // 2
            sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet


def _no_wider(picture: UInt8[np.ndarray, "h w 3"], width: int) -> UInt8[np.ndarray, "H W 3"]:
    height, old = picture.shape[:2]
    if old <= width:
        return picture
    size = width, max(1, round(height * width / old))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def titled(
    picture: UInt8[np.ndarray, "h w 3"], title: str, *, small: bool = False
) -> UInt8[np.ndarray, "H w 3"]:
    """A picture under a line of text, which is cut to its width; grey if small."""
    size = _text_size(picture) - (2 if small else 0)
    strip = _strip(picture.shape[1], title, size, _GREY if small else "black")
    return np.concatenate([strip, picture])


def with_note(picture: UInt8[np.ndarray, "h w 3"], note: str) -> UInt8[np.ndarray, "H w 3"]:
    """A picture above a line of small grey text; itself if there is none."""
    if not note:
        return picture
    return np.concatenate([picture, _strip(picture.shape[1], note, _text_size(picture) - 2, _GREY)])


def _text_size(picture: UInt8[np.ndarray, "h w 3"]) -> int:
    return max(16, round(max(picture.shape[:2]) / 50))


def _strip(width: int, text: str, size: int, color: str) -> UInt8[np.ndarray, "h w 3"]:
    font = fonts.font(text, size)
    if font is None:  # of a file name; the warning has said so
        text = text.encode("ascii", "replace").decode()
        font = fonts.plain(size)
    while font.getlength(text) > width and size > _SMALLEST:
        size -= 1
        font = fonts.font(text, size) or fonts.plain(size)
    # In the middle, where a file name says least and a sentence is still guessed.
    keep, cut = len(text), text
    while font.getlength(cut) > width and keep > 1:
        keep -= 1
        cut = f"{text[: (keep + 1) // 2]}…{text[len(text) - keep // 2 :]}"
    canvas = Image.new("RGB", (width, round(1.6 * size)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((width / 2, canvas.height / 2), cut, color, font, anchor="mm")
    return np.array(canvas)


def save_png(path: str | os.PathLike[str], image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Writes a PNG, folders included; the file appears once it is complete."""
    with files.atomic(path) as partial:
        # A tenth of the time of Pillow's default, for a twentieth more bytes.
        Image.fromarray(image).save(partial, format="PNG", compress_level=1)
