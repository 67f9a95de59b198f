"""Where the labels of boxes go: beside their box, inside the picture, none over another."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

Place = tuple[float, float]  # left, top

_COST_OF_PLACE = 0.04  # of a later candidate, in shares of a label that covers other boxes
_COST_OF_OWN = 0.5  # of covering the object that is named


def place(
    boxes_xyxy: Float[np.ndarray, "n 4"],
    sizes: Sequence[tuple[float, float]],
    canvas: tuple[int, int],
) -> list[Place | None]:
    """Left and top of each label, of so many pixels (width, height), in boxes' order.

    The first box chooses first. None where every place beside the box is taken, or the label is
    larger than the canvas (width, height).
    """
    taken = np.zeros((0, 4))
    places: list[Place | None] = []
    for index, (box, size) in enumerate(zip(boxes_xyxy, sizes, strict=True)):
        if size[0] > canvas[0] or size[1] > canvas[1]:
            places.append(None)
            continue
        others = np.delete(boxes_xyxy, index, axis=0)
        found = _best(box, size, canvas, others, taken)
        places.append(found)
        if found:
            rectangle = [found[0], found[1], found[0] + size[0], found[1] + size[1]]
            taken = np.concatenate([taken, [rectangle]])
    return places


def _best(
    box: Float[np.ndarray, "4"],
    size: tuple[float, float],
    canvas: tuple[int, int],
    others: Float[np.ndarray, "m 4"],
    taken: Float[np.ndarray, "k 4"],
) -> Place | None:
    corners = np.array(list(_candidates(box, size)))
    corners = np.clip(corners, 0, np.subtract(canvas, size))
    rectangles = np.concatenate([corners, corners + size], axis=1)
    is_free = ~(_shared(rectangles, taken) > 0).any(axis=1)
    if not is_free.any():
        return None
    area = size[0] * size[1]
    own = max(1.0, float(np.prod(np.maximum(box[2:] - box[:2], 1))))
    costs = _COST_OF_PLACE * np.arange(len(corners))
    costs = costs + np.minimum(_shared(rectangles, others).sum(axis=1) / area, 1)
    costs = costs + _COST_OF_OWN * _shared(rectangles, box[None])[:, 0] / own
    best = int(np.argmin(np.where(is_free, costs, np.inf)))
    return float(corners[best, 0]), float(corners[best, 1])


def _candidates(box: Float[np.ndarray, "4"], size: tuple[float, float]) -> Iterator[Place]:
    """From the most usual to the last resort; each touches the box."""
    x0, y0, x1, y1 = (float(x) for x in box)
    width, height = size
    middle = (x0 + x1 - width) / 2
    yield x0, y0 - height
    yield x0, y1
    yield x1 - width, y0 - height
    yield x1 - width, y1
    yield middle, y0 - height
    yield middle, y1
    yield x0, y0
    yield x0, y1 - height
    yield x1 - width, y0
    yield x1 - width, y1 - height
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        yield x1, y0 + share * (y1 - y0 - height)
        yield x0 - width, y0 + share * (y1 - y0 - height)
    # Inside, row by row: large boxes that lie upon each other.
    rows = int((y1 - y0) // height)
    for row in range(1, min(rows, 12) - 1):
        yield x0, y0 + row * height
        yield x1 - width, y0 + row * height
    # To the left and right along the upper and lower side.
    for share in (0.5, 1.0):
        for y in (y0 - height, y1):
            yield x0 - share * width, y
            yield x1 - width + share * width, y


def _shared(a: Float[np.ndarray, "n 4"], b: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "n m"]:
    """Areas of the intersections, in square pixels."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    return np.prod(np.maximum(high - low, 0), axis=2)
