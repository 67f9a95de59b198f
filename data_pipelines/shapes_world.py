"""Shapes world: the embedded detection data set, drawn from a seed with NumPy and Pillow.

Scenes hold one to six objects = shape x colour x texture on a noisy or gradient background, with
exact boxes and instance masks, occlusion of at most 30 %, and captions. Its categories are split
as in the open-vocabulary literature:

    base               names that have boxes in training
    novel_combination  a known colour and a known shape that never have boxes together
    novel_word         names with a colour or shape word that never has boxes

Novel objects do stand in training images, unlabelled, and their names occur in captions. A stripe
is always named ("striped red star"); plain and dotted objects go by colour and shape alone.
Training frequencies are long-tailed (rare / common / frequent) and novel objects are few, as rare
categories are few in LVIS; in the test split every name is as likely as every other, so that each
of them has enough boxes for its AP to mean something.

Two splits have captions and no boxes, as images from the web: "image_text" (one object, most often
a large one, every name equally likely) for contrastive pretraining, and "crowded" (scenes as in
training, every name equally likely) for pseudo-annotation. "image_text_test" measures the former.
"balanced" is for distillation: boxes of base names as in "train", but every name equally likely,
and captions that name all objects, so that there is something to learn of the novel ones.

An image is a pure function of (version, split, image size, index). The data set is a yardstick:
whatever changes an image, a name or a split changes `VERSION`.
"""

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt8
from PIL import Image, ImageDraw

from data_pipelines.features import Category, Record
from owl_det.errors import DataError

VERSION = "1"

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 225),
    "yellow": (240, 220, 40),
    "purple": (135, 40, 170),
    "orange": (245, 135, 20),
    "cyan": (40, 205, 215),
    "white": (250, 250, 250),
    "pink": (250, 140, 185),
    "brown": (120, 70, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "arrow")
NOVEL_COLOURS = ("pink", "brown")
NOVEL_SHAPES = ("heart", "arrow")
TEXTURES = ("plain", "dotted", "striped")

NUM_NOVEL_COMBINATIONS = 14  # of the 48 pairs of base words; 80 pairs in all
STRIPED_SHARE = 1 / 3  # of the pairs that also come striped
RAREST = 0.2  # training weight of the rarest base name; the most frequent has 1
NOVEL_SHARE = 0.06  # of the training objects: half combinations, half words
MAX_OBJECTS = 6
SIZE_RANGE = (0.10, 0.45)  # of the image side; areas are uniform between
SINGLE_SIZE_RANGE = (0.20, 0.90)
MAX_OCCLUSION = 0.3
SUPERSAMPLING = 4

CACHE_BYTES = 256 * 2**20

CAPTIONS = (
    "{}",
    "a picture of {}",
    "{} on a plain background",
    "{} free png download",
    "stock image: {}",
    "{} 2024",
    "drawing of {}, high resolution",
    "we found {} here",
)


@dataclass(frozen=True)
class ObjectName:
    """One category: what it looks like and what it is called."""

    colour: str
    shape: str
    is_striped: bool
    group: str  # base | novel_combination | novel_word
    frequency: str  # rare | common | frequent; of base names only
    weight: float  # relative frequency in training, within base or within novel

    @property
    def name(self) -> str:
        return f"{'striped ' if self.is_striped else ''}{self.colour} {self.shape}"


@dataclass(frozen=True)
class Split:
    """What the scenes of a split are like."""

    number: int  # seeds the split's images
    annotated: Literal["none", "base", "all"]  # none: captions only
    is_long_tailed: bool = False  # False: every name equally likely
    max_objects: int = MAX_OBJECTS
    size_range: tuple[float, float] = SIZE_RANGE
    naming: float = 0.8  # probability that a caption names an object …
    article: float = 1.0  # … with an article


SPLITS = {
    "train": Split(0, "base", is_long_tailed=True),
    "test": Split(1, "all"),
    "image_text": Split(2, "none", False, 1, SINGLE_SIZE_RANGE, naming=0.95, article=0.5),
    "image_text_test": Split(3, "all", False, 1, SINGLE_SIZE_RANGE, naming=0.95, article=0.5),
    "crowded": Split(4, "none"),
    "balanced": Split(5, "base", max_objects=4, naming=1.0),
}
DETECTION_SPLITS = ("train", "test")


@dataclass(frozen=True)
class SceneObject:
    """One drawn object: its category, the pixels it still shows, and its box (x0, y0, x1, y1)."""

    category: int
    mask: Bool[np.ndarray, "h w"]
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    image: UInt8[np.ndarray, "h w 3"]
    objects: tuple[SceneObject, ...]


