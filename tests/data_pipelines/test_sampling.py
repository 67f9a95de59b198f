"""The order of images: every one once an epoch, reproducible, and with stand-ins that differ."""

import numpy as np
import pytest

from data_pipelines.sampling import Mixture, example_rng


def test_a_source_alone_is_covered_once_an_epoch() -> None:
    mixture = Mixture([13], [1.0], seed=5)
    epochs = [[mixture.locate(13 * e + i) for i in range(13)] for e in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == [(0, i) for i in range(13)]
    assert len({tuple(epoch) for epoch in epochs}) == 4, "each epoch has its own order"


def test_places_depend_on_seed_and_slot_alone() -> None:
    slots = [40, 3, 17, 3, 999]
    one, two = Mixture([9, 31], [1.0, 2.0], seed=5), Mixture([9, 31], [1.0, 2.0], seed=5)
    assert [one.locate(s) for s in slots] == [two.locate(s) for s in reversed(slots)][::-1]
    other = Mixture([9, 31], [1.0, 2.0], seed=6)
    assert [one.locate(s) for s in range(50)] != [other.locate(s) for s in range(50)]


def test_weights_need_not_add_up_to_one() -> None:
    mixture = Mixture([50, 5, 500], [8.0, 1.0, 1.0], seed=0)
    drawn = np.array([mixture.locate(slot)[0] for slot in range(5000)])
    np.testing.assert_allclose(np.bincount(drawn) / 5000, [0.8, 0.1, 0.1], atol=0.02)


@pytest.mark.parametrize("size", [2, 16, 1000, 7919, 7919 * 3])
def test_stand_ins_are_other_images(size: int) -> None:
    mixture = Mixture([size], [1.0], seed=0)
    places = {mixture.locate(3, attempt) for attempt in range(16)}
    assert len(places) == min(size, 16)


def test_each_example_has_its_own_generator() -> None:
    assert example_rng(0, 5).random() == example_rng(0, 5).random()
    draws = {example_rng(seed, i).random() for seed in range(3) for i in range(20)}
    assert len(draws) == 60
