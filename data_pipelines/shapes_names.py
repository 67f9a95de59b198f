"""The names of shapes world: shape x colour x texture, base and novel, and how likely each is."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float64

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


def groups_of(entry: ObjectName) -> tuple[str, ...]:
    if entry.group == "base":
        return ("base", entry.frequency)
    return ("novel", entry.group)


@cache
def cumulative_probabilities(is_long_tailed: bool) -> Float64[np.ndarray, " c"]:
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


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
