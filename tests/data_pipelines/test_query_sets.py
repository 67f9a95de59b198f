"""What is asked of an image: order, bounds, and no pseudo-negative that is really there."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.features import Category, Record
from data_pipelines.input import TrainInput
from data_pipelines.query_sets import Pool, make
from tests import tiny

NAMES = tuple(f"n{i}" for i in range(12))
names = st.sampled_from(NAMES)


@settings(max_examples=150, deadline=None)
@given(
    instances=st.lists(st.lists(names, min_size=1, max_size=3).map(tuple), max_size=6),
    negatives=st.lists(names, max_size=8),
    min_queries=st.integers(0, 10),
    extra=st.integers(0, 6),
    seed=st.integers(0, 1000),
)
def test_every_set_of_queries(
    instances: list[tuple[str, ...]],
    negatives: list[str],
    min_queries: int,
    extra: int,
    seed: int,
) -> None:
    pool = Pool.of([Category(id=i, name=name) for i, name in enumerate(NAMES)])
    max_queries = max(min_queries + extra, 1)
    made = make(
        instances,
        tuple(negatives),
        pool,
        max_queries=max_queries,
        min_queries=min_queries,
        rng=np.random.default_rng(seed),
    )
    positives = list(dict.fromkeys(name for group in instances for name in group))
    known = set(negatives) - set(positives)
    asked = list(made.names)
    assert len(set(asked)) == len(asked) <= max_queries
    num_positive = min(len(positives), max_queries)
    kept = [name for name in positives if name in asked]
    assert asked[:num_positive] == kept, "positives come first, in order"
    assert made.num_dropped == len(positives) - num_positive
    num_known = min(len(known), max_queries - num_positive)
    assert set(asked[num_positive : num_positive + num_known]) <= known
    assert not set(asked[num_positive:]) & set(positives), "a positive is asked as a negative"
    free = len(NAMES) - len(set(positives) - set(asked))  # a dropped positive is never drawn
    assert len(asked) >= min(min_queries, free)
    if num_positive + num_known >= min_queries:
        assert len(asked) == num_positive + num_known, "no pseudo-negative beyond min_queries"
    for row, group in zip(made.labels, instances, strict=True):
        assert {asked[i] for i in np.flatnonzero(row)} == set(group) & set(asked)


def test_positives_that_do_not_fit_are_left_out_at_random() -> None:
    """The last tiles of a mosaic are asked for as often as the first."""
    instances = [(f"name {i}",) for i in range(40)]
    counts = np.zeros(40, int)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        made = make(instances, (), Pool.of([]), max_queries=10, min_queries=0, rng=rng)
        assert made.num_dropped == 30
        counts += made.labels.any(1)
    assert counts.sum() == 2000 and counts.min() > 25 and counts.max() < 80


def test_pseudo_negatives_follow_the_frequencies() -> None:
    pool = Pool.of(
        [
            Category(id=1, name="often", frequency=6.0),
            Category(id=2, name="seldom", frequency=1.0),
            Category(id=3, name="shared", frequency=1.0),
            Category(id=9, name="shared", frequency=2.0),  # of another source
        ]
    )
    assert pool.names == ("often", "seldom", "shared")
    np.testing.assert_allclose(pool.probabilities, [0.6, 0.1, 0.3])
    rng = np.random.default_rng(0)
    drawn = [pool.draw(1, set(), rng)[0] for _ in range(3000)]
    share = [drawn.count(name) / 3000 for name in pool.names]
    np.testing.assert_allclose(share, [0.6, 0.1, 0.3], atol=0.04)


def test_large_pools_follow_the_frequencies_too() -> None:
    often = [Category(id=i, name=f"often {i}", frequency=3.0) for i in range(10_000)]
    rare = [Category(id=i, name=f"rare {i}", frequency=1.0) for i in range(10_000)]
    pool = Pool.of(often + rare)
    exclude = {f"often {i}" for i in range(5_000)}
    rng = np.random.default_rng(0)
    drawn = [pool.draw(50, exclude, rng) for _ in range(60)]
    assert all(len(set(names)) == 50 for names in drawn)
    flat = [name for names in drawn for name in names]
    assert not exclude & set(flat)
    share = sum(name.startswith("often") for name in flat) / len(flat)
    assert 0.55 < share < 0.65  # 3 * 5,000 of 25,000
    few = Pool(("certain", *pool.names), np.concatenate([[1.0], np.zeros(20_000)]))
    assert few.draw(1, set(), rng) == ["certain"]


def test_a_pool_gives_what_it_has() -> None:
    pool = Pool.of([Category(id=i, name=f"n{i}") for i in range(4)])
    rng = np.random.default_rng(0)
    assert sorted(pool.draw(9, {"n1"}, rng)) == ["n0", "n2", "n3"]
    assert pool.draw(2, {"n0", "n1", "n2", "n3"}, rng) == []
    assert Pool.of([]).draw(3, set(), rng) == []
    never = Pool.of([Category(id=0, name="never", frequency=0.0)])
    assert never.draw(1, set(), rng) == ["never"], "without data a frequency of 0 is only small"


def test_names_in_the_picture_without_boxes_are_no_pseudo_negatives() -> None:
    pool = Pool.of([Category(id=i, name=name) for i, name in enumerate(NAMES)])
    made = make(
        [("n0",)],
        (),
        pool,
        excluded=NAMES[1:8],
        max_queries=12,
        min_queries=12,
        rng=np.random.default_rng(0),
    )
    assert set(made.names) == {"n0", *NAMES[8:]}


def test_names_are_compared_in_lower_case() -> None:
    """As the text tower sees them: "Dog" of one source is no negative of another's "dog"."""
    record = Record(
        image=np.zeros((4, 4, 3), np.uint8),
        image_id=0,
        boxes_xyxy=np.zeros((1, 4), np.float32),
        names=(("Dog", "dog"),),
        is_crowd=np.zeros(1, bool),
        scores=np.ones(1, np.float32),
        negatives=("Cat",),
        not_exhaustive=("Hot Dog",),
    ).lowered()
    assert (record.names, record.negatives) == ((("dog",),), ("cat",))
    assert record.not_exhaustive == ("hot dog",)
    tree = {"kind": "shapes_world", "num_images": 4, "image_size": 32}
    opened = TrainInput(tiny.config(data__train={"a": tree}))
    assert all(name == name.lower() for name in opened.pool.names)
