"""The predictor and the command line around it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines import image_ops, transforms
from data_pipelines.features import Category, Record
from data_pipelines.input import TrainInput
from data_pipelines.readers.voc import VocReader
from data_pipelines.shapes_world import ShapesWorld
from owl_det import cli, sharding
from owl_det.checkpoints import identity
from owl_det.checkpoints.load import load_model, save_model
from owl_det.cli import images
from owl_det.config import EvaluationConfig, MeshConfig
from owl_det.errors import CheckpointError, DataError, UserError
from owl_det.evaluation.evaluate import DetectionEvaluator
from owl_det.inference import detections as detections_lib
from owl_det.inference import embedding_files, image_inputs, query_encoder
from owl_det.inference import predictor as predictor_lib
from owl_det.inference.embeddings import ImageEmbeddings, QueryEmbeddings
from owl_det.inference.predictor import Detections, Predictor
from owl_det.modeling import build
from owl_det.types import LoadedModel
from tests import tiny

SIZES = [(40, 40), (31, 77), (100, 13), (1, 50), (64, 65)]


@pytest.fixture(scope="module")
def predictor(tiny_model: LoadedModel) -> Predictor:
    """One for the tests below, so that its functions are compiled once."""
    return Predictor(tiny_model)


@pytest.fixture(scope="module")
def embedded(predictor: Predictor) -> ImageEmbeddings:
    return predictor.embed_images(_images(), [f"{i}.png" for i in range(len(SIZES))], batch_size=3)


def _images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


def test_boxes_lie_inside_images_of_any_size(predictor: Predictor) -> None:
    found = predictor.detect(_images(), ["red circle", "cat"], threshold=0.0, batch_size=3)
    assert len(found) == len(SIZES)
    assert len(found[0]) == 2 * 16  # a square: all tokens
    for (height, width), result in zip(SIZES, found, strict=True):
        assert len(result) <= 2 * 16
        assert (result.boxes >= 0).all()
        assert (result.boxes[:, 2:] > result.boxes[:, :2]).all()
        assert (result.boxes[:, [0, 2]] <= width).all() and (result.boxes[:, 1::2] <= height).all()
        assert set(result.labels.tolist()) <= {0, 1}
        assert (np.diff(result.scores) <= 0).all()


def test_batching_and_number_of_queries_change_nothing(predictor: Predictor) -> None:
    together = predictor.detect(_images(), ["red circle", "cat"], threshold=0.0)
    for image, result in zip(_images(), together, strict=True):
        (alone,) = predictor.detect([image], ["red circle"], threshold=0.0, batch_size=1)
        keep = result.labels == 0
        np.testing.assert_allclose(alone.boxes, result.boxes[keep], atol=1e-3)
        np.testing.assert_allclose(alone.scores, result.scores[keep], rtol=1e-4)


def test_prompts_are_averaged_as_probabilities(predictor: Predictor) -> None:
    image = _images()[:1]
    (ensemble,) = predictor.detect(image, ["cat"], threshold=0.0, prompt_mode="clip_best7")
    from data_pipelines.prompts import CLIP_BEST_7, apply_template

    texts = [apply_template(template, "cat") for template in CLIP_BEST_7]
    (single,) = predictor.detect(image, texts, threshold=0.0, prompt_mode="none")
    # The same box occurs once for each text; add up its scores.
    scores: dict[bytes, float] = {}
    for box, score in zip(single.boxes, single.scores, strict=True):
        key = np.round(box, 2).tobytes()
        scores[key] = scores.get(key, 0.0) + float(score) / len(texts)
    for box, score in zip(ensemble.boxes, ensemble.scores, strict=True):
        assert scores[np.round(box, 2).tobytes()] == pytest.approx(float(score), rel=1e-4)


def test_preprocessing_is_that_of_evaluation(predictor: Predictor, tiny_model: LoadedModel) -> None:
    for image in _images():
        record = Record(
            image=image,
            image_id=1,
            boxes_xyxy=np.zeros((0, 4), np.float32),
            names=(),
            is_crowd=np.zeros(0, bool),
            scores=np.zeros(0, np.float32),
        )
        example = transforms.eval_example(
            record, image_size=tiny_model.config.image_size, preprocess=tiny_model.preprocess
        )
        ours = predictor.preprocess(image_ops.decode_image(image))
        difference = np.abs(ours.astype(int) - example.image.astype(int))
        assert difference.max() <= 1


def _assert_detections_are_those_of_evaluation(tiny_model: LoadedModel, source: Any) -> None:
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    evaluate = DetectionEvaluator(
        build.make_detector(tiny.config()),
        source,
        mesh,
        "images",
        settings=EvaluationConfig(batch_size=2),
        eval_prompts="none",
    )
    expected = evaluate(tiny_model.params).evaluator.images
    found = Predictor(tiny_model).detect(
        [image_ops.decode_image(source[i].image) for i in range(len(source))],
        [category.name for category in source.categories],
        threshold=0.0,
    )
    ids = np.array([category.id for category in source.categories])
    assert len(expected) == len(source)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-5)
        np.testing.assert_allclose(ours.boxes, theirs.boxes_xyxy, atol=1e-3)
        assert (ids[ours.labels] == theirs.categories).mean() > 0.99  # ties may swap


def test_detections_are_those_of_evaluation(tiny_model: LoadedModel) -> None:
    source = ShapesWorld(split="test", image_size=50, num_images=3)
    _assert_detections_are_those_of_evaluation(tiny_model, source)


def test_detections_in_photographs_are_those_of_evaluation(
    tiny_model: LoadedModel, shared_data: Path, tmp_path: Path
) -> None:
    listed = (shared_data / "bccd/ImageSets/Main/test.txt").read_text().split()
    (tmp_path / "few.txt").write_text("\n".join(listed[:4]))
    source = VocReader(
        shared_data / "bccd/Annotations",
        shared_data / "bccd/JPEGImages",
        split_list=tmp_path / "few.txt",
    )
    _assert_detections_are_those_of_evaluation(tiny_model, source)


def test_saving_and_loading_changes_nothing(tiny_model: LoadedModel, tiny_checkpoint: Path) -> None:
    loaded = load_model(tiny_checkpoint)
    assert loaded.config == tiny_model.config and loaded.preprocess == tiny_model.preprocess
    jax.tree.map(np.testing.assert_array_equal, loaded.params, tiny_model.params)


def test_bad_checkpoints_are_one_clear_error(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        load_model(tmp_path)
    run = tiny_checkpoint / "run" / "metadata"
    text = run.read_text()
    try:
        broken = json.loads(text)
        broken["model"]["image"]["mlp_width"] = 96
        run.write_text(json.dumps(broken))
        with pytest.raises(CheckpointError, match=r"mlp_in/bias is \(2, 64\) there and \(2, 96\)"):
            load_model(tiny_checkpoint)
        run.write_text("{")
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_model(tiny_checkpoint)
    finally:
        run.write_text(text)


def test_no_queries_is_an_error(predictor: Predictor) -> None:
    with pytest.raises(DataError, match="queries"):
        predictor.detect(_images()[:1], [])


def _assert_same(ours: list[Detections], theirs: list[Detections]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.scores, b.scores, rtol=1e-4)
        np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-2)
        np.testing.assert_array_equal(a.labels, b.labels)


def test_search_finds_what_detection_finds(
    predictor: Predictor, embedded: ImageEmbeddings, tmp_path: Path
) -> None:
    texts = ["red circle", "cat", "dog"]
    detected = predictor.detect(_images(), texts, threshold=0.0, top_k=20, batch_size=3)
    shown = _is_shown(embedded).sum(axis=1)
    assert [len(found) for found in detected] == np.minimum(20, 3 * shown).tolist()
    _assert_same(predictor.search(embedded, texts, threshold=0.0, top_k=20), detected)
    with embedding_files.Writer(tmp_path / "emb") as writer:
        writer.add(embedded)
        writer.add(predictor.embed_images(_images()[:2], ["a", "b"], batch_size=3))
    first, second = embedding_files.read(tmp_path / "emb")
    assert first.names == embedded.names and second.names == ("a", "b")
    assert (first.sizes == SIZES).all()
    _assert_same(predictor.search(first, texts, threshold=0.0, top_k=20), detected)
    _assert_same(predictor.search(second, texts, threshold=0.0, top_k=20), detected[:2])


def test_search_in_parts_changes_nothing(
    predictor: Predictor, embedded: ImageEmbeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = predictor.search(embedded, ["cat"], threshold=0.0)
    monkeypatch.setattr(predictor_lib, "SCORES_AT_ONCE", 2 * 16)  # two images of 16 tokens
    _assert_same(predictor.search(embedded, ["cat"], threshold=0.0), whole)


def _is_shown(embedded: ImageEmbeddings) -> np.ndarray:
    """Which tokens' boxes have an area inside their image, with nothing of the package."""
    centre, half = embedded.tokens.boxes[..., :2], embedded.tokens.boxes[..., 2:] / 2
    shape = embedded.sizes[:, None, ::-1]
    longer = shape.max(axis=2, keepdims=True)
    low, high = (np.clip(x * longer, 0, shape) for x in (centre - half, centre + half))
    return ((high - low) >= 0.01).all(axis=2)


