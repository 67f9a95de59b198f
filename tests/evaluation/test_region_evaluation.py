"""Region classification and category recall: by hand on images whose tokens are known, and the
commands."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from data_pipelines.features import Category, Record
from data_pipelines.named_regions import NamedRegions
from owl_det import cli, sharding
from owl_det.checkpoints.image_size import resized
from owl_det.checkpoints.load import parameter_shapes, save_model
from owl_det.config import MeshConfig, ResNetConfig
from owl_det.errors import CheckpointError, DataError, UserError
from owl_det.evaluation import region_evaluation
from owl_det.evaluation.region_evaluation import CategoryRecall, RegionDataLocation, RegionEvaluator
from owl_det.inference import dense_features
from owl_det.inference.dense_features import Embedded, EmbeddingFunctions
from owl_det.types import LoadedModel
from tests import tiny

NAMES = ("cat", "dog", "bird", "grass", "sky", "sea")
TABLE = np.eye(len(NAMES), 16, dtype=np.float32)


class _Painted:
    """Images of 4 x 4 blocks; a block's brightness says whose embedding its token will have."""

    name, version = "painted", "painted-1"
    categories = tuple(
        Category(id=i, name=name, groups=("thing",) if i < 3 else ("stuff",))
        for i, name in enumerate(NAMES)
    )

    def __init__(self, blocks: list[np.ndarray], regions: list[NamedRegions]) -> None:
        self.blocks, self._regions = blocks, regions

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Record:
        pixels = np.kron(self.blocks[index], np.ones((8, 8), int)).astype(np.uint8)
        return Record(
            image=np.repeat(pixels[..., None], 3, axis=-1),
            image_id=index,
            boxes_xyxy=np.zeros((0, 4), np.float32),
            names=(),
            is_crowd=np.zeros(0, bool),
            scores=np.zeros(0, np.float32),
        )

    def regions(self, index: int) -> NamedRegions:
        return self._regions[index]


def _painted() -> _Painted:
    """Image 0: cat, dog, grass, all as painted. Image 1: a dog painted as a bird; sky as sea."""
    first = np.full((4, 4), 3)
    first[1:3, 1:3] = 0
    first[0, 3] = 1
    second = np.full((4, 4), 5)
    second[2:, :2] = 2
    segments = [np.kron(blocks, np.ones((8, 8), int)) for blocks in (first, second)]
    regions = [
        NamedRegions(
            size=(32, 32),
            boxes_xyxy=np.array([[8, 8, 24, 24], [24, 0, 32, 8], [0, 0, 32, 32]], np.float32),
            names=("cat", "dog", "grass"),
            is_thing=np.array([True, True, False]),
            segments=np.choose(segments[0], [0, 1, -1, 2]).astype(np.int32),
            present=("cat", "dog", "grass"),
        ),
        NamedRegions(
            size=(32, 32),
            boxes_xyxy=np.array([[0, 16, 16, 32], [0, 0, 32, 32]], np.float32),
            names=("dog", "sky"),
            is_thing=np.array([True, False]),
            segments=np.where(segments[1] == 2, 0, 1).astype(np.int32),
            present=("dog", "sky"),
        ),
    ]
    return _Painted([first, second], regions)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    """Towers with all contrastive parameters."""
    return tiny.loaded(kind="towers", step=3, model__contrastive="softmax")


def _known(has_tokens: bool = True, has_whole: bool = True) -> EmbeddingFunctions:
    def embed(params: Any, image: jax.Array) -> Embedded:
        tokens = jnp.asarray(TABLE)[image[:, 4::8, 4::8, 0].reshape(image.shape[0], 16)]
        # An image is most like what fills it most, then like its other names in their order.
        whole = tokens.mean(1) - 0.001 * jnp.arange(16)[None]
        return Embedded(3 * tokens if has_tokens else None, whole if has_whole else None)

    def embed_prompts(params: Any, tokens: jax.Array) -> jax.Array:
        return jnp.asarray(TABLE)[None, : tokens.shape[1]] * 5

    return EmbeddingFunctions(embed_prompts, embed)


def _evaluate(
    model: LoadedModel, functions: EmbeddingFunctions, batch_size: int = 2
) -> dict[str, Any]:
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    evaluator = RegionEvaluator(
        model,
        _painted(),
        mesh,
        eval_prompts="none",
        batch_size=batch_size,
        functions=functions,
    )
    return evaluator({})


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_accuracies_by_hand(model: LoadedModel, batch_size: int) -> None:
    found = _evaluate(model, _known(), batch_size)
    # Boxes: one cat of one; one dog of two. Stuff: grass right, sky taken for the sea.
    assert found["boxes_top1"] == found["thing_masks_top1"] == pytest.approx((1 + 1 / 2) / 2)
    assert found["stuff_masks_top1"] == pytest.approx(1 / 2)
    assert (found["num_boxes"], found["num_thing_masks"], found["num_stuff_masks"]) == (3, 3, 2)
    assert found["num_images"] == 2 and found["unreadable_images"] == 0
    assert not any(key.endswith(("_thing", "_stuff")) for key in found)


