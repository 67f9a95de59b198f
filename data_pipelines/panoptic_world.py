"""Shapes world with stuff: the objects of `shapes_world` on ground that has names too.

An image is cut into one to four regions with wavy borders, each of another kind of stuff (grass,
brick, water …), drawn as a noisy pattern of its own; objects of shapes world, the things, lie on
top. Every pixel belongs to exactly one thing or stuff region. Stuff is never boxed.

    panoptic        long-tailed objects, boxes of base names, captions
    panoptic_test   every name equally likely, all things boxed
    panoptic_text   image-text pairs: one or two kinds of stuff, up to two large things; captions

Colours of stuff are muted and vary, so that patterns matter. An image is a pure function of
(version, split, image size, index); the data set is a yardstick, and whatever changes it changes
`VERSION`. It has its own version and hash: the other splits of shapes world do not depend on it.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from jaxtyping import Float32, Float64, Int32, UInt8

from data_pipelines import shapes_world
from data_pipelines.features import Category, Names, Record
from data_pipelines.named_regions import NamedRegions
from data_pipelines.shapes_drawing import SceneObject, box_of, draw_objects, to_pixels
from data_pipelines.shapes_names import groups_of, object_names, with_article
from owl_det.errors import DataError

VERSION = "1"

# Means of the colours; each region's own is up to `COLOUR_JITTER` away in each channel.
STUFF: dict[str, tuple[int, int, int]] = {
    "grass": (95, 130, 75),
    "sand": (190, 170, 125),
    "water": (75, 115, 150),
    "brick": (150, 90, 75),
    "snow": (205, 212, 222),
    "wood": (130, 98, 68),
    "gravel": (125, 125, 120),
    "sky": (140, 172, 200),
    "tiles": (165, 178, 175),
    "lava": (150, 75, 45),
    "asphalt": (80, 80, 85),
    "marble": (180, 175, 185),
}
COLOUR_JITTER = 18
LARGE_SIZE_RANGE = (0.30, 0.90)  # things of panoptic_text; of the image side
SMALLEST_REGION = 0.08  # of the image, before things are put on it
NAMED_SHARE = 0.8  # of stuff regions that a caption names
CACHE_BYTES = shapes_world.CACHE_BYTES
_BYTES_PER_PIXEL = 13  # of a scene: colours, segments and the masks of six things

CAPTIONS = ("{}", "a picture of {}", "{} 2024", "drawing of {}, high resolution", "{} seen here")


@dataclass(frozen=True)
class Split:
    """What the scenes of a split are like."""

    number: int  # seeds the split's images
    annotated: str  # whose boxes there are: "none", "base" or "all"
    is_long_tailed: bool = False  # False: every name equally likely
    max_stuff: int = 4
    max_objects: int = shapes_world.MAX_OBJECTS
    size_range: tuple[float, float] = shapes_world.SIZE_RANGE


SPLITS = {
    "panoptic": Split(100, "base", is_long_tailed=True),
    "panoptic_test": Split(101, "all"),
    "panoptic_text": Split(
        102,
        "none",
        max_stuff=2,
        max_objects=2,
        size_range=LARGE_SIZE_RANGE,
    ),
}


@dataclass(frozen=True)
class PanopticScene:
    """One image and what is in it; regions are the things, then the stuff."""

    image: UInt8[np.ndarray, "h w 3"]
    segments: Int32[np.ndarray, "h w"]  # region of each pixel
    things: tuple[SceneObject, ...]
    stuff: Names

    @property
    def names(self) -> Names:
        return (*(object_names()[thing.category].name for thing in self.things), *self.stuff)


class PanopticWorld:
    """The data set as a source of records and of regions; see the top of this file.

    In `panoptic`, as in shapes world's training split, novel things stand in the images but are no
    categories: they have neither boxes nor regions. Implements `named_regions.RegionSource`.
    """

    def __init__(
        self, *, split: str = "panoptic", image_size: int = 64, num_images: int = 8192
    ) -> None:
        """Raises `DataError` if there is nothing to draw."""
        if num_images <= 0:
            raise DataError("shapes_world: num_images must be positive")
        self.split, self.image_size, self.num_images = split, image_size, num_images
        self.name = f"shapes_world/{split}"
        self.version = f"shapes_world-{split}-{VERSION}-{parameter_hash(split)}"
        self._cached = lru_cache(CACHE_BYTES // (_BYTES_PER_PIXEL * image_size**2))(self._draw)
        asked = "base" if split == "panoptic" else "all"
        self.categories = tuple(
            category for category in all_categories() if _is_of(category, asked)
        )

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> Record:
        scene = self.scene(index)
        annotated = SPLITS[self.split].annotated
        boxed = [t for t in scene.things if annotated == "all" or _is_base(t.category, annotated)]
        names = tuple((object_names()[thing.category].name,) for thing in boxed)
        present = {*scene.stuff, *(name for group in names for name in group)}
        known = () if annotated == "none" else self.categories
        return Record(
            image=scene.image,
            image_id=index,
            boxes_xyxy=np.array([thing.box for thing in boxed], np.float32).reshape(-1, 4),
            names=names,
            is_crowd=np.zeros(len(boxed), bool),
            scores=np.ones(len(boxed), np.float32),
            negatives=tuple(c.name for c in known if c.name not in present),
            not_exhaustive=scene.stuff if annotated != "none" else (),
            captions=(caption(scene, self._rng(index, 1)),),
            source=f"{self.name} image {index}",
        )

    def regions(self, index: int) -> NamedRegions:
        """Things and stuff of the source's categories; a region of stuff has its box too."""
        scene, names = self.scene(index), {category.name for category in self.categories}
        chosen = [i for i, name in enumerate(scene.names) if name in names]
        rows = np.full(len(scene.names), -1, np.int32)
        rows[chosen] = np.arange(len(chosen))
        boxes = [thing.box for thing in scene.things]
        boxes += [box_of(scene.segments == len(boxes) + i) for i in range(len(scene.stuff))]
        kept = tuple(scene.names[i] for i in chosen)
        return NamedRegions(
            size=(self.image_size, self.image_size),
            boxes_xyxy=np.array(boxes, np.float32)[chosen].reshape(-1, 4),
            names=kept,
            is_thing=np.array(chosen, int) < len(scene.things),
            segments=rows[scene.segments],
            present=tuple(dict.fromkeys(kept)),
        )

    def scene(self, index: int) -> PanopticScene:
        return self._cached(index)

    def _draw(self, index: int) -> PanopticScene:
        return draw_scene(self.image_size, self._rng(index, 0), SPLITS[self.split])

    def _rng(self, index: int, stream: int) -> np.random.Generator:
        if not 0 <= index < self.num_images:
            raise IndexError(index)
        number = SPLITS[self.split].number
        return np.random.default_rng([int(VERSION), number, self.image_size, index, stream])


