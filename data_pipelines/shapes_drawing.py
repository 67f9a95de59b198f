"""Draws the objects of shapes world on a canvas, with NumPy and Pillow.

A later object may hide at most `MAX_OCCLUSION` of an earlier one, and none of one of its colour.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image, ImageDraw

from data_pipelines.shapes_names import (
    COLOURS,
    TEXTURES,
    ObjectName,
    cumulative_probabilities,
    object_names,
)

MAX_OCCLUSION = 0.3  # of an object's pixels
SUPERSAMPLING = 4


@dataclass(frozen=True)
class SceneObject:
    """One drawn object: its category, the pixels it still shows, and its box (x0, y0, x1, y1)."""

    category: int
    mask: Bool[np.ndarray, "h w"]
    box: tuple[float, float, float, float]


def draw_objects(
    canvas: Float32[np.ndarray, "h w 3"],
    rng: np.random.Generator,
    *,
    is_long_tailed: bool,
    max_objects: int,
    size_range: tuple[float, float],
) -> tuple[SceneObject, ...]:
    """Paints objects on a square canvas; one that would hide too much is left out."""
    size = len(canvas)
    cumulative = cumulative_probabilities(is_long_tailed)
    placed: list[tuple[int, np.ndarray]] = []
    areas: list[int] = []
    for _ in range(int(rng.integers(1, max_objects + 1))):
        category = int(min(np.searchsorted(cumulative, rng.random()), len(cumulative) - 1))
        entry = object_names()[category]
        side = math.sqrt(rng.uniform(size_range[0] ** 2, size_range[1] ** 2)) * size
        for _ in range(8):
            coverage, x0, y0 = _shape_coverage(entry.shape, side, size, rng)
            mask = np.zeros((size, size), bool)
            h, w = coverage.shape
            mask[y0 : y0 + h, x0 : x0 + w] = coverage > 0.5
            if mask.any() and _is_well_placed(mask, entry.colour, placed, areas):
                break
        else:
            continue
        placed = [(c, m & ~mask) for c, m in placed]
        placed.append((category, mask))
        areas.append(int(mask.sum()))
        _paint(canvas, coverage, x0, y0, entry, side, rng)
    return tuple(SceneObject(c, m, box_of(m)) for c, m in placed)


def _is_well_placed(
    mask: np.ndarray, colour: str, placed: list[tuple[int, np.ndarray]], areas: list[int]
) -> bool:
    """True if earlier objects keep 70 % of their pixels and none of this colour is touched."""
    for (category, visible), area in zip(placed, areas, strict=True):
        hidden = int((visible & mask).sum())
        if hidden and object_names()[category].colour == colour:
            return False
        if int(visible.sum()) - hidden < (1 - MAX_OCCLUSION) * area:
            return False
    return True


def box_of(mask: Bool[np.ndarray, "h w"]) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def to_pixels(canvas: Float32[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    return np.clip(canvas, 0, 255).astype(np.uint8)


def background(size: int, rng: np.random.Generator) -> Float32[np.ndarray, "h w 3"]:
    """A muted colour, a linear gradient between two of them, or either with pixel noise."""
    grey = rng.uniform(50, 200, 2)
    ends = grey[:, None] + rng.uniform(-20, 20, (2, 3))
    angle = rng.uniform(0, 2 * math.pi)
    ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    t = 0.5 + math.cos(angle) * ramp[None, :] + math.sin(angle) * ramp[:, None]
    t = np.clip(t, 0, 1)[..., None] if rng.random() < 0.5 else np.zeros((size, size, 1), np.float32)
    image = ends[0] * (1 - t) + ends[1] * t
    noise = rng.standard_normal((size, size), dtype=np.float32) * rng.uniform(0, 12)
    return (image + noise[..., None]).astype(np.float32)


@cache
def _outline(shape: str) -> tuple[np.ndarray, ...]:
    """Polygons in [-1, 1]²: the outline and, for a ring, the hole."""
    turn = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)], -1)
    tips = np.arange(10) * math.pi / 5 - math.pi / 2
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    a = 0.36  # half width of a cross's arm
    heart_x = 16 * np.sin(turn) ** 3 / 16
    heart_y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn))
    polygons: dict[str, tuple[np.ndarray, ...]] = {
        "circle": (circle,),
        "square": (np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.9,),
        "triangle": (np.array([[0, -1], [1, 0.85], [-1, 0.85]]),),
        "star": (np.stack([radius * np.cos(tips), radius * np.sin(tips)], -1),),
        "cross": (
            np.array(
                [
                    [-a, -1], [a, -1], [a, -a], [1, -a], [1, a], [a, a],
                    [a, 1], [-a, 1], [-a, a], [-1, a], [-1, -a], [-a, -a],
                ]
            ),
        ),
        "ring": (circle, circle * 0.5),
        "heart": (np.stack([heart_x, (heart_y + 2.5) / 14.5], -1),),
        "arrow": (
            np.array(
                [[-1, -0.3], [0.1, -0.3], [0.1, -0.9], [1, 0], [0.1, 0.9], [0.1, 0.3], [-1, 0.3]]
            ),
        ),
    }  # fmt: skip
    return polygons[shape]


def _shape_coverage(
    shape: str, side: float, size: int, rng: np.random.Generator
) -> tuple[Float32[np.ndarray, "h w"], int, int]:
    """Coverage in [0, 1] of a shape somewhere in the image, and its window's corner."""
    polygons = _outline(shape)
    low, high = polygons[0].min(0), polygons[0].max(0)
    scale = side / (high - low).max()  # the longer side of the shape's box is `side`
    extent = (high - low) * scale
    corner = rng.uniform(0, 1, 2) * (size - extent)
    window = np.floor(corner).astype(int)
    shape_wh = np.minimum(np.ceil(corner + extent).astype(int), size) - window
    mask = Image.new("L", tuple((shape_wh * SUPERSAMPLING).tolist()))
    draw = ImageDraw.Draw(mask)
    for polygon, value in zip(polygons, (255, 0), strict=False):
        points = ((polygon - low) * scale + corner - window) * SUPERSAMPLING - 0.5
        draw.polygon([tuple(point) for point in points.tolist()], fill=value)
    coverage = np.asarray(mask.reduce(SUPERSAMPLING), np.float32) / 255
    return coverage, int(window[0]), int(window[1])