def test_recall_by_hand(model: LoadedModel) -> None:
    """Image 0: grass, cat, dog are its nearest. Image 1: sea, bird, cat (of the tie), then dog."""
    found = _evaluate(model, _known(has_tokens=False))
    assert found["recall_at_1"] == pytest.approx((1 / 3 + 0) / 2)
    assert found["recall_at_3"] == pytest.approx((1 + 0) / 2)
    assert found["recall_at_5"] == pytest.approx((1 + 1 / 2) / 2)
    assert "recall_at_10" not in found and "boxes_top1" not in found


def test_what_a_model_lacks_is_left_out(model: LoadedModel) -> None:
    found = _evaluate(model, _known(has_whole=False))
    assert "boxes_top1" in found and not any(key.startswith("recall") for key in found)
    text = region_evaluation.table({**found, "num_names": 6, "image_size": 32, "seconds": 0.1})
    assert "boxes        75.00  75.00        3" in text and "RC@" not in text


def test_no_number_is_no_right_answer(model: LoadedModel) -> None:
    def embed(params: Any, image: jax.Array) -> Embedded:
        b = image.shape[0]
        return Embedded(jnp.full((b, 16, 16), jnp.nan), jnp.full((b, 16), jnp.nan))

    found = _evaluate(model, EmbeddingFunctions(_known().embed_prompts, embed))
    assert found["boxes_top5"] == found["stuff_masks_top5"] == found["recall_at_5"] == 0


def test_a_tie_counts_against_the_name() -> None:
    recall = CategoryRecall(np.ones((4, 2), np.float32), ["a", "b", "c", "d"])
    recall.add(np.ones(2), ["a"])
    recall.add(np.ones(2), [])
    assert recall.scalars() == {"recall_at_1": 0.0, "recall_at_3": 0.0}


def test_every_kind_of_model_has_functions(model: LoadedModel) -> None:
    config = tiny.config()
    image = jnp.zeros((2, 32, 32, 3), jnp.uint8)

    def shapes(model: LoadedModel) -> Embedded:
        template = parameter_shapes(model)
        functions = dense_features.embedding_functions(model)
        texts = jax.eval_shape(functions.embed_prompts, template, jnp.zeros((2, 5, 8), jnp.int32))
        assert texts.shape == (2, 5, 16)
        return jax.eval_shape(functions.embed_image, template, image)

    towers = shapes(model)
    assert towers.tokens.shape == (2, 16, 16) and towers.whole.shape == (2, 16)
    mapped = dataclasses.replace(model.config.image, pooling="map", pre_norm=False)
    mapped = dataclasses.replace(model.config, image=mapped)
    attention = shapes(dataclasses.replace(model, config=mapped))
    assert attention.tokens is None and attention.whole.shape == (2, 16)
    detector = shapes(dataclasses.replace(model, kind="detector", config=config.model))
    assert detector.tokens.shape == (2, 16, 16) and detector.whole is None
    resnet = ResNetConfig(width=8, num_blocks=(1, 1, 1, 1), num_heads=4)
    small = dataclasses.replace(config.model, image=resnet)
    clip = shapes(dataclasses.replace(model, config=small))
    assert clip.tokens.shape == (2, 1, 16) and clip.whole.shape == (2, 16)


def test_dense_and_whole_are_those_of_the_detector(model: LoadedModel) -> None:
    from owl_det.modeling.owl import OwlDetector

    detector = OwlDetector(model.config, model.preprocess)
    image = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)), jnp.uint8)
    functions = dense_features.embedding_functions(model)

    def both(params: Any) -> Any:
        apply = partial(detector.apply, {"params": params}, image)
        return (
            functions.embed_image(params, image),
            apply(method="embed_patches"),
            apply(method="embed_image"),
        )

    found, tokens, whole = jax.jit(both)(model.params)
    np.testing.assert_allclose(found.tokens, tokens, atol=1e-5)
    np.testing.assert_allclose(found.whole, whole, atol=1e-5)