def _objectness_shown(embedded: ImageEmbeddings) -> list[np.ndarray]:
    """Of each image the logits of the tokens that show it, best first."""
    rows = zip(embedded.tokens.objectness_logits, _is_shown(embedded), strict=True)
    return [np.sort(logits[is_shown])[::-1] for logits, is_shown in rows]


def test_fewer_tokens_are_those_of_highest_objectness(
    predictor: Predictor, embedded: ImageEmbeddings
) -> None:
    few = predictor.embed_images(_images(), num_tokens=4, batch_size=3)
    assert few.tokens.boxes.shape == (len(SIZES), 4, 4)
    rows = zip(few.tokens.objectness_logits, _objectness_shown(embedded), strict=True)
    for kept, wanted in rows:  # those in the padding come last
        np.testing.assert_allclose(kept[: len(wanted)], wanted[:4], atol=1e-5)


def test_proposals_are_ranked_by_objectness(
    predictor: Predictor, embedded: ImageEmbeddings
) -> None:
    found = predictor.propose(_images(), top_k=7, batch_size=3)
    rows = zip(SIZES, found, _objectness_shown(embedded), strict=True)
    for (height, width), proposals, logits in rows:
        # The best seven of those that show some of the image, and not its padding alone.
        wanted = 1 / (1 + np.exp(-logits[:7]))
        np.testing.assert_allclose(proposals.scores, wanted, atol=1e-5)
        assert (np.diff(proposals.scores) <= 0).all()
        assert (proposals.boxes[:, 2:] > proposals.boxes[:, :2]).all()
        assert (proposals.boxes <= [width, height, width, height]).all()
    assert sum(len(proposals) == 7 for proposals in found) > 1
    least = float(np.median(found[0].scores))
    (some,) = predictor.propose(_images()[:1], top_k=7, threshold=least, batch_size=3)
    assert 0 < len(some) < len(found[0]) and (some.scores >= least).all()


