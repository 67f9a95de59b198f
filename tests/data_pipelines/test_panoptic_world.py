"""Shapes world with stuff: frozen values, and what every scene must be like."""

import hashlib

import numpy as np
import pytest

from data_pipelines import panoptic_world, shapes_names, shapes_world, transforms
from data_pipelines.open_source import open_source
from data_pipelines.panoptic_world import STUFF, PanopticWorld
from owl_det.config import PreprocessConfig, ShapesWorldSource
from owl_det.errors import DataError
from tests import tiny


@pytest.mark.parametrize(
    ("split", "version", "digest"),
    [
        ("panoptic", "24fd728a766b", "6b35951e14d6"),
        ("panoptic_test", "8cb03813b5fd", "62a4c93b9f05"),
        ("panoptic_text", "93347ddec3bb", "d052bf413194"),
    ],
)
def test_frozen(split: str, version: str, digest: str) -> None:
    """A change here is a new `VERSION`, never a new hash for the old."""
    world = PanopticWorld(split=split, num_images=6, image_size=48)
    content = hashlib.sha256()
    for i in range(6):
        record, regions = world[i], world.regions(i)
        for array in (record.image, record.boxes_xyxy, regions.boxes_xyxy, regions.segments):
            content.update(np.ascontiguousarray(array).tobytes())
        content.update(repr((record.names, record.negatives, record.not_exhaustive)).encode())
        content.update(repr((record.captions, regions.names)).encode())
    assert world.version == f"shapes_world-{split}-1-{version}"
    assert content.hexdigest()[:12] == digest


def test_every_pixel_is_a_thing_or_stuff_and_regions_tell_which() -> None:
    world = PanopticWorld(split="panoptic_test", num_images=60)
    names = {category.name: category for category in world.categories}
    num_stuff = []
    for i in range(60):
        regions, scene = world.regions(i), world.scene(i)
        assert regions.segments is not None and regions.segments.min() == 0
        shown = np.unique(regions.segments)
        np.testing.assert_array_equal(shown, np.arange(len(regions.names)))
        for row, name in enumerate(regions.names):
            assert ("thing" in names[name].groups) == regions.is_thing[row]
            y, x = np.nonzero(regions.segments == row)
            box = [x.min(), y.min(), x.max() + 1, y.max() + 1]
            np.testing.assert_array_equal(regions.boxes_xyxy[row], box)
        for row, thing in enumerate(scene.things):
            np.testing.assert_array_equal(regions.segments == row, thing.mask)
        stuff = [name for name in regions.names if name in STUFF]
        assert len(stuff) == len(set(stuff)) == (~regions.is_thing).sum()
        num_stuff.append(len(stuff))
    assert set(num_stuff) == {1, 2, 3, 4}


def test_every_kind_of_stuff_is_equally_likely_and_looks_its_own_way() -> None:
    world = PanopticWorld(split="panoptic_test", num_images=300)
    counts = dict.fromkeys(STUFF, 0)
    for i in range(300):
        for name in world.scene(i).stuff:
            counts[name] += 1
    expected = sum(counts.values()) / len(STUFF)
    assert min(counts.values()) > 0.6 * expected and max(counts.values()) < 1.4 * expected


def test_records_box_things_alone_and_never_deny_what_is_there() -> None:
    world = PanopticWorld(split="panoptic", num_images=80)
    asked = {category.name for category in world.categories}
    base = {n.name for n in shapes_names.object_names() if n.group == "base"}
    assert asked == base | set(STUFF)
    num_novel = 0
    for i in range(80):
        record, scene = world[i], world.scene(i)
        boxed = {name for group in record.names for name in group}
        things = {shapes_names.object_names()[t.category].name for t in scene.things}
        assert boxed == things & base and record.not_exhaustive == scene.stuff
        assert set(record.negatives) == asked - boxed - set(scene.stuff)
        assert set(world.regions(i).names) == boxed | set(scene.stuff)
        num_novel += len(things - base)
    assert num_novel > 0


def test_captions_name_things_on_stuff_and_nothing_else() -> None:
    world = PanopticWorld(split="panoptic_text", num_images=60)
    num_named = {"thing": 0, "stuff": 0}
    for i in range(60):
        (text,), scene = world[i].captions, world.scene(i)
        assert len(scene.things) <= 2 and 1 <= len(scene.stuff) <= 2
        assert not world[i].names and not world[i].negatives
        absent = set(STUFF) - set(scene.stuff)
        assert not any(name in text for name in absent), text
        things = scene.names[: len(scene.things)]
        num_named["thing"] += any(name in text for name in things)
        num_named["stuff"] += any(name in text for name in scene.stuff)
    assert min(num_named.values()) > 40


def test_opens_by_its_split_as_shapes_world() -> None:
    source = open_source(ShapesWorldSource(split="panoptic_test", num_images=3), "")
    assert isinstance(source, PanopticWorld) and len(source) == 3
    with pytest.raises(IndexError):
        source[3]
    with pytest.raises(DataError, match="annotated_fraction"):
        open_source(ShapesWorldSource(split="panoptic", annotated_fraction=0.5), "")


def test_the_other_splits_know_nothing_of_it() -> None:
    assert not set(panoptic_world.SPLITS) & set(shapes_world.SPLITS)
    things = {entry.name for entry in shapes_names.object_names()}
    assert not things & set(STUFF)


def test_stuff_is_asked_as_a_negative_only_where_it_is_not() -> None:
    world = PanopticWorld(split="panoptic", image_size=32, num_images=16)
    for i in range(16):
        example = transforms.eval_example(world[i], image_size=32, preprocess=PreprocessConfig())
        stuff = set(world.scene(i).stuff)
        assert stuff <= set(example.excluded)
        assert set(example.negatives) & set(STUFF) == set(STUFF) - stuff


def test_training_reads_it() -> None:
    source = {"kind": "shapes_world", "split": "panoptic", "image_size": 32, "num_images": 16}
    batch = tiny.arrays(tiny.config(data__train={"world": source}))
    assert batch["is_instance"].any() and batch["image"].shape == (8, 32, 32, 3)
