"""Pictures of detections: boxes with their names, few enough to see the image."""

import warnings
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from owl_det.viz import colors, fonts, labels
from owl_det.viz.pictures import with_note

MAX_BOXES = 30  # of a picture
SCORE = 0.2  # of a box that is drawn, where a better one scores twice as much
OVERLAP = 0.5  # IoU; of boxes that overlap more, the best is drawn: one object has one label
_MIN_SIDE = 480  # pixels; below it, text as large as the boxes it names would be needed
_MIN_FONT = 15  # pixels


def draw_best(
    image: UInt8[np.ndarray, "h w 3"],
    boxes_xyxy: Float[np.ndarray, "n 4"],
    names: Sequence[str],
    scores: Float[np.ndarray, " n"],
    *,
    classes: Sequence[int] | None = None,
    lowest: float = SCORE,
) -> UInt8[np.ndarray, "H W 3"]:
    """What a detector found, as people want to see it; a line below says what is left out.

    Drawn are the boxes of `choose`; the rest is as for `draw_detections`.
    """
    kept = choose(boxes_xyxy, scores, lowest)
    picture = draw_detections(
        image,
        boxes_xyxy[kept],
        [names[int(i)] for i in kept],
        scores[kept],
        classes=None if classes is None else [classes[int(i)] for i in kept],
    )
    return with_note(picture, note(kept, scores, lowest))


