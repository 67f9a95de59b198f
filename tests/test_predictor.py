"""The predictor and the command line around it."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines import image_ops, transforms
from data_pipelines.features import Record
from data_pipelines.shapes_world import ShapesWorld
from owl_det import checkpoint, cli, sharding, train_step
from owl_det.checkpoint import LoadedModel
from owl_det.config import EvaluationConfig, MeshConfig
from owl_det.errors import CheckpointError, DataError
from owl_det.evaluation.evaluate import Evaluate
from owl_det.predictor import Predictor
from tests import tiny

SIZES = [(40, 40), (31, 77), (100, 13), (1, 50), (64, 65)]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    config = tiny.config()
    return LoadedModel(
        params=train_step.init_params(config, jax.random.key(1)),
        model=config.model,
        preprocess=config.preprocess,
        eval_prompts="none",
        step=5,
    )


@pytest.fixture(scope="module")
def saved(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "checkpoint"
    checkpoint.save_model(path, model)
    return path


def _images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


def test_boxes_lie_inside_images_of_any_size(model: LoadedModel) -> None:
    predictor = Predictor(model)
    found = predictor.detect(_images(), ["red circle", "cat"], threshold=0.0, batch_size=3)
    assert len(found) == len(SIZES)
    for (height, width), result in zip(SIZES, found, strict=True):
        assert len(result) == 2 * 16
        assert (result.boxes >= 0).all()
        assert (result.boxes[:, [0, 2]] <= width).all() and (result.boxes[:, 1::2] <= height).all()
        assert set(result.labels.tolist()) <= {0, 1}
        assert (np.diff(result.scores) <= 0).all()


def test_batching_and_number_of_queries_change_nothing(model: LoadedModel) -> None:
    predictor = Predictor(model)
    together = predictor.detect(_images(), ["red circle", "cat"], threshold=0.0)
    for image, result in zip(_images(), together, strict=True):
        (alone,) = predictor.detect([image], ["red circle"], threshold=0.0, batch_size=1)
        keep = result.labels == 0
        np.testing.assert_allclose(alone.boxes, result.boxes[keep], atol=1e-3)
        np.testing.assert_allclose(alone.scores, result.scores[keep], rtol=1e-4)


def test_prompts_are_averaged_as_probabilities(model: LoadedModel) -> None:
    predictor = Predictor(model)
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


def test_preprocessing_is_that_of_evaluation(model: LoadedModel) -> None:
    predictor = Predictor(model)
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
            record, image_size=model.model.image_size, preprocess=model.preprocess
        )
        ours = predictor.preprocess(image_ops.decode_image(image))
        difference = np.abs(ours.astype(int) - example.image.astype(int))
        assert difference.max() <= 1


def test_detections_are_those_of_evaluation(model: LoadedModel) -> None:
    config = tiny.config()
    source = ShapesWorld(split="test", image_size=50, num_images=3)
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    evaluate = Evaluate(
        train_step.make_detector(config),
        source,
        mesh,
        "shapes",
        settings=EvaluationConfig(batch_size=2),
        eval_prompts="none",
    )
    expected = evaluate(model.params).evaluator.images
    found = Predictor(model).detect(
        [np.asarray(source[i].image) for i in range(3)],
        [category.name for category in source.categories],
        threshold=0.0,
    )
    ids = np.array([category.id for category in source.categories])
    assert len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-5)
        np.testing.assert_allclose(ours.boxes, theirs.boxes_xyxy, atol=1e-3)
        assert (ids[ours.labels] == theirs.categories).mean() > 0.99  # ties may swap


def test_saving_and_loading_changes_nothing(model: LoadedModel, saved: Path) -> None:
    loaded = checkpoint.load_model(saved)
    assert loaded.model == model.model and loaded.preprocess == model.preprocess
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)


def test_bad_checkpoints_are_one_clear_error(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        checkpoint.load_model(tmp_path)
    run = saved / "run" / "metadata"
    text = run.read_text()
    try:
        broken = json.loads(text)
        broken["model"]["image"]["mlp_width"] = 96
        run.write_text(json.dumps(broken))
        with pytest.raises(CheckpointError, match=r"mlp_in/bias is \(2, 64\) there and \(2, 96\)"):
            checkpoint.load_model(saved)
        run.write_text("{")
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoint.load_model(saved)
    finally:
        run.write_text(text)


def test_no_queries_is_an_error(model: LoadedModel) -> None:
    with pytest.raises(DataError, match="queries"):
        Predictor(model).detect(_images()[:1], [])


def test_command_line(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    assert cli.main(["sample", "--out", str(folder), "--num_images", "2"]) == 0
    capsys.readouterr()
    command = ["predict", str(folder), "--checkpoint", str(saved), "--query", "red circle"]
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