@cache
def all_categories() -> tuple[Category, ...]:
    """Things of shapes world with their groups and "thing", then stuff with "stuff"."""
    things = [
        Category(
            id=i + 1,
            name=entry.name,
            groups=("thing", *groups_of(entry)),
            frequency=float(entry.weight),
        )
        for i, entry in enumerate(object_names())
    ]
    stuff = [
        Category(id=len(things) + i + 1, name=name, groups=("stuff",))
        for i, name in enumerate(STUFF)
    ]
    return (*things, *stuff)


@cache
def parameter_hash(split: str) -> str:
    """Twelve hex digits over all names and a few scenes of a split."""
    content = hashlib.sha256(repr(all_categories()).encode())
    for index in range(8):
        scene = draw_scene(64, np.random.default_rng([int(VERSION), index]), SPLITS[split])
        content.update(scene.image.tobytes() + scene.segments.tobytes())
        content.update(repr(scene.names).encode())
    return content.hexdigest()[:12]


def caption(scene: PanopticScene, rng: np.random.Generator) -> str:
    """A web-like caption: "a red star on sand and water"; names most of what there is."""
    things = [object_names()[thing.category].name for thing in scene.things]
    named = [with_article(name) for name in things if rng.random() < NAMED_SHARE]
    ground = [name for name in scene.stuff if rng.random() < NAMED_SHARE]
    if not named and not ground:
        ground = list(scene.stuff[:1]) or ["shapes"]
    parts = [_listed(part) for part in (named, ground) if part]
    return CAPTIONS[int(rng.integers(len(CAPTIONS)))].format(" on ".join(parts))


