"""Zero-shot classification, retrieval and region accuracy of towers, against plain loops."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from data_pipelines.features import Category, Record
from data_pipelines.open_source import open_source
from owl_det import sharding
from owl_det.config import Config, EvaluationConfig, ShapesWorldSource
from owl_det.errors import DataError
from owl_det.evaluation import image_text
from owl_det.evaluation.image_text import ImageTextEvaluator
from owl_det.evaluation.loader import Loader
from owl_det.evaluation.regions import NameAccuracy, RegionAccuracy
from owl_det.modeling import build
from owl_det.scoring import unit_length
from tests import tiny


@pytest.fixture(scope="module")
def config() -> Config:
    return tiny.config(
        task="contrastive",
        model__contrastive="softmax",
        model__image__pooling="mean",
        data__with_captions=True,
        optimizer__clip={"scope": "global"},
    )


@pytest.fixture(scope="module")
def params(config: Config) -> Any:
    return jax.jit(lambda: build.init_params(config, jax.random.key(3)))()


@pytest.fixture(scope="module")
def mesh(config: Config) -> Mesh:
    """One device: what several compute is the loader's affair, and compiles longer."""
    return sharding.make_mesh(config.mesh, jax.devices()[:1])


def test_retrieval_ranks_by_hand() -> None:
    """Two images share text 0; image 2's own text is third best, the one of image 3 second."""
    images = np.eye(4, dtype=np.float32)
    texts = np.array([[0.9, 0.8, 0.5, 0.0], [0.0, 0.0, 0.4, 0.7], [0.0, 0.1, 0.6, 0.6]], np.float32)
    truth = np.array([0, 0, 1, 2], np.int32)
    values = image_text.retrieval(images, texts, truth)
    assert values["image_to_text_r1"] == 0.5  # images 0 and 1
    assert values["image_to_text_r5"] == 1.0
    # Text 0's best is its own image 0; text 1 prefers image 3; text 2 likes images 2 and 3 equally,
    # and a tie is no hit.
    assert values["text_to_image_r1"] == pytest.approx(1 / 3)
    assert values["text_to_image_r5"] == 1.0


@pytest.mark.parametrize("value", [0.1, np.nan])
def test_collapsed_towers_retrieve_nothing(value: float) -> None:
    same = np.full((100, 4), value, np.float32)
    values = image_text.retrieval(same, same, np.arange(100))
    assert set(values.values()) == {0.0}


def test_name_accuracy_averages_over_names_of_a_group() -> None:
    categories = [
        Category(id=1, name="a", groups=("base",)),
        Category(id=2, name="b", groups=("base",)),
        Category(id=3, name="c", groups=("novel",)),
    ]
    accuracy = NameAccuracy(categories, np.eye(3)[None], "zero_shot", top=(1, 2))
    likes_a = np.array([[0.9, 0.5, 0.1]])
    accuracy.add_named(np.repeat(likes_a, 4, 0), ["a", "a", "a", "b"])
    assert accuracy.scalars() == {
        "zero_shot_top1": 0.5,
        "zero_shot_top2": 1.0,
        "zero_shot_top1_base": 0.5,
        "zero_shot_top2_base": 1.0,
    }
    with pytest.raises(KeyError):
        accuracy.add_named(likes_a, ["unknown"])


def _record(boxes: list[list[float]], names: list[tuple[str, ...]], crowd: list[bool]) -> Record:
    return Record(
        image=np.zeros((32, 32, 3), np.uint8),
        image_id=0,
        boxes_xyxy=np.array(boxes, np.float32).reshape(-1, 4),
        names=tuple(names),
        is_crowd=np.array(crowd, bool),
        scores=np.ones(len(boxes), np.float32),
    )