# --- image queries -------------------------------------------------------------------------------


def test_query_of_a_box_is_a_token_of_its_image(
    predictor: Predictor, embedded: ImageEmbeddings
) -> None:
    boxes = [(0.0, 0.0, width / 2, height) for height, width in SIZES]
    queries = predictor.encode_image_queries(_images(), boxes, batch_size=3)
    assert queries.embeddings.shape == (1, len(SIZES), 16)
    assert queries.names == tuple(f"image {i}" for i in range(len(SIZES)))
    own = np.einsum("ine,ie->in", embedded.tokens.class_embeddings, queries.embeddings[0])
    np.testing.assert_allclose(own.max(1), 1, atol=1e-3)
    prominent = predictor.encode_image_queries(_images(), batch_size=3)
    rows = (embedded.tokens.objectness_logits - 100 * ~_is_shown(embedded)).argmax(1)
    wanted = embedded.tokens.class_embeddings[np.arange(len(SIZES)), rows]
    np.testing.assert_allclose(prominent.embeddings[0], wanted, atol=1e-4)


def test_images_of_one_name_are_averaged(predictor: Predictor) -> None:
    images = _images()[:3]
    alone = predictor.encode_image_queries(images)
    mean = predictor.encode_image_queries(images, names=["cup", "jug", "cup"])
    assert mean.names == ("cup", "jug")
    np.testing.assert_allclose(mean.embeddings[0, 1], alone.embeddings[0, 1], atol=1e-5)
    np.testing.assert_allclose(
        mean.embeddings[0, 0], alone.embeddings[0, [0, 2]].mean(0), atol=1e-5
    )


