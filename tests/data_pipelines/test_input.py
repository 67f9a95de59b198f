"""The stream of examples: pure in (seed, number), whole, and robust against bad images."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines import batching, query_sets, sampling
from data_pipelines import input as input_lib
from data_pipelines.batch_spec import COUNTS
from data_pipelines.features import Category
from data_pipelines.input import TrainInput
from owl_det.errors import DataError
from tests import tiny


def _take(data: TrainInput, count: int, first: int = 0, **kwargs: Any) -> list[Any]:
    batches = data.batches(first, **{"num_data_shards": 1, **kwargs})
    taken = list(islice(batches, count))
    batches.close()
    return taken


def _assert_same(ours: Any, theirs: Any) -> None:
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


def test_resuming_gives_the_same_batches() -> None:
    data = TrainInput(tiny.config())
    whole = _take(data, 5)
    for ours, theirs in zip(_take(TrainInput(tiny.config()), 2, first=3), whole[3:], strict=True):
        _assert_same(ours, theirs)
    assert not np.array_equal(whole[0]["image"], whole[1]["image"])


def test_engines_give_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = _take(TrainInput(tiny.config()), 3)
    monkeypatch.setattr(input_lib, "is_installed", lambda _: False)
    theirs = _take(TrainInput(tiny.config()), 3)
    for a, b in zip(ours, theirs, strict=True):
        _assert_same(a, b)


def test_two_processes_see_the_halves_of_one() -> None:
    whole = _take(TrainInput(tiny.config()), 2, num_data_shards=2)
    parts = [
        _take(TrainInput(tiny.config()), 2, num_data_shards=2, process=p, num_processes=2)
        for p in range(2)
    ]
    for step in range(2):
        for key, value in whole[step].items():
            joined = np.concatenate([parts[0][step][key], parts[1][step][key]])
            np.testing.assert_array_equal(joined, value, err_msg=key)


BATCH_NEGATIVES = {
    "data__batch_negatives": True,
    # A few annotated names of each image, so that there is room for those of others.
    "data__train": {
        "shapes": {
            "kind": "shapes_world",
            "image_size": 32,
            "num_images": 64,
            "annotated_fraction": 0.1,
        }
    },
}


def test_batch_negatives_are_the_same_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config(**BATCH_NEGATIVES)
    whole = _take(TrainInput(config), 3, num_data_shards=2)
    plain = _take(TrainInput(tiny.config(**{**BATCH_NEGATIVES, "data__batch_negatives": False})), 1)
    assert whole[0]["is_query"].sum() > plain[0]["is_query"].sum()
    assert "query_names" not in whole[0] and whole[0].keys() == plain[0].keys()
    (resumed,) = _take(TrainInput(config), 1, first=2, num_data_shards=2)
    _assert_same(resumed, whole[2])
    parts = [
        _take(TrainInput(config), 1, num_data_shards=2, process=p, num_processes=2)[0]
        for p in range(2)
    ]
    _assert_same({k: np.concatenate([p[k] for p in parts]) for k in parts[0]}, whole[0])
    monkeypatch.setattr(input_lib, "is_installed", lambda _: False)
    (threads,) = _take(TrainInput(config), 1, num_data_shards=2)
    _assert_same(threads, whole[0])


def test_batch_must_divide() -> None:
    with pytest.raises(DataError, match="config.batch_size: 8 does not divide over 3"):
        _take(TrainInput(tiny.config()), 1, num_data_shards=3)


def test_an_epoch_visits_every_image_once() -> None:
    mixture = sampling.Mixture([7], [1.0], seed=1)
    epochs = [[mixture.locate(e * 7 + i)[1] for i in range(7)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_mixture_weights() -> None:
    mixture = sampling.Mixture([10, 1000], [3.0, 1.0], seed=0)
    share = np.mean([mixture.locate(slot)[0] == 0 for slot in range(4000)])
    assert abs(share - 0.75) < 0.03


def _yolo_folder(root: Path, num_images: int, corrupt: tuple[int, ...]) -> None:
    (root / "images").mkdir()
    (root / "labels").mkdir()
    for i in range(num_images):
        path = root / "images" / f"{i:03d}.png"
        pixels = np.full((40, 30, 3), i % 256, np.uint8)
        Image.fromarray(pixels).save(path)
        if i in corrupt:
            path.write_bytes(path.read_bytes()[:40])
        (root / "labels" / f"{i:03d}.txt").write_text("0 0.5 0.5 0.4 0.4\n")


def _yolo_config(root: Path, **changes: Any) -> Any:
    source = {"kind": "yolo", "path": str(root), "names": ["thing"]}
    return tiny.config(data__train={"yolo": source}, data__path=str(root), **changes)


@pytest.mark.parametrize("sizes", [[1], [2]])
def test_corrupt_images_are_replaced_and_counted(tmp_path: Path, sizes: list[int]) -> None:
    _yolo_folder(tmp_path, 200, corrupt=(3, 77))
    config = _yolo_config(tmp_path, data__augment__mosaic_sizes=sizes)
    data = TrainInput(config)
    examples = [data.example(i) for i in range(200)]
    counts = np.array([example["counts"] for example in examples])
    total = counts[:, COUNTS.index("unreadable_images")].sum()
    assert total >= 2 and len(data.unreadable) == 2
    num_tiles = sizes[0] ** 2
    assert all((e["tile_image_id"][:num_tiles] >= 0).all() for e in examples)
    # Knowing the bad images beforehand changes nothing: the stream stays a pure function.
    for i in range(200):
        _assert_same(data.example(i), examples[i])


@pytest.mark.parametrize("has_tensorflow", [True, False])
def test_mosaics_of_jpeg_files_do_not_depend_on_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_tensorflow: bool
) -> None:
    """Files shrink while they are decoded, are cropped, and share threads; one is damaged."""
    monkeypatch.setattr(input_lib, "is_installed", lambda _: has_tensorflow)
    _yolo_folder(tmp_path, 12, corrupt=())
    rng = np.random.default_rng(0)
    for path in sorted((tmp_path / "images").glob("*.png")):
        pixels = rng.integers(0, 256, (160, 200, 3), np.uint8)
        Image.fromarray(pixels).save(path.with_suffix(".jpg"))
        path.unlink()
    damaged = tmp_path / "images" / "005.jpg"
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 3])
    changes = {
        "data__augment__mosaic_sizes": [2, 3],
        "data__augment__mosaic_probabilities": [0.5, 0.5],
        "data__augment__crop_probability": 0.5,
        "data__augment__tile_scale_min": 0.5,
    }
    alone, some, many = (
        _take(TrainInput(_yolo_config(tmp_path, data__num_workers=workers, **changes)), 2)
        for workers in (1, 3, 8)
    )
    for step in range(2):
        _assert_same(some[step], alone[step])
        _assert_same(many[step], alone[step])
    assert not np.array_equal(alone[0]["image"], alone[1]["image"])
    assert alone[0]["counts"][:, COUNTS.index("unreadable_images")].sum() > 0


def test_too_many_corrupt_images_are_an_error(tmp_path: Path) -> None:
    _yolo_folder(tmp_path, 100, corrupt=(1, 2, 3))
    with pytest.raises(DataError, match="2 of 100 images cannot be read, more than 1%"):
        _take(TrainInput(_yolo_config(tmp_path)), 26)


def test_query_sets() -> None:
    pool = query_sets.Pool.of([Category(id=i, name=f"n{i}") for i in range(50)])
    rng = np.random.default_rng(0)
    made = query_sets.make(
        [("n1",), ("n2", "n3"), ("n1",)],
        ("n4", "n5"),
        pool,
        max_queries=20,
        min_queries=12,
        rng=rng,
    )
    assert made.names[:5] == ("n1", "n2", "n3", "n4", "n5")
    assert len(made.names) == len(set(made.names)) == 12 and made.num_dropped == 0
    assert made.labels[:, :3].tolist() == [
        [True, False, False],
        [False, True, True],
        [True, False, False],
    ]
    assert not made.labels[:, 3:].any()
    few = query_sets.make(
        [("n1",), ("n2",), ("n3",)], ("n4",), pool, max_queries=2, min_queries=0, rng=rng
    )
    assert set(few.names) < {"n1", "n2", "n3"} and len(few.names) == 2 and few.num_dropped == 1
    assert few.labels.any(1).tolist() == [f"n{i}" in few.names for i in (1, 2, 3)]


@pytest.mark.parametrize("num_shards", [1, 4])
def test_query_tables_give_back_every_query(num_shards: int) -> None:
    config = tiny.config()
    data = TrainInput(config)
    packed = batching.stack([data.example(i) for i in range(8)])
    batch = batching.finish_batch(packed, num_shards, max_distinct=0)
    tables = batch["query_table"].reshape(num_shards, -1, config.model.text.num_positions)
    for image in range(8):
        table = tables[image // (8 // num_shards)]
        for query in np.flatnonzero(packed["is_query"][image]):
            np.testing.assert_array_equal(
                table[batch["query_index"][image, query]], packed["query_tokens"][image, query]
            )
    used = tables[0][tables[0].any(axis=1)]
    assert len(np.unique(used, axis=0)) == len(used), "a query stands twice in a table"


def test_a_full_query_table_drops_negatives_first_and_counts() -> None:
    data = TrainInput(tiny.config())
    packed = batching.stack([data.example(i) for i in range(8)])
    batch = batching.finish_batch(packed, 1, max_distinct=24)
    dropped = batch["counts"][:, COUNTS.index("dropped_queries")].sum()
    assert dropped == packed["is_query"].sum() - batch["is_query"].sum() > 0
    is_positive = packed["instance_labels"].any(axis=1)
    assert (batch["is_query"] | ~is_positive).all()


def test_shuffled_labels_keep_their_number() -> None:
    plain = tiny.arrays(tiny.config())
    shuffled = tiny.arrays(tiny.config(data__shuffle_labels=True))
    np.testing.assert_array_equal(plain["boxes"], shuffled["boxes"])
    np.testing.assert_array_equal(
        plain["instance_labels"].sum(-1), shuffled["instance_labels"].sum(-1)
    )
    assert not np.array_equal(plain["instance_labels"], shuffled["instance_labels"])
