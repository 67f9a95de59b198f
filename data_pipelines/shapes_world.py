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
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from data_pipelines.features import Category, Record
from data_pipelines.shapes_drawing import SceneObject, background, draw_objects, to_pixels
from data_pipelines.shapes_names import groups_of, object_names, with_article
from owl_det.errors import DataError

VERSION = "1"

MAX_OBJECTS = 6
SIZE_RANGE = (0.10, 0.45)  # of the image side; areas are uniform between
SINGLE_SIZE_RANGE = (0.20, 0.90)
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
class Scene:
    image: UInt8[np.ndarray, "h w 3"]
    objects: tuple[SceneObject, ...]


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


@cache
def parameter_hash(splits: tuple[str, ...] = DETECTION_SPLITS) -> str:
    """Twelve hex digits over all names and a few drawn images, so that no change goes unseen."""
    content = hashlib.sha256(repr(object_names()).encode())
    for split in splits:
        for index in range(8):
            rng = np.random.default_rng([int(VERSION), index])
            content.update(draw_scene(64, rng, SPLITS[split]).image.tobytes())
    return content.hexdigest()[:12]


def draw_scene(size: int, rng: np.random.Generator, split: Split) -> Scene:
    """Draws background and objects."""
    canvas = background(size, rng)
    objects = draw_objects(
        canvas,
        rng,
        is_long_tailed=split.is_long_tailed,
        max_objects=split.max_objects,
        size_range=split.size_range,
    )
    return Scene(to_pixels(canvas), objects)


def caption(scene: Scene, rng: np.random.Generator, split: Split) -> str:
    """A web-like caption: names most objects, misses some, and adds noise."""
    names = [object_names()[item.category].name for item in scene.objects]
    named = [with_article(name) for name in names if rng.random() < split.naming] or ["shapes"]
    if split.article < 1 and rng.random() >= split.article:
        named = [text.removeprefix("an ").removeprefix("a ") for text in named]
    text = " and ".join((", ".join(named[:-1]), named[-1])) if len(named) > 1 else named[0]
    return CAPTIONS[int(rng.integers(len(CAPTIONS)))].format(text)


def describe() -> dict[str, object]:
    """Parameters of the data set, for reports."""
    groups = [entry.group for entry in object_names()]
    return {
        "version": VERSION,
        "hash": parameter_hash(),
        "names": {group: groups.count(group) for group in dict.fromkeys(groups)},
        "objects": [dataclasses.asdict(entry) | {"name": entry.name} for entry in object_names()],
    }