def test_texts_and_images_are_asked_together(
    predictor: Predictor, embedded: ImageEmbeddings
) -> None:
    texts = predictor.encode_queries(["cat", "dog"], prompt_mode="clip_best7")
    shown = predictor.encode_image_queries(_images()[:1])
    both = texts + shown
    assert both.embeddings.shape == (7, 3, 16) and both.names == ("cat", "dog", "image 0")
    together = predictor.search(embedded, both, threshold=0.0)
    for label, queries in ((0, texts), (2, shown)):
        alone = predictor.search(embedded, queries, threshold=0.0)
        for a, b in zip(together, alone, strict=True):
            wanted = b.scores[b.labels == min(label, len(queries) - 1) * (label != 2)]
            np.testing.assert_allclose(a.scores[a.labels == label], wanted, rtol=1e-4)


def test_texts_are_remembered_up_to_a_number_of_bytes(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def embed_prompts(params: Any, tokens: Any) -> Any:
        calls.append(tokens.shape[1])
        return np.ones((*tokens.shape[:2], 16), np.float32)

    encoder = query_encoder.QueryEncoder(tiny_model, embed_prompts)
    first = encoder.encode(["a", "b"], "none").embeddings
    assert encoder.encode(["a", "b"], "none").embeddings is first and len(calls) == 1
    monkeypatch.setattr(query_encoder, "TEXTS_KEPT", first.nbytes)
    encoder.encode(["c", "d"], "none")
    encoder.encode(["c", "d"], "none")
    assert len(calls) == 2
    encoder.encode(["a", "b"], "none")
    assert len(calls) == 3
    encoder.forget()
    encoder.encode(["a", "b"], "none")
    assert len(calls) == 4


def test_another_number_of_queries_compiles_no_image_tower(predictor: Predictor) -> None:
    predictor.detect(_images()[:1], ["a"], batch_size=1)
    before = predictor._images._run._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    predictor.detect(_images()[:1], [f"thing {i}" for i in range(40)], batch_size=1, top_k=5)
    assert predictor._images._run._cache_size() == before  # pyright: ignore[reportAttributeAccessIssue]


def test_pictures_have_names_of_their_own_and_replace_no_image(tmp_path: Path) -> None:
    paths = [Path(f"{day}/cam/1.jpg") for day in ("day1", "day2")] + [Path("day1/cam/2.jpg")]
    names = [path.name for path in images.picture_paths(tmp_path, paths)]
    assert names == ["cam_1.jpg_1.png", "cam_1.jpg_2.png", "2.png"]
    with pytest.raises(UserError, match=r"a\.png is one of the images"):
        images.picture_paths(tmp_path, [tmp_path / "a.png"])


def test_unusable_image_queries_are_one_clear_error(predictor: Predictor) -> None:
    image = _images()[:1]  # 40 x 40 pixels
    for boxes, message in (
        ([(50, 0, 60, 10)], "box 0: .* has no area inside the image of 40 x 40"),
        ([(5, 5, 5, 10)], "no area"),
        ([(0, 0, float("nan"), 10)], "four numbers"),
        ([(0, 0, 10)], "four numbers"),
        ([None, None], "1 images, 2 boxes and 1 names"),
    ):
        with pytest.raises(DataError, match=message):
            predictor.encode_image_queries(image, boxes)
    params = {k: v for k, v in predictor.model.params.items() if k != "objectness_head"}
    headless = Predictor(dataclasses.replace(predictor.model, params=params))
    for call in (
        lambda: headless.encode_image_queries(image),
        lambda: headless.propose(image),
        lambda: headless.embed_images(image, num_tokens=3),
    ):
        with pytest.raises(DataError, match="no objectness head"):
            call()


# --- options -------------------------------------------------------------------------------------


def test_lower_resolution_uses_a_part_of_the_grid(predictor: Predictor) -> None:
    found = predictor.detect(_images(), ["cat"], threshold=0.0, batch_size=3, image_size=16)
    for (height, width), result in zip(SIZES, found, strict=True):
        assert len(result) <= 4  # 2 x 2 patches of 8 pixels
        assert (result.boxes <= [width, height, width, height]).all()
    assert predictor.preprocess(Image.new("RGB", (5, 9)), 16).shape == (16, 16, 3)
    assert len(found[0]) == 4
    embedded = predictor.embed_images(_images(), batch_size=3, image_size=16)
    assert embedded.image_size == 16
    _assert_same(predictor.search(embedded, ["cat"], threshold=0.0), found)
    for size in (12, 40):
        with pytest.raises(DataError, match=f"image_size: {size} is not a multiple .* 8 .* 32"):
            predictor.detect(_images(), ["cat"], image_size=size)
    with pytest.raises(DataError, match="image_size: must be a whole number, positive; got 0"):
        predictor.detect(_images(), ["cat"], image_size=0)


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    inside = max(width, 0) * max(height, 0)
    return inside / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inside)