def draw_scene(size: int, rng: np.random.Generator, split: Split) -> PanopticScene:
    """Draws stuff, then things on it. Stuff that is hidden altogether is not in the scene."""
    ground = _cut(size, int(rng.integers(1, split.max_stuff + 1)), rng)
    kinds = rng.permutation(len(STUFF))[: ground.max() + 1]
    names = [list(STUFF)[kind] for kind in kinds]
    canvas = np.zeros((size, size, 3), np.float32)
    for region, name in enumerate(names):
        canvas[ground == region] = _stuff(name, size, rng)[ground == region]
    things = draw_objects(
        canvas,
        rng,
        is_long_tailed=split.is_long_tailed,
        max_objects=split.max_objects,
        size_range=split.size_range,
    )
    is_free = np.ones((size, size), bool)
    for thing in things:
        is_free &= ~thing.mask
    visible = [region for region in range(len(names)) if (is_free & (ground == region)).any()]
    segments = np.full((size, size), -1, np.int32)
    for row, thing in enumerate(things):
        segments[thing.mask] = row
    for row, region in enumerate(visible):
        segments[is_free & (ground == region)] = len(things) + row
    stuff = tuple(names[region] for region in visible)
    return PanopticScene(to_pixels(canvas), segments, things, stuff)


# --- stuff ---------------------------------------------------------------------------------------


def _cut(size: int, count: int, rng: np.random.Generator) -> Int32[np.ndarray, "h w"]:
    """Regions around random points, nearest first, with borders bent by smooth noise.

    Drawn anew until none is too small; in the rare case that none of many tries is good, with one
    region fewer.
    """
    y, x = np.mgrid[0:size, 0:size] / size
    for tries in range(20 * count):
        num_points = count - tries // 20
        points = rng.uniform(0, 1, (num_points, 2))
        bent = [axis + 0.12 * _smooth_noise(size, size / 3, rng) for axis in (y, x)]
        distance = [(bent[0] - p[0]) ** 2 + (bent[1] - p[1]) ** 2 for p in points]
        regions = np.argmin(distance, axis=0).astype(np.int32)
        if np.bincount(regions.ravel(), minlength=num_points).min() >= SMALLEST_REGION * size**2:
            return regions
    return np.zeros((size, size), np.int32)


def _smooth_noise(size: int, period: float, rng: np.random.Generator) -> Float64[np.ndarray, "h w"]:
    """Noise of standard deviation near 1 whose details are about `period` pixels wide."""
    cells = max(2, round(size / period) + 2)
    grid = rng.standard_normal((cells, cells)) * 1.5
    place = np.linspace(0, cells - 1.001, size)
    low = place.astype(int)
    f = place - low
    f = f * f * (3 - 2 * f)
    rows = grid[low] * (1 - f)[:, None] + grid[low + 1] * f[:, None]
    return rows[:, low] * (1 - f)[None] + rows[:, low + 1] * f[None]


def _stuff(name: str, size: int, rng: np.random.Generator) -> Float32[np.ndarray, "h w 3"]:
    """A whole square of one kind of stuff: its colour, brighter and darker in its pattern.

    Lengths in patterns are pixels of a 64-pixel image and grow with the image.
    """
    # In float64: sines of float32 differ between processors in a bit that a pixel may show.
    y, x = np.mgrid[0:size, 0:size] * (64 / size)
    y, x = y + rng.uniform(0, 64), x + rng.uniform(0, 64)
    noise = rng.standard_normal((size, size))
    colour = np.array(STUFF[name]) + rng.uniform(-COLOUR_JITTER, COLOUR_JITTER, 3)
    shade = _PATTERNS[name](y, x, noise, rng)
    return (colour * shade[..., None]).astype(np.float32)


