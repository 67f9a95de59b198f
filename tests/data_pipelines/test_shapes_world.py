"""Shapes world is a yardstick: what it is must not change unseen."""

import numpy as np

from data_pipelines import shapes_names
from data_pipelines.shapes_names import object_names
from data_pipelines.shapes_world import ShapesWorld


def test_categories() -> None:
    names = object_names()
    by_group = {g: [n for n in names if n.group == g] for g in {n.group for n in names}}
    assert set(by_group) == {"base", "novel_combination", "novel_word"}
    assert len({n.name for n in names}) == len(names)
    pairs = len(shapes_names.COLOURS) * len(shapes_names.SHAPES)
    held_out = {(n.colour, n.shape) for n in by_group["novel_combination"]}
    assert len(held_out) >= pairs / 6
    base = {(n.colour, n.shape) for n in by_group["base"]}
    assert not held_out & base
    for colour, shape in held_out:
        assert colour in {c for c, _ in base} and shape in {s for _, s in base}
    novel = {*shapes_names.NOVEL_COLOURS, *shapes_names.NOVEL_SHAPES}
    assert all(n.colour not in novel and n.shape not in novel for n in by_group["base"])
    assert all(n.colour in novel or n.shape in novel for n in by_group["novel_word"])
    assert {n.frequency for n in by_group["base"]} == {"rare", "common", "frequent"}


def test_records_are_pure_and_label_only_what_they_may() -> None:
    train, again = ShapesWorld(num_images=100), ShapesWorld(num_images=100)
    base = {n.name for n in object_names() if n.group == "base"}
    unlabelled = 0
    for i in range(100):
        record = train[i]
        np.testing.assert_array_equal(record.image, again[i].image)
        present = {name for names in record.names for name in names}
        assert present <= base
        assert present | set(record.negatives) == base and not present & set(record.negatives)
        unlabelled += len(train.scene(i).objects) - len(record.names)
    assert unlabelled > 20, "novel objects stand in training images"
    test = ShapesWorld(split="test", num_images=100)
    everything = {n.name for n in object_names()}
    seen = {name for i in range(100) for names in test[i].names for name in names}
    assert seen <= everything and seen - base
    assert {c.name for c in test.categories} == everything


def test_boxes_fit_their_masks_and_little_is_hidden() -> None:
    world = ShapesWorld(split="test", num_images=60, image_size=64)
    for i in range(60):
        scene, record = world.scene(i), world[i]
        assert 0 <= len(scene.objects) <= 6
        total = np.zeros((64, 64), int)
        for item, box in zip(scene.objects, record.boxes_xyxy, strict=True):
            rows, columns = np.nonzero(item.mask)
            wanted = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_array_equal(box, wanted)
            total += item.mask
        assert total.max(initial=0) <= 1, "masks hold visible pixels only"


def test_federated_images_annotate_a_share_of_the_names() -> None:
    world = ShapesWorld(num_images=20, annotated_fraction=0.5)
    num_base = sum(n.group == "base" for n in object_names())
    for i in range(20):
        record = world[i]
        present = {name for names in record.names for name in names}
        assert len(present | set(record.negatives)) == round(0.5 * num_base)


def test_captions_name_objects_and_carry_noise() -> None:
    world = ShapesWorld(num_images=200)
    captions = [world[i].captions[0] for i in range(200)]
    assert any("free png download" in text for text in captions)
    assert any("pink" in text or "heart" in text for text in captions), "novel words occur"


def test_balanced_scenes_box_base_names_and_caption_all() -> None:
    world = ShapesWorld(split="balanced", image_size=32, num_images=200)
    assert {group for c in world.categories for group in c.groups} <= {
        *("base", "rare", "common", "frequent")
    }
    num_novel = num_objects = 0
    for index in range(len(world)):
        record, scene = world[index], world.scene(index)
        names = [object_names()[item.category] for item in scene.objects]
        assert 1 <= len(names) <= 4
        assert all(entry.name in record.captions[0] for entry in names)
        boxed = sorted(name for (name,) in record.names)
        assert boxed == sorted(entry.name for entry in names if entry.group == "base")
        num_novel += sum(entry.group != "base" for entry in names)
        num_objects += len(names)
    # 65 of 113 names.
    assert 0.5 < num_novel / num_objects < 0.65