@pytest.mark.parametrize("across", [False, True])
def test_suppression_drops_what_a_better_box_covers(
    predictor: Predictor,
    embedded: ImageEmbeddings,
    across: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(4)
    low = rng.uniform(0, 20, (60, 2))
    everything = Detections(
        np.concatenate([low, low + rng.uniform(5, 15, (60, 2))], 1).astype(np.float32),
        np.linspace(0.9, 0.1, 60, dtype=np.float32),
        rng.integers(0, 2, 60).astype(np.int32),
    )
    kept: list[int] = []
    for row in range(60):
        rivals = [i for i in kept if across or everything.labels[i] == everything.labels[row]]
        if all(_iou(everything.boxes[i], everything.boxes[row]) <= 0.3 for i in rivals):
            kept.append(row)
    assert 0 < len(kept) < 60
    monkeypatch.setattr(detections_lib, "of_pairs", lambda *_: [everything])
    found = predictor.search(embedded, ["a", "b"], nms_iou=0.3, nms_across_queries=across)[0]
    np.testing.assert_array_equal(found.boxes, everything.boxes[kept])
    np.testing.assert_array_equal(found.labels, everything.labels[kept])
    with pytest.raises(DataError, match="nms_iou: 2 is not"):
        predictor.search(embedded, ["a", "b"], nms_iou=2)


def test_embeddings_of_an_earlier_version_are_searched(
    predictor: Predictor, embedded: ImageEmbeddings, tiny_model: LoadedModel
) -> None:
    """They carry the hash that version 0.1 made of the same model."""
    former = identity.former_model_hash(tiny_model)
    assert former != predictor.checkpoint
    found = predictor.search(dataclasses.replace(embedded, checkpoint=former), ["cat"])
    _assert_same(found, predictor.search(embedded, ["cat"]))
    queries = predictor.encode_queries(["cat"])
    former_queries = dataclasses.replace(queries, checkpoint=former)
    _assert_same(predictor.search(embedded, former_queries), found)


def test_embeddings_of_another_checkpoint_are_refused(
    predictor: Predictor, embedded: ImageEmbeddings, tiny_model: LoadedModel
) -> None:
    params = jax.tree.map(lambda x: x, tiny_model.params)
    params["class_head"]["logit_shift"]["bias"] = params["class_head"]["logit_shift"]["bias"] + 1
    other = Predictor(dataclasses.replace(tiny_model, params=params))
    assert other.checkpoint != predictor.checkpoint == Predictor(tiny_model).checkpoint
    with pytest.raises(DataError, match=f"made with checkpoint {predictor.checkpoint}"):
        other.search(embedded, ["cat"])
    queries = predictor.encode_queries(["cat"])
    with pytest.raises(DataError, match="queries: made with checkpoint"):
        other.detect(_images(), queries)
    with pytest.raises(DataError, match="7 and 2 prompts"):
        seven, two = (
            QueryEmbeddings(
                embeddings=np.zeros((t, 1, 16), np.float32), names=("x",), checkpoint="same"
            )
            for t in (7, 2)
        )
        _ = seven + two


def test_command_line(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    assert cli.main(["sample", "--out", str(folder), "--num_images", "2"]) == 0
    capsys.readouterr()
    command = [
        "predict",
        str(folder),
        "--checkpoint",
        str(tiny_checkpoint),
        "--query",
        "red circle",
    ]
    command += ["--query", "blue star", "--threshold", "0", "--top_k", "3"]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(line["image"]).name for line in lines] == ["shapes_0000.png", "shapes_0001.png"]
    detection = lines[0]["detections"][0]
    assert len(lines[0]["detections"]) == 3 and len(detection["box"]) == 4
    assert detection["query"] in ("red circle", "blue star")
    with Image.open(tmp_path / "out" / "shapes_0001.png") as picture:
        assert picture.width >= 384
    (folder / "broken.png").write_bytes(b"\x89PNG....")
    assert cli.main(command) == 1
    captured = capsys.readouterr()
    assert "1 of 3 images could not be read" in captured.err
    assert len(captured.out.splitlines()) == 2
    assert cli.main(["predict", "nowhere.png", *command[2:]]) == 2
    assert "nowhere.png: no such file" in capsys.readouterr().err


def test_command_line_embeds_and_searches(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, emb = tmp_path / "images", tmp_path / "emb"
    assert cli.main(["sample", "--out", str(folder), "--num_images", "3"]) == 0
    (folder / "broken.png").write_bytes(b"\x89PNG....")
    capsys.readouterr()
    flags = ["--query", "red circle", "--checkpoint", str(tiny_checkpoint), "--threshold", "0"]
    assert cli.main(["predict", str(folder), *flags]) == 1
    predicted = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    embed = ["embed", str(folder), "--checkpoint", str(tiny_checkpoint), "--out", str(emb)]
    assert cli.main([*embed, "--shard_size", "2"]) == 1
    assert "1 of 4 images could not be read" in capsys.readouterr().err
    assert len(list(emb.glob("*.safetensors"))) == 2
    assert cli.main(["search", str(emb), *flags]) == 0
    searched = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in searched] == [line["image"] for line in predicted]
    for ours, theirs in zip(searched, predicted, strict=True):
        assert len(ours["detections"]) == len(theirs["detections"]) == 16
        for a, b in zip(ours["detections"], theirs["detections"], strict=True):
            assert (a["query"], a["label"]) == (b["query"], b["label"]) == ("red circle", 0)
            assert a["score"] == pytest.approx(b["score"], abs=2e-5)
            assert a["box"] == pytest.approx(b["box"], abs=0.02)
    assert cli.main(embed) == 2
    assert f"{emb}: exists" in capsys.readouterr().err
    assert cli.main(["search", str(tmp_path / "nowhere"), *flags]) == 2
    assert "no embeddings there" in capsys.readouterr().err


def test_command_line_takes_query_images(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    assert cli.main(["sample", "--out", str(folder), "--num_images", "1"]) == 0
    capsys.readouterr()
    file = str(folder / "shapes_0000.png")
    predict = [
        "predict",
        file,
        "--checkpoint",
        str(tiny_checkpoint),
        "--threshold",
        "0",
        "--nms_iou",
        "0.9",
    ]
    shown = f"{file}:5,5,40,60"
    assert cli.main([*predict, "--query", "cat", "--query_image", shown]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    asked = {(d["query"], d["label"]) for d in json.loads(line)["detections"]}
    assert asked == {("cat", 0), (shown, 1)}
    for wrong, message in (
        (f"{file}:1,2,3", "FILE:X0,Y0,X1,Y1"),
        ("absent.png", "absent.png"),
        (f"{file}:70,0,80,9", "no area"),
    ):
        assert cli.main([*predict, "--query_image", wrong]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(predict) == 2
    assert "--query or --query_image" in capsys.readouterr().err


def test_a_pillow_image_is_prepared_like_its_file(predictor: Predictor, tmp_path: Path) -> None:
    pixels = np.zeros((20, 30, 4), np.uint8)
    pixels[..., 0], pixels[:, :10, 3] = 200, 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    opened = Image.open(tmp_path / "turned.png")
    ours = image_inputs.read(opened)
    theirs = image_inputs.read(tmp_path / "turned.png")
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    assert ours.size == (20, 30)


@pytest.mark.parametrize("call", ["propose", "embed_images"])
def test_numbers_of_tokens_are_checked(predictor: Predictor, call: str) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(DataError, match="whole number"):
        if call == "propose":
            predictor.propose([image], top_k=0)
        else:
            predictor.embed_images([image], num_tokens=-5)


# --- what callers give ---------------------------------------------------------------------------


def _same(ours: list[Detections], theirs: list[Detections]) -> bool:
    return [(x.boxes.tolist(), x.labels.tolist()) for x in ours] == [
        (x.boxes.tolist(), x.labels.tolist()) for x in theirs
    ]


def test_one_image_gives_one_result(predictor: Predictor, tmp_path: Path) -> None:
    pixels = _images()[0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    wanted = predictor.detect([pixels], ["cat"], threshold=0, batch_size=1)
    for image in (pixels, tmp_path / "a.png", Image.fromarray(pixels), pixels[None]):
        assert _same(predictor(image, "cat", threshold=0, batch_size=1), wanted)
    assert len(predictor.propose(pixels, batch_size=1)) == 1
    assert len(predictor.embed_images(pixels, "one", batch_size=1)) == 1
    box = (1, 2, 30, 20)
    queries = predictor.encode_image_queries(pixels, box, "cup")
    assert queries.names == ("cup",)
    listed = predictor.encode_image_queries([pixels], [box], ["cup"])
    np.testing.assert_array_equal(queries.embeddings, listed.embeddings)


def test_an_iterator_is_read_batch_by_batch(predictor: Predictor) -> None:
    wanted = predictor.detect(_images(), ["cat"], threshold=0, batch_size=2)
    read: list[int] = []

    def images() -> Any:
        for index, image in enumerate(_images()):
            read.append(index)
            yield image

    assert _same(predictor.detect(images(), ["cat"], threshold=0, batch_size=2), wanted)
    assert read == list(range(len(SIZES)))
    assert predictor.detect([], ["cat"]) == []
    assert len(predictor.embed_images(images(), batch_size=3)) == len(SIZES)


def test_one_name_is_that_of_all_query_images(predictor: Predictor) -> None:
    queries = predictor.encode_image_queries(_images()[:3], names="cup")
    assert queries.names == ("cup",)


def test_a_query_that_stands_twice_is_asked_once(predictor: Predictor) -> None:
    (once,) = predictor.detect(_images()[:1], ["cat", "dog"], threshold=0)
    (twice,) = predictor.detect(_images()[:1], ["cat", "Cat", "dog", "cat "], threshold=0)
    assert len(once) == len(twice) == 2 * 16
    assert set(twice.labels.tolist()) == {0, 2}
    assert set(twice.names) == {"cat", "dog"} and twice.names[0] == once.names[0]
    assert predictor.encode_queries(["cat", "Cat", "dog"]).names == ("cat", "dog")


def test_a_result_says_what_was_found(predictor: Predictor, embedded: ImageEmbeddings) -> None:
    for found in (
        predictor.detect(_images()[:1], ["cat", "dog"], threshold=0, nms_iou=0.5),
        predictor.search(embedded, predictor.encode_queries(["cat", "dog"]), threshold=0),
    ):
        assert found[0].names == tuple(("cat", "dog")[label] for label in found[0].labels)
        assert repr(found[0]).startswith(f"Detections({len(found[0])}: {found[0].names[0]} ")
    assert Detections(found[0].boxes, found[0].scores, found[0].labels).names == ()


class _Unread:
    """Images that must not be read: options are checked before."""

    def __iter__(self) -> Any:
        raise AssertionError("read")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, r"threshold: 1.5 is not a number in \[0, 1\]"),
        ({"threshold": float("nan")}, "threshold: nan"),
        ({"threshold": "0.5"}, "threshold: '0.5'"),
        ({"top_k": 0}, "top_k: must be a whole number, positive; got 0"),
        ({"top_k": 2.5}, "top_k: .* got 2.5"),
        ({"batch_size": -1}, "batch_size: .* got -1"),
        ({"nms_iou": 50}, "nms_iou: 50 is not"),
        ({"nms_iou": float("nan")}, "nms_iou: nan"),
        ({"image_size": "32"}, "image_size: .* got '32'"),
        ({"prompt_mode": "best"}, "prompt_mode: 'best' is not one of"),
    ],
)
def test_options_are_checked_before_anything_is_read(
    predictor: Predictor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        predictor.detect(_Unread(), ["cat"], **options)


def test_what_cannot_be_meant_is_one_clear_line(
    predictor: Predictor, embedded: ImageEmbeddings
) -> None:
    images: Any = _images()[:2]
    calls: list[tuple[Any, str]] = [
        (lambda p: p.detect(embedded, ["cat"]), "images: are embedded already; search them"),
        (lambda p: p.search(images, ["cat"]), "search: got list; give what embed_images returns"),
        (lambda p: p.search(iter([embedded]), ["cat"]), "search: got list_iterator"),
        (lambda p: p.detect(images, None), "queries: got None"),
        (lambda p: p.encode_queries(p.encode_queries("cat")), "queries: are encoded already"),
        (lambda p: p.embed_images(images, ["a", 2]), "embed: names: 1: 2 is no text"),
        (lambda p: p.embed_images(images, "ab"), "2 images and 1 names"),
        (lambda p: p.embed_images(images, num_tokens=1.5), "num_tokens: must be a whole number"),
        (lambda p: p.encode_image_queries(images, "box"), "boxes: got str"),
    ]
    for call, message in calls:
        with pytest.raises(DataError, match=message):
            call(predictor)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0.1, 0.2, 0.5, 0.6), r"box 0: .* of 40 x 40; boxes are in pixels, and no fractions"),
        ((0, 0, 1, 1), "no fractions"),
        ((10.2, 10, 10.9, 30), "shows less than a pixel"),
        ((30, 30, 12, 12), "ends before it begins; give corners"),
        (("a", "b", "c", "d"), "give four numbers"),
        ({"x": 1}, "give four numbers"),
    ],
)
def test_boxes_of_other_units_and_forms_are_refused(
    predictor: Predictor, box: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        predictor.encode_image_queries(_images()[:1], [box])


def test_paths_are_names(predictor: Predictor, tmp_path: Path) -> None:
    with embedding_files.Writer(tmp_path / "emb") as writer:
        writer.add(predictor.embed_images(_images()[:1], [Path("a/b.png")]))
    assert [shard.names for shard in embedding_files.read(tmp_path / "emb")] == [("a/b.png",)]


@pytest.mark.parametrize("part", ["class_head", "box_head", "objectness_head"])
def test_a_model_that_computes_nan_is_an_error(tiny_model: LoadedModel, part: str) -> None:
    params = dict(tiny_model.params)
    params[part] = jax.tree.map(lambda x: x * np.nan, params[part])
    broken = Predictor(dataclasses.replace(tiny_model, params=params))
    calls: list[Any] = [lambda: broken.embed_images(_images())]
    if part != "objectness_head":
        calls.append(lambda: broken.detect(_images(), ["cat"]))
    if part != "class_head":
        calls.append(lambda: broken.propose(_images()))
    for call in calls:
        with pytest.raises(CheckpointError, match="computes NaN or infinite numbers"):
            call()


def test_evaluation_of_a_model_that_computes_nan_is_an_error(tiny_model: LoadedModel) -> None:
    params = {**tiny_model.params}
    params["box_head"] = jax.tree.map(lambda x: x * np.nan, params["box_head"])
    measure = DetectionEvaluator(
        build.make_detector(tiny.config()),
        ShapesWorld(split="test", image_size=32, num_images=1),
        sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1]),
        "shapes",
        settings=EvaluationConfig(batch_size=1),
        eval_prompts="none",
    )
    with pytest.raises(CheckpointError, match="shapes: the model computes NaN"):
        measure(params)