_Pattern = Callable[[np.ndarray, np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def _grass(y: np.ndarray, x: np.ndarray, noise: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    blades = np.sin(2.1 * x + 1.5 * np.sin(0.9 * y + rng.uniform(0, 6)))
    return 1 + 0.22 * blades + 0.12 * noise


def _sand(y: np.ndarray, x: np.ndarray, noise: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 1 + 0.06 * noise + 0.04 * np.sin(0.35 * y + 0.2 * x + rng.uniform(0, 6))


def _water(y: np.ndarray, x: np.ndarray, noise: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 1 + 0.2 * np.sin(0.9 * y + 1.2 * np.sin(0.35 * x + rng.uniform(0, 6))) + 0.02 * noise


def _brick(y: np.ndarray, x: np.ndarray, noise: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    row = np.floor(y / 5)
    is_mortar = (y % 5 < 1) | ((x + 5 * (row % 2)) % 10 < 1)
    return np.where(is_mortar, 1.45, 0.95) + 0.05 * noise


def _snow(y: np.ndarray, x: np.ndarray, noise: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 1.05 + 0.05 * _smooth_noise(len(y), len(y) / 4, rng) + 0.015 * noise


def _wood(y: np.ndarray, x: np.ndarray, noise: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    grain = np.sin(1.4 * x + 2.5 * np.sin(0.08 * y + rng.uniform(0, 6)))
    return np.where(x % 16 < 1, 0.6, 1 + 0.14 * grain) + 0.03 * noise


def _gravel(
    y: np.ndarray, x: np.ndarray, noise: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    stones = _smooth_noise(len(y), 3 * len(y) / 64, rng)
    return 1 + 0.3 * np.tanh(2 * stones) + 0.05 * noise


def _sky(y: np.ndarray, x: np.ndarray, noise: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    clouds = np.maximum(0, _smooth_noise(len(y), len(y) / 3, rng) - 0.6)
    return 0.92 + 0.25 * np.linspace(0, 1, len(y))[:, None] + 0.15 * clouds


def _tiles(y: np.ndarray, x: np.ndarray, noise: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    is_joint = (y % 8 < 1) | (x % 8 < 1)
    return np.where(is_joint, 0.6, 1.05) + 0.02 * noise


def _lava(y: np.ndarray, x: np.ndarray, noise: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    cracks = np.abs(_smooth_noise(len(y), 7 * len(y) / 64, rng))
    return np.where(cracks < 0.35, 1.6, 0.6) + 0.05 * noise


def _asphalt(
    y: np.ndarray, x: np.ndarray, noise: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    return 1 + 0.2 * noise


def _marble(
    y: np.ndarray, x: np.ndarray, noise: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    veins = np.sin(0.3 * (x + y) + 2.5 * _smooth_noise(len(y), len(y) / 4, rng))
    return 1.05 - 0.35 * np.exp(-8 * veins * veins) + 0.01 * noise


_PATTERNS: dict[str, _Pattern] = {
    "grass": _grass,
    "sand": _sand,
    "water": _water,
    "brick": _brick,
    "snow": _snow,
    "wood": _wood,
    "gravel": _gravel,
    "sky": _sky,
    "tiles": _tiles,
    "lava": _lava,
    "asphalt": _asphalt,
    "marble": _marble,
}


# --- names and boxes -----------------------------------------------------------------------------


def _is_base(category: int, annotated: str) -> bool:
    return annotated == "base" and object_names()[category].group == "base"


def _is_of(category: Category, asked: str) -> bool:
    return asked == "all" or "novel" not in category.groups


def _listed(names: list[str]) -> str:
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]