@cache
def object_names() -> tuple[ObjectName, ...]:
    """All categories: base, then novel combinations, then novel words."""
    rng = np.random.default_rng(20240101)
    known_colours = [c for c in COLOURS if c not in NOVEL_COLOURS]
    known_shapes = [s for s in SHAPES if s not in NOVEL_SHAPES]
    held_out = _held_out_pairs(known_colours, known_shapes, rng)
    by_group: dict[str, list[tuple[str, str, bool]]] = {
        "base": [],
        "novel_combination": [],
        "novel_word": [],
    }
    for colour in COLOURS:
        for shape in SHAPES:
            is_word = colour in NOVEL_COLOURS or shape in NOVEL_SHAPES
            is_held_out = (colour, shape) in held_out
            group = "novel_word" if is_word else "novel_combination" if is_held_out else "base"
            by_group[group].append((colour, shape, False))
            if rng.random() < STRIPED_SHARE:
                by_group[group].append((colour, shape, True))
    names = []
    for group, members in by_group.items():
        ranks = rng.permutation(len(members))
        for member, rank in zip(members, ranks, strict=True):
            position = rank / max(len(members) - 1, 1)
            weight = RAREST**position if group == "base" else 1.0
            tier = ("frequent", "common", "rare")[min(int(3 * position), 2)]
            names.append(ObjectName(*member, group, tier if group == "base" else "", float(weight)))
    return tuple(names)


def _held_out_pairs(
    colours: list[str], shapes: list[str], rng: np.random.Generator
) -> set[tuple[str, str]]:
    """Pairs spread evenly: shapes take turns, each takes one of the colours that lost fewest."""
    chosen: set[tuple[str, str]] = set()
    for i in range(NUM_NOVEL_COMBINATIONS):
        shape = shapes[i % len(shapes)]
        lost = {c: sum(colour == c for colour, _ in chosen) for c in colours}
        free = [c for c in colours if (c, shape) not in chosen and lost[c] == min(lost.values())]
        chosen.add((free[int(rng.integers(len(free)))], shape))
    return chosen


