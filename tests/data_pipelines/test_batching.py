"""Packing: fixed shapes, what is left out is counted, tables that give every query back."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import batching
from data_pipelines.batch_spec import COUNTS
from data_pipelines.features import Category, Example
from data_pipelines.query_sets import Pool
from data_pipelines.tokenizer import ClipTokenizer

TOKENIZER = ClipTokenizer(8)
POOL = Pool.of([Category(id=i, name=name) for i, name in enumerate(("cat", "dog", "cow", "hen"))])
PACKING = batching.Packing(
    max_instances=3, max_queries=5, min_queries=0, max_tiles=4, num_positions=8
)


def _example(names: list[tuple[str, ...]], **changes: Any) -> Example:
    m = len(names)
    example = Example(
        image=np.zeros((8, 8, 3), np.uint8),
        image_id=7,
        original_size=(8, 6),
        boxes_cxcywh=np.arange(1, m + 1, dtype=np.float32)[:, None] * np.full((1, 4), 0.1, "f4"),
        names=tuple(names),
        is_crowd=np.zeros(m, bool),
        scores=np.linspace(0.5, 1, m, dtype=np.float32),
        negatives=(),
        excluded=(),
        tile_boxes_cxcywh=np.full((1, 4), 0.5, np.float32),
        tile_of_instance=np.zeros(m, np.int32),
        tile_image_id=np.array([7], np.int32),
        counts={"tiny_boxes": 2},
    )
    return dataclasses.replace(example, **changes)


def _pack(
    example: Example,
    packing: batching.Packing = PACKING,
    rng: np.random.Generator | None = None,
    **changes: Any,
) -> dict[str, Any]:
    packing = dataclasses.replace(packing, **changes)
    rng = rng or np.random.default_rng(0)
    return batching.pack_example(example, POOL, TOKENIZER, packing, rng)


def _count(packed: dict[str, Any], name: str) -> int:
    return int(packed["counts"][COUNTS.index(name)])


def test_fixed_shapes_and_padding() -> None:
    packed = _pack(_example([("cat",), ("dog", "cat")], negatives=("hen",)))
    assert packed["boxes"].shape == (3, 4) and packed["query_tokens"].shape == (5, 8)
    assert packed["is_instance"].tolist() == [True, True, False]
    assert packed["is_query"].tolist() == [True, True, True, False, False]
    assert packed["tile_image_id"].tolist() == [7, -1, -1, -1]
    np.testing.assert_array_equal(
        packed["query_tokens"][:3], TOKENIZER.encode_all(["cat", "dog", "hen"])
    )
    assert packed["instance_labels"][:2, :3].tolist() == [[True, False, False], [True, True, False]]
    assert not packed["instance_labels"][:, 3:].any() and not packed["instance_labels"][2].any()
    assert _count(packed, "tiny_boxes") == 2 and _count(packed, "dropped_instances") == 0


def test_names_of_the_same_tokens_are_one_query() -> None:
    """Eight positions hold six words: what follows does not count. Case never does."""
    long = "a b c d e f"
    example = _example([("cat",), (f"{long} g",), ("dog",)], negatives=("CAT", f"{long} h", "hen"))
    packed = _pack(example)
    texts = ["cat", f"{long} g", "dog", "hen"]
    np.testing.assert_array_equal(packed["query_tokens"][:4], TOKENIZER.encode_all(texts))
    assert packed["is_query"].tolist() == [True] * 4 + [False]
    np.testing.assert_array_equal(packed["instance_labels"][:, :4], np.eye(3, 4, dtype=bool))


def test_an_empty_image_packs() -> None:
    packed = _pack(_example([]))
    assert not packed["is_instance"].any() and not packed["is_query"].any()


def test_instances_that_do_not_fit_are_counted_and_chosen_at_random() -> None:
    example = _example([("cat",)] * 7)
    kept = [_pack(example, rng=np.random.default_rng(s))["boxes"][:, 0] for s in range(20)]
    assert all(_count(_pack(example), "dropped_instances") == 4 for _ in kept)
    assert len({tuple(rows) for rows in kept}) > 5
    assert {round(float(x) * 10) for rows in kept for x in rows} == set(range(1, 8))


def test_crowds_are_kept_apart_from_instances() -> None:
    packed = _pack(_example([("cat",), ("dog",)], is_crowd=np.array([False, True])))
    assert packed["is_instance"].tolist() == [True, False, False]
    assert packed["is_crowd"].tolist() == [False, True, False]
    assert packed["instance_labels"][1].any()


def test_an_instance_without_a_query_is_not_supervised() -> None:
    few = dataclasses.replace(PACKING, max_queries=1)
    packed = _pack(_example([("cat",), ("dog",)]), few)
    assert packed["is_instance"].tolist() == [True, False, False]
    assert _count(packed, "dropped_queries") == 1 and _count(packed, "dropped_instances") == 1


def test_cut_texts_are_counted() -> None:
    example = _example([("one two three four five six seven",), ("cat",)])
    assert _count(_pack(example), "cut_texts") == 1


def test_shuffled_labels_are_a_permutation() -> None:
    example = _example([("cat",), ("dog", "cow"), ("hen",)], negatives=("fox",))
    plain = _pack(example)["instance_labels"]
    seen = set()
    for seed in range(8):
        packed = _pack(example, shuffle_labels=True, rng=np.random.default_rng(seed))
        labels = packed["instance_labels"]
        assert sorted(map(tuple, labels.T)) == sorted(map(tuple, plain.T))
        np.testing.assert_array_equal(packed["query_tokens"], _pack(example)["query_tokens"])
        seen.add(labels.tobytes())
    assert len(seen) > 3


WORDS = ("cat", "dog", "cow", "hen", "fox", "owl")
ENCODED = TOKENIZER.encode_all(list(WORDS))


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(
        st.lists(st.sampled_from(WORDS), unique=True, max_size=5), min_size=4, max_size=4
    ),
    num_shards=st.sampled_from([1, 2, 4]),
    limit=st.sampled_from([0, 1, 3, 6]),
)
def test_tables_give_back_what_they_hold(
    asked: list[list[str]], num_shards: int, limit: int
) -> None:
    # Every image has its first name as positive, the others as negatives.
    packed = [
        _pack(_example([(names[0],)] if names else [], negatives=tuple(names[1:])))
        for names in asked
    ]
    batch = batching.stack(packed)
    out = batching.finish_batch(batch, num_shards, limit)
    per_shard = 4 // num_shards
    tables = out["query_table"].reshape(num_shards, -1, 8)
    assert tables.shape[1] == (limit or per_shard * 5)
    for image in range(4):
        table = tables[image // per_shard]
        for query in np.flatnonzero(out["is_query"][image]):
            row = out["query_index"][image, query]
            np.testing.assert_array_equal(table[row], batch["query_tokens"][image, query])
    dropped = batch["is_query"] & ~out["is_query"]
    assert not (out["is_query"] & ~batch["is_query"]).any()
    column = COUNTS.index("dropped_queries")
    np.testing.assert_array_equal(out["counts"][:, column], dropped.sum(1))
    for shard in range(num_shards):
        part = slice(shard * per_shard, (shard + 1) * per_shard)
        distinct = {name for names in asked[part] for name in names}
        room = limit or len(distinct)
        used = {row.tobytes() for row in tables[shard] if row.any()}
        assert len(used) == min(len(distinct), room)
        assert bool(dropped[part].any()) == (len(distinct) > room)
        positives = {names[0] for names in asked[part] if names}
        if len(positives) <= room:
            assert out["is_instance"][part].sum() == sum(bool(names) for names in asked[part])
    lost = batch["is_instance"].sum(1) - out["is_instance"].sum(1)
    column = COUNTS.index("dropped_instances")
    np.testing.assert_array_equal(out["counts"][:, column], lost)
    # An instance is asked for exactly where one of its queries is.
    has_query = (out["instance_labels"] & out["is_query"][:, None]).any(-1)
    np.testing.assert_array_equal(out["is_instance"], batch["is_instance"] & has_query)


def test_the_tables_of_four_shards_hold_the_queries_of_one() -> None:
    batch = batching.stack(
        [_pack(_example([("cat",)], negatives=(WORDS[i], "fox"))) for i in range(4)]
    )
    one, four = (batching.finish_batch(batch, shards, 0) for shards in (1, 4))
    for image in range(4):
        table = four["query_table"].reshape(4, -1, 8)[image]
        is_query = one["is_query"][image]
        np.testing.assert_array_equal(is_query, four["is_query"][image])
        np.testing.assert_array_equal(
            one["query_table"][one["query_index"][image]][is_query],
            table[four["query_index"][image]][is_query],
        )


def test_images_lose_alike_where_the_table_is_full() -> None:
    """Positives of all first; then the first negative of each, then the second."""
    names = [("cat", "dog", "cow"), ("hen", "fox", "owl"), ("bird", "fish", "horse")]
    packed = [_pack(_example([(own,)], negatives=tuple(others))) for own, *others in names]
    out = batching.finish_batch(batching.stack(packed), 1, 6)
    assert out["is_query"].sum(1).tolist() == [2, 2, 2]
    assert out["is_instance"].sum(1).tolist() == [1, 1, 1]
    out = batching.finish_batch(batching.stack(packed), 1, 4)
    assert out["is_query"].sum(1).tolist() == [2, 1, 1]


NAMED = dataclasses.replace(PACKING, with_names=True)


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(
        st.lists(st.sampled_from(WORDS), unique=True, max_size=4), min_size=4, max_size=4
    ),
    excluded=st.lists(st.sampled_from(WORDS), unique=True, max_size=2),
    num_shards=st.sampled_from([1, 2]),
    limit=st.sampled_from([0, 2, 4]),
)
def test_batch_negatives_are_asked_of_others_and_never_present(
    asked: list[list[str]], excluded: list[str], num_shards: int, limit: int
) -> None:
    """Image 0 also shows the excluded names; every image has its first name as positive."""
    packed = [
        _pack(
            _example(
                [(names[0],)] if names else [],
                negatives=tuple(names[1:]),
                excluded=tuple(excluded) if image == 0 else (),
            ),
            NAMED,
        )
        for image, names in enumerate(asked)
    ]
    stacked = batching.stack(packed)
    before = batching.finish_batch(stacked, num_shards, limit)
    rngs = [np.random.default_rng(i) for i in range(4)]
    after = batching.finish_batch(stacked, num_shards, limit, rngs)
    assert "query_names" not in after
    np.testing.assert_array_equal(after["query_table"], before["query_table"])
    np.testing.assert_array_equal(after["instance_labels"], before["instance_labels"])
    kept = before["is_query"]
    assert after["is_query"][kept].all()
    np.testing.assert_array_equal(after["query_index"][kept], before["query_index"][kept])
    per_shard = 4 // num_shards
    tables = before["query_table"].reshape(num_shards, -1, 8)
    word_of = {tokens.tobytes(): word for word, tokens in zip(WORDS, ENCODED, strict=True)}

    def words(batch: dict[str, Any], image: int) -> list[str]:
        rows = batch["query_index"][image][batch["is_query"][image]]
        return [word_of[tables[image // per_shard][row].tobytes()] for row in rows]

    for image in range(4):
        shard = image // per_shard * per_shard
        of_shard = {w for i in range(shard, shard + per_shard) for w in words(before, i)}
        never = {*asked[image], *(excluded if image == 0 else [])}
        now = words(after, image)
        new = [word for word in now if word not in words(before, image)]
        assert len(set(now)) == len(now), "asked twice"
        assert set(new) <= of_shard - never
        if not limit:  # nothing was masked out: all that fit are there
            slots = 5 - len(asked[image])
            assert len(new) == min(slots, len(of_shard - never))


def test_a_masked_positive_keeps_its_slot_to_itself() -> None:
    """Its labels are still there: another name in its place would be learnt as a positive."""
    first = _pack(_example([("cat",), ("dog",)]), NAMED)
    second = _pack(_example([("hen",)]), NAMED)
    stacked = batching.stack([first, second])
    before = batching.finish_batch(stacked, 1, 1)
    assert before["is_query"].tolist() == [[True] + 4 * [False], 5 * [False]]
    after = batching.finish_batch(stacked, 1, 1, [np.random.default_rng(0)] * 2)
    assert after["is_query"].tolist() == [[True] + 4 * [False], [False, True] + 3 * [False]]
    labels = after["instance_labels"].any(axis=1)
    assert not (after["is_query"] & labels & ~before["is_query"]).any()


def test_batch_negatives_depend_on_the_generator_of_the_image_alone() -> None:
    packed = [
        _pack(_example([(WORDS[i],)], negatives=(WORDS[i + 1], WORDS[i + 2])), NAMED)
        for i in range(4)
    ]
    stacked = batching.stack(packed)

    def drawn(seeds: tuple[int, ...]) -> np.ndarray:
        rngs = [np.random.default_rng(seed) for seed in seeds]
        return batching.finish_batch(stacked, 1, 0, rngs)["query_index"]

    first = drawn((0, 1, 2, 3))
    np.testing.assert_array_equal(first, drawn((0, 1, 2, 3)))
    others = [drawn((seed, 1, 2, 3)) for seed in range(10, 15)]
    assert all((first[1:] == other[1:]).all() for other in others)
    assert any((first[0] != other[0]).any() for other in others)


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_stacking_adds_one_axis(shape: tuple[int, ...]) -> None:
    stacked = batching.stack([{"x": np.full(shape, i)} for i in range(3)])
    assert stacked["x"].shape == (3, *shape)