def test_region_accuracy_leaves_crowds_and_several_names_out() -> None:
    """A 4 x 4 grid whose left half says "left" and whose right half says "right"."""
    categories = [Category(id=1, name="left"), Category(id=2, name="right")]
    regions = RegionAccuracy(categories, np.eye(2)[None])
    grid = np.zeros((4, 4, 2), np.float32)
    grid[:, :2, 0] = grid[:, 2:, 1] = 1
    left, right = [0, 0, 16, 32], [16, 8, 32, 24]
    record = _record(
        [left, right, right, left],
        [("left",), ("right",), ("left",), ("left", "right")],
        [False, False, True, False],
    )
    regions.add(grid.reshape(1, 16, 2), [record], "pad")
    assert regions.scalars()["region_top1"] == 1.0
    wrong = _record([left], [("right",)], [False])
    regions.add(np.stack([grid.reshape(16, 2)] * 2), [wrong, None], "pad")
    values = regions.scalars()
    assert values["region_top1"] == pytest.approx((1 + 1 / 2) / 2)
    # Of tokens that say the same, the first answers: the right half's lies above its box, the left
    # half's in its own. The second image has no "right" where its label says.
    assert values["pointing"] == pytest.approx((1 / 1 + 0 / 2) / 2)
    assert values["pointing_chance"] == pytest.approx((8 / 16 + (4 / 16 + 8 / 16) / 2) / 2)


def test_towers_against_a_loop(config: Config, params: Any, mesh: Mesh) -> None:
    entry = ShapesWorldSource(split="image_text_test", image_size=32, num_images=11)
    data = open_source(entry, "")
    settings = EvaluationConfig(batch_size=4)
    detector: Any = build.make_detector(config)
    measure = ImageTextEvaluator(detector, data, mesh, "x", settings=settings, eval_prompts="none")
    values = measure(params).scalars()

    tokens = measure._encoder.tokenizer.encode_all([c.name for c in data.categories])
    pixels = np.stack([np.asarray(data[i].image) for i in range(11)])
    images, texts = jax.jit(
        lambda params, pixels, tokens: (
            detector.apply({"params": params}, pixels, method="embed_image"),
            detector.apply({"params": params}, tokens, method="encode_text"),
        )
    )(params, pixels, tokens)
    best = np.argmax(np.asarray(unit_length(images) @ unit_length(texts).T), axis=1)
    right: dict[str, list[bool]] = {}
    for i in range(11):
        (name,) = {n for names in data[i].names for n in names}
        right.setdefault(name, []).append(data.categories[best[i]].name == name)
    expected = np.mean([np.mean(answers) for answers in right.values()])
    assert values["zero_shot_top1"] == pytest.approx(expected)
    assert 0 <= values["image_to_text_r1"] <= values["image_to_text_r10"] <= 1
    assert "region_top1" in values and measure.loader.num_unreadable == 0


class _Pairs:
    """Captions without names, as `readers.image_text_reader` has them."""

    name, version, categories = "pairs", "1", ()

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Record:
        pixels = np.full((32, 32, 3), 80 * index, np.uint8)
        return dataclasses.replace(_record([], [], []), image=pixels, captions=(f"text {index}",))


def test_pairs_without_names_give_retrieval_alone(config: Config, params: Any, mesh: Mesh) -> None:
    measure = ImageTextEvaluator(
        build.make_detector(config),
        _Pairs(),  # pyright: ignore[reportArgumentType]
        mesh,
        "x",
        settings=EvaluationConfig(batch_size=8),
        eval_prompts="clip_best7",
    )
    values = measure(params).scalars()
    directions = ("image_to_text", "text_to_image")
    ranks = {f"{name}_r{k}" for name in directions for k in (1, 5, 10)}
    assert values.keys() == {*ranks, "cut_captions"}
    assert values["image_to_text_r5"] == values["text_to_image_r5"] == 1.0


class _Broken:
    """A source whose every second image is no image."""

    name, version, categories = "broken", "1", ()

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Record:
        record = _record([], [], [])
        return record if index % 2 else Record(**{**vars(record), "image": b"nothing"})


def test_loader_counts_what_it_cannot_read(config: Config) -> None:
    loader = Loader(
        _Broken(),  # pyright: ignore[reportArgumentType]
        sharding.make_mesh(config.mesh),
        image_size=32,
        preprocess=config.preprocess,
        batch_size=4,
    )
    seen = []
    with pytest.raises(DataError, match="broken: 3 of 6 images cannot be read"):
        for loaded in loader.batches("test"):
            seen += loaded.is_readable[: len(loaded.indices)].tolist()
    assert seen == [False, True] * 3