# --- names ---------------------------------------------------------------------------------------


def test_names_stay_with_a_checkpoint(
    tiny_model: LoadedModel, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    assert Predictor.load(tiny_checkpoint).names == ()
    named = dataclasses.replace(tiny_model, names=("red circle", "chien à poil"))
    save_model(tmp_path / "named", named)
    loaded = Predictor.load(tmp_path / "named")
    assert loaded.names == named.names
    assert loaded.checkpoint == Predictor(tiny_model).checkpoint, "no part of what is computed"
    run = tmp_path / "named" / "run" / "metadata"
    run.write_text(run.read_text().replace('"red circle"', "7"))
    with pytest.raises(CheckpointError, match="names are no list of texts"):
        Predictor.load(tmp_path / "named")


def test_a_training_keeps_the_names_of_its_lists() -> None:
    data = TrainInput(tiny.config())
    listed = [category.name for category in data.sources[0].categories]
    assert data.names == tuple(listed) and len(listed) > 10


def test_evaluation_gives_no_place_to_the_padding(tiny_model: LoadedModel) -> None:
    source = _Wide()
    measure = DetectionEvaluator(
        build.make_detector(tiny.config()),
        source,
        sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1]),
        "wide",
        settings=EvaluationConfig(batch_size=1, top_k=8),
        eval_prompts="none",
    )
    (found,) = measure(tiny_model.params).evaluator.images
    (wanted,) = Predictor(tiny_model).detect(
        source[0].image, [c.name for c in source.categories], threshold=0, top_k=8
    )
    assert len(found.scores) == len(wanted) == 8
    assert (found.boxes_xyxy[:, 2:] > found.boxes_xyxy[:, :2]).all()
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-5)


class _Wide:
    """One image that fills a fifth of its square."""

    name, version = "wide", "wide-1"
    categories = (Category(id=1, name="cat"), Category(id=2, name="dog"))

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Record:
        return Record(
            image=np.random.default_rng(index).integers(0, 256, (20, 100, 3), np.uint8),
            image_id=1,
            boxes_xyxy=np.array([[1, 1, 9, 9]], np.float32),
            names=(("cat",),),
            is_crowd=np.zeros(1, bool),
            scores=np.ones(1, np.float32),
        )