class ShapesWorld:
    """The data set as a source; see the top of this file."""

    def __init__(
        self,
        *,
        split: str = "train",
        image_size: int = 64,
        num_images: int = 8192,
        annotated_fraction: float = 1.0,
    ):
        """`annotated_fraction` < 1 annotates, in each image, only that share of the base names.

        Raises `DataError` if there is nothing to draw.
        """
        if num_images <= 0:
            raise DataError("shapes_world: num_images must be positive")
        self.split, self.image_size, self.num_images = split, image_size, num_images
        self.annotated_fraction = annotated_fraction
        self.name = f"shapes_world/{split}"
        # Drawing costs more than a small training step: later epochs take images from memory.
        self._cached = lru_cache(CACHE_BYTES // (3 * image_size**2))(self._draw)
        own = () if split in DETECTION_SPLITS else (split,)
        self.version = f"shapes_world-{VERSION}-{parameter_hash((*DETECTION_SPLITS, *own))}"
        self.categories = tuple(
            Category(
                id=i + 1, name=entry.name, groups=groups_of(entry), frequency=float(entry.weight)
            )
            for i, entry in enumerate(object_names())
            # Only what is annotated may be asked for in training, also as a negative.
            if SPLITS[split].annotated != "base" or entry.group == "base"
        )

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> Record:
        return self._cached(index)

    def _draw(self, index: int) -> Record:
        rng = self._rng(index)
        scene = draw_scene(self.image_size, rng, SPLITS[self.split])
        annotated = self._annotated(rng)
        boxes, names = [], []
        for item in scene.objects:
            if item.category in annotated:
                boxes.append(item.box)
                names.append((object_names()[item.category].name,))
        return Record(
            image=scene.image,
            image_id=index,
            boxes_xyxy=np.array(boxes, np.float32).reshape(-1, 4),
            names=tuple(names),
            is_crowd=np.zeros(len(boxes), bool),
            scores=np.ones(len(boxes), np.float32),
            negatives=_absent(annotated, frozenset(names)),
            captions=(caption(scene, rng, SPLITS[self.split]),),
            source=f"{self.name} image {index}",
        )

    def scene(self, index: int) -> Scene:
        """The scene with all its objects and masks, annotated or not."""
        return draw_scene(self.image_size, self._rng(index), SPLITS[self.split])

    def _rng(self, index: int) -> np.random.Generator:
        if not 0 <= index < self.num_images:
            raise IndexError(index)
        return np.random.default_rng(
            [int(VERSION), SPLITS[self.split].number, self.image_size, index]
        )

    def _annotated(self, rng: np.random.Generator) -> frozenset[int]:
        """Categories annotated exhaustively in this image."""
        annotated = SPLITS[self.split].annotated
        if annotated == "none":
            return frozenset()
        if annotated == "all":
            return _everything()
        base = _members("base")
        if self.annotated_fraction >= 1:
            return frozenset(base)
        count = max(1, round(self.annotated_fraction * len(base)))
        return frozenset(rng.choice(base, count, replace=False).tolist())


@cache
def _members(group: str) -> tuple[int, ...]:
    return tuple(i for i, entry in enumerate(object_names()) if entry.group == group)


@cache
def _everything() -> frozenset[int]:
    return frozenset(range(len(object_names())))


def _absent(annotated: frozenset[int], present: frozenset[tuple[str, ...]]) -> tuple[str, ...]:
    names = object_names()
    return tuple(names[i].name for i in sorted(annotated) if (names[i].name,) not in present)


def groups_of(entry: ObjectName) -> tuple[str, ...]:
    if entry.group == "base":
        return ("base", entry.frequency)
    return ("novel", entry.group)


@cache
def parameter_hash(splits: tuple[str, ...] = DETECTION_SPLITS) -> str:
    """Twelve hex digits over all names and a few drawn images, so that no change goes unseen."""
    content = hashlib.sha256(repr(object_names()).encode())
    for split in splits:
        for index in range(8):
            rng = np.random.default_rng([int(VERSION), index])
            content.update(draw_scene(64, rng, SPLITS[split]).image.tobytes())
    return content.hexdigest()[:12]


# --- drawing -------------------------------------------------------------------------------------


@cache
def _cumulative_probabilities(is_long_tailed: bool) -> Float64[np.ndarray, " c"]:
    """Of each category: that an object belongs to it or to one before it."""
    names = object_names()
    if not is_long_tailed:
        return np.arange(1, len(names) + 1) / len(names)
    weights = np.array([entry.weight for entry in names])
    shares = {"base": 1 - NOVEL_SHARE, "novel_combination": NOVEL_SHARE / 2}
    for group in ("base", "novel_combination", "novel_word"):
        mask = np.array([entry.group == group for entry in names])
        weights[mask] *= shares.get(group, NOVEL_SHARE / 2) / weights[mask].sum()
    return np.cumsum(weights / weights.sum())


def draw_scene(size: int, rng: np.random.Generator, split: Split) -> Scene:
    """Draws background and objects."""
    canvas = _background(size, rng)
    objects = draw_objects(
        canvas,
        rng,
        is_long_tailed=split.is_long_tailed,
        max_objects=split.max_objects,
        size_range=split.size_range,
    )
    return Scene(to_pixels(canvas), objects)


def to_pixels(canvas: Float32[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    return np.clip(canvas, 0, 255).astype(np.uint8)


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
    cumulative = _cumulative_probabilities(is_long_tailed)
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
    return tuple(SceneObject(c, m, _box_of(m)) for c, m in placed)


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


def _box_of(mask: Bool[np.ndarray, "h w"]) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _background(size: int, rng: np.random.Generator) -> Float32[np.ndarray, "h w 3"]:
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


def caption(scene: Scene, rng: np.random.Generator, split: Split) -> str:
    """A web-like caption: names most objects, misses some, and adds noise."""
    names = [object_names()[item.category].name for item in scene.objects]
    named = [with_article(name) for name in names if rng.random() < split.naming] or ["shapes"]
    if split.article < 1 and rng.random() >= split.article:
        named = [text.removeprefix("an ").removeprefix("a ") for text in named]
    text = " and ".join((", ".join(named[:-1]), named[-1])) if len(named) > 1 else named[0]
    return CAPTIONS[int(rng.integers(len(CAPTIONS)))].format(text)


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def describe() -> dict[str, object]:
    """Parameters of the data set, for reports."""
    groups = [entry.group for entry in object_names()]
    return {
        "version": VERSION,
        "hash": parameter_hash(),
        "names": {group: groups.count(group) for group in dict.fromkeys(groups)},
        "objects": [dataclasses.asdict(entry) | {"name": entry.name} for entry in object_names()],
    }
