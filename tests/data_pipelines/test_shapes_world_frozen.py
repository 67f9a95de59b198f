"""The yardstick's golden values. A change here is a new `VERSION`, never a new hash for the old."""

import hashlib

import numpy as np
import pytest

from data_pipelines import shapes_drawing, shapes_names, shapes_world
from data_pipelines.shapes_names import object_names
from data_pipelines.shapes_world import ShapesWorld


def test_version_and_hash_belong_together() -> None:
    assert (shapes_world.VERSION, shapes_world.parameter_hash()) == ("1", "69effb30b78a")
    described = shapes_world.describe()
    assert described["version"] == "1" and described["hash"] == "69effb30b78a"
    assert described["names"] == {"base": 48, "novel_combination": 21, "novel_word": 44}
    assert ShapesWorld().version == "shapes_world-1-69effb30b78a"


@pytest.mark.parametrize(("split", "digest"), [("train", "8a033ef40759"), ("test", "bf6bf49d0a29")])
def test_records_are_frozen(split: str, digest: str) -> None:
    """The hash above covers scenes; this one covers what a reader of a split gets."""
    world = ShapesWorld(split=split, num_images=6, image_size=48)
    content = hashlib.sha256()
    for i in range(6):
        record = world[i]
        for array in (record.image, record.boxes_xyxy):
            content.update(np.ascontiguousarray(array).tobytes())
        content.update(repr((record.names, record.negatives, record.captions)).encode())
    assert content.hexdigest()[:12] == digest


def test_every_base_word_has_boxes_with_other_words_too() -> None:
    """A held-out pair can be composed only if both words are seen apart, several times."""
    base = [n for n in object_names() if n.group == "base"]
    colours = [c for c in shapes_names.COLOURS if c not in shapes_names.NOVEL_COLOURS]
    shapes = [s for s in shapes_names.SHAPES if s not in shapes_names.NOVEL_SHAPES]
    for colour in colours:
        assert len({n.shape for n in base if n.colour == colour}) >= 3, colour
    for shape in shapes:
        assert len({n.colour for n in base if n.shape == shape}) >= 4, shape
    assert any(n.is_striped for n in base)
    assert {n.colour for n in base} == set(colours) and {n.shape for n in base} == set(shapes)


def test_sizes_and_numbers_of_objects() -> None:
    world, size = ShapesWorld(split="test", num_images=150, image_size=64), 64
    counts, sides = [], []
    for i in range(150):
        scene = world.scene(i)
        counts.append(len(scene.objects))
        if len(scene.objects) == 1:  # alone, hence whole
            x0, y0, x1, y1 = scene.objects[0].box
            sides.append(max(x1 - x0, y1 - y0) / size)
    assert min(counts) >= 1 and max(counts) == 6
    assert min(sides) >= 0.10 - 2 / size and max(sides) <= 0.45 + 2 / size


def test_no_object_loses_more_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Visible pixels against those that each object covered when it was painted."""
    covered: list[tuple[int, np.ndarray]] = []
    original = shapes_drawing._is_well_placed

    def watched(mask: np.ndarray, colour: str, placed: list, areas: list) -> bool:
        is_good = original(mask, colour, placed, areas)
        if is_good:
            covered.append((len(placed), mask.copy()))
        return is_good

    monkeypatch.setattr(shapes_drawing, "_is_well_placed", watched)
    num_hidden = 0
    world = ShapesWorld(num_images=60)
    for i in range(60):
        covered.clear()  # of the scenes that the version's hash is made of, too
        scene = world.scene(i)
        assert len(covered) == len(scene.objects)
        for item, (_, whole) in zip(scene.objects, covered, strict=True):
            assert not (item.mask & ~whole).any()
            shown = item.mask.sum() / whole.sum()
            assert shown >= 0.7
            num_hidden += shown < 1
    assert num_hidden > 10, "some objects must overlap, or this tests nothing"


def test_a_cached_record_is_not_altered_by_the_pipeline() -> None:
    from data_pipelines.input import TrainInput
    from tests import tiny

    augment = {"flip": True, "photometric": 0.4, "crop_probability": 1.0, "merge_iou": 0.5}
    data = TrainInput(tiny.config(data__augment=augment))
    first = data.example(3)
    again = data.example(3)
    for key, value in first.items():
        np.testing.assert_array_equal(value, again[key], err_msg=key)