def choose(
    boxes_xyxy: Float[np.ndarray, "n 4"],
    scores: Float[np.ndarray, " n"],
    lowest: float = SCORE,
) -> Int[np.ndarray, " k"]:
    """Rows of the boxes to draw, the best first.

    At most 30 that score `lowest`, or half of the best where that is less. Of boxes that overlap by
    an IoU above 0.5 the best stays, whatever their names; boxes without area do not.
    """
    scores = np.asarray(scores, np.float64)
    if not len(scores):
        return np.zeros(0, int)
    has_area = (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(axis=1)
    rows = np.flatnonzero(has_area & (scores >= lowest_drawn(scores, lowest)))
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    if not len(rows):
        return rows
    with warnings.catch_warnings():
        # OpenCV is no dependency: supervision says at import that it works with NumPy instead.
        warnings.filterwarnings("ignore", message="OpenCV", category=UserWarning)
        from supervision import box_non_max_suppression
    table = np.concatenate([boxes_xyxy[rows], scores[rows, None]], axis=1)
    return rows[box_non_max_suppression(table, OVERLAP)][:MAX_BOXES]


def lowest_drawn(scores: Float[np.ndarray, " n"], lowest: float) -> float:
    """The score that `choose` asks for."""
    return min(lowest, float(np.max(scores, initial=0.0)) / 2)


def note(
    kept: Int[np.ndarray, " k"], scores: Float[np.ndarray, " n"], lowest: float = SCORE
) -> str:
    """What `choose` left out, in words; "" if nothing."""
    if len(kept) == len(scores):
        return ""
    rule = f"scores from {lowest_drawn(scores, lowest):.2g}, one of those that overlap"
    return f"{len(kept)} of {len(scores)} boxes drawn: {rule}"


def draw_detections(
    image: UInt8[np.ndarray, "h w 3"],
    boxes_xyxy: Float[np.ndarray, "n 4"],
    names: Sequence[str],
    scores: Float[np.ndarray, " _"] | None = None,  # one for each box, which is checked
    *,
    classes: Sequence[int] | None = None,
    side: int | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """Draws all boxes (pixels of `image`) with their names, and scores in percent where given.

    Small images are enlarged by a whole factor, until the longer side has 480 pixels; with `side`
    as far as it fits into so many pixels, and larger images are shrunk to that. Lines and text grow
    with the picture. No label covers another or is cut: one that finds no room is left out. The
    best box lies on top. `classes` (indices) give the colours, and stand for names in a script that
    no font here has; without them a name has the same colour in all pictures. Raises `ValueError`
    if boxes, names, scores and classes differ in number.
    """
    lengths = {len(boxes_xyxy), len(names), *(len(x) for x in (scores, classes) if x is not None)}
    if len(lengths) > 1:
        raise ValueError(
            "draw_detections: needs one label, and one score and class if any, for each box"
        )
    canvas, scale = _resized(image, side)
    if not len(boxes_xyxy):
        return np.array(canvas)
    values = np.ones(len(names)) if scores is None else np.asarray(scores)
    order = np.argsort(-values, kind="stable")
    boxes = np.asarray(boxes_xyxy, np.float64)[order] * scale
    indices = [_index(names, classes, int(i)) for i in order]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    size = max(_MIN_FONT, round(max(canvas.size) / 50))
    texts = [
        _text(
            names[int(i)],
            "" if scores is None else f" {values[i]:.0%}",
            f"class {numbers[names[int(i)]] if classes is None else classes[int(i)]}",
            size,
            canvas.width,
        )
        for i in order
    ]
    chosen = [colors.of_class(index) for index in indices]
    draw = ImageDraw.Draw(canvas)
    line = max(2, round(max(canvas.size) / 350))
    for box, color in reversed(list(zip(boxes, chosen, strict=True))):
        _draw_box(draw, box, color, line, canvas.size)
    _draw_labels(draw, boxes, texts, chosen, canvas.size)
    return np.array(canvas)


def _resized(image: UInt8[np.ndarray, "h w 3"], side: int | None) -> tuple[Image.Image, np.ndarray]:
    """The canvas, and its pixels per pixel of the image (x, y, x, y)."""
    canvas = Image.fromarray(image)
    longest = max(canvas.size)
    if side is None:
        factor = float(max(1, -(-_MIN_SIDE // longest)))
    else:
        factor = side / longest if longest > side else float(side // longest)
    if factor == 1:
        return canvas, np.ones(4)
    width, height = (max(1, round(factor * x)) for x in canvas.size)
    kernel = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    scale = np.array([width / canvas.width, height / canvas.height] * 2)
    return canvas.resize((width, height), kernel), scale


def _index(names: Sequence[str], classes: Sequence[int] | None, row: int) -> int:
    # The checksum is the same in every process.
    return int(classes[row]) if classes is not None else zlib.crc32(names[row].encode())


Label = tuple[str, ImageFont.FreeTypeFont]


def _text(name: str, suffix: str, substitute: str, size: int, width: int) -> Label:
    """A name, cut to fit into the width, and the font that shows it."""
    name = " ".join(name.split())
    font = fonts.font(name + suffix, size)
    if font is None:
        name, font = substitute, fonts.plain(size)
    room = width - 2 * _padding(size)
    if font.getlength(name + suffix) <= room:
        return name + suffix, font
    while name and font.getlength(f"{name}…{suffix}") > room:
        name = name[:-1]
    return f"{name.rstrip()}…{suffix}", font


def _padding(size: int) -> int:
    return max(2, size // 5)


def _draw_box(
    draw: ImageDraw.ImageDraw,
    box: Float[np.ndarray, "4"],
    color: str,
    line: int,
    canvas: tuple[int, int],
) -> None:
    """The rim keeps a box visible on an object of its own colour."""
    right, bottom = canvas[0] - 1, canvas[1] - 1
    # Wholly inside, and as wide as its lines, however thin the box is.
    x0, y0 = min(max(0.0, box[0]), right - 2 * line), min(max(0.0, box[1]), bottom - 2 * line)
    x1, y1 = max(min(right, box[2]), x0 + 2 * line), max(min(bottom, box[3]), y0 + 2 * line)
    edges = [round(x) for x in (x0, y0, x1, y1)]
    rim = [edges[0] - 1, edges[1] - 1, edges[2] + 1, edges[3] + 1]
    draw.rectangle(rim, outline=colors.contrast(color), width=line + 2)
    draw.rectangle(edges, outline=color, width=line)


def _draw_labels(
    draw: ImageDraw.ImageDraw,
    boxes: Float[np.ndarray, "n 4"],
    texts: Sequence[Label],
    chosen: Sequence[str],
    canvas: tuple[int, int],
) -> None:
    sizes = []
    for text, font in texts:
        ascent, descent = font.getmetrics()
        pad = _padding(int(font.size))
        sizes.append((np.ceil(font.getlength(text)) + 2 * pad, ascent + descent + 1.0))
    places = labels.place(boxes, sizes, canvas)
    for (text, font), (width, height), place, color in zip(
        texts, sizes, places, chosen, strict=True
    ):
        if place is None:
            continue
        left, top = round(place[0]), round(place[1])
        draw.rectangle((left, top, left + width - 1, top + height - 1), fill=color)
        at = left + _padding(int(font.size)), top
        draw.text(at, text, fill=colors.contrast(color), font=font)