def _paint(
    canvas: Float32[np.ndarray, "H W 3"],
    coverage: Float32[np.ndarray, "h w"],
    x0: int,
    y0: int,
    entry: ObjectName,
    side: float,
    rng: np.random.Generator,
) -> None:
    h, w = coverage.shape
    colour = np.array(COLOURS[entry.colour], np.float32) + rng.uniform(-15, 15, 3)
    texture = "striped" if entry.is_striped else TEXTURES[int(rng.random() < 0.25)]
    shade = _shade(texture, h, w, side, rng)
    window = canvas[y0 : y0 + h, x0 : x0 + w]
    painted = colour * shade[..., None]
    window += (painted - window) * coverage[..., None]


def _shade(
    texture: str, h: int, w: int, side: float, rng: np.random.Generator
) -> Float32[np.ndarray, "h w"]:
    """Brightness of each pixel of a texture: 1, or darker in stripes or dots."""
    if texture == "plain":
        return np.ones((h, w), np.float32)
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    if texture == "striped":
        period = max(3.0, side / 3.5)
        angle = rng.uniform(0, math.pi)
        phase = (x * math.cos(angle) + y * math.sin(angle)) / period + rng.random()
        return np.where(phase % 1 < 0.5, 1.0, 0.3).astype(np.float32)
    period = max(4.0, side / 3)
    u = ((x + rng.uniform(0, period)) % period) / period - 0.5
    v = ((y + rng.uniform(0, period)) % period) / period - 0.5
    return np.where(u * u + v * v < 0.06, 0.55, 1.0).astype(np.float32)