@pytest.fixture(scope="module")
def saved(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "checkpoint"
    save_model(path, model)
    return path


def test_the_command(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "regions.json"
    flags = ["--dataset", "shapes_world", "--max_images", "10", "--out", str(out)]
    assert cli.main(["evaluate-regions", "--checkpoint", str(saved), *flags]) == 0
    content = json.loads(out.read_text())
    assert content["kind"] == "towers" and content["num_names"] == 125
    assert content["num_images"] == 10 and content["num_stuff_masks"] > 10
    wanted = {f"{kind}_top{k}" for kind in ("boxes", "thing_masks", "stuff_masks") for k in (1, 5)}
    assert wanted | {"recall_at_1", "recall_at_100", "boxes_top1_novel"} <= set(content)
    assert all(0 <= value <= 1 for key, value in content.items() if "_top" in key)
    printed = capsys.readouterr().out
    assert "stuff masks" in printed and "RC@100" in printed


def test_the_size_of_images_may_be_another(model: LoadedModel) -> None:
    larger = resized(model, 64)
    assert larger.config.image_size == 64
    positions = larger.params["image"]["position_embedding"]
    assert positions.shape == (1 + 64, 32)
    before = np.asarray(model.params["image"]["position_embedding"])
    np.testing.assert_array_equal(positions[0], before[0])
    # Twice the grid, linearly: the corner keeps its value.
    np.testing.assert_allclose(positions[1], before[1], atol=1e-6)
    assert resized(model, 32) is model
    with pytest.raises(CheckpointError, match="not a multiple of the patch size 8"):
        resized(model, 36)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        (RegionDataLocation(kind="lvis", images="x"), "--annotations: --dataset lvis needs it"),
        (
            RegionDataLocation(kind="coco_panoptic", annotations="x"),
            "--images: --dataset coco_panoptic",
        ),
        (
            RegionDataLocation(kind="shapes_world", images="x"),
            "--images: --dataset shapes_world has none",
        ),
        (
            RegionDataLocation(kind="lvis", annotations="x", images="y", segments="z"),
            "--segments: is for",
        ),
        (
            RegionDataLocation(kind="shapes_world", split="tset"),
            "--split: tset is not one of train",
        ),
        (
            RegionDataLocation(kind="coco_panoptic", annotations="a/b.json", images="y"),
            "a/b: no such folder",
        ),
    ],
)
def test_flags_that_do_not_fit_are_named(location: RegionDataLocation, message: str) -> None:
    with pytest.raises(UserError, match=message):
        region_evaluation.open_region_source(location)


def test_nothing_is_measured_without_a_usable_box(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 16, "height": 16}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 0, 5]}],
    }
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(content))
    location = RegionDataLocation(kind="coco", annotations=str(file), images=str(tmp_path))
    with pytest.raises(DataError, match="no usable box to measure against: .* 1 without area"):
        region_evaluation.open_region_source(location)


def test_clusters_are_shared_by_images_and_numbered_by_size() -> None:
    rng = np.random.default_rng(0)
    centres = np.eye(3, 8, dtype=np.float32)
    kinds = [np.repeat([0, 1, 2], [20, 10, 6]).reshape(6, 6), np.repeat([0, 1], 8).reshape(4, 4)]
    grids = [
        centres[kind] + 0.01 * rng.standard_normal((*kind.shape, 8), np.float32) for kind in kinds
    ]
    found = dense_features.cluster(grids, 3)
    for labels, kind in zip(found, kinds, strict=True):
        np.testing.assert_array_equal(labels, kind)
    with pytest.raises(UserError, match="--num_clusters: from 1 to the 52 tokens"):
        dense_features.cluster(grids, 53)


def test_pictures_of_features(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for name, size in (("wide", (20, 50)), ("high", (50, 30))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    flags = ["--query", "red star", "--num_clusters", "3", "--out", str(tmp_path / "out")]
    command = ["visualize", "features", str(tmp_path), "--checkpoint", str(saved), *flags]
    assert cli.main(command) == 1  # one could not be read
    captured = capsys.readouterr()
    assert "skipped" in captured.err and "1 of 3 images could not be read" in captured.err
    for name in ("wide", "high"):
        assert f"{name}.png" in captured.out
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert min(picture.size) > 300


def test_a_grid_covers_the_image_and_no_padding(model: LoadedModel) -> None:
    features = dense_features.DenseFeatures(model)
    image = Image.new("RGB", (100, 60))
    assert features.embed(image).shape == (3, 4, 16)  # 32 x 19 of 32 x 32 pixels, patches of 8
    assert features.extent(image) == pytest.approx((75, 100))
    np.testing.assert_allclose(np.linalg.norm(features.embed(image), axis=-1), 1, atol=1e-5)
    texts = features.encode(["cat", "dog"], "clip_best7")
    np.testing.assert_allclose(np.linalg.norm(texts, axis=-1), 1, atol=1e-5)
