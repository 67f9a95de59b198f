"""Files that version 0.1 wrote in November 2026 are read, and give what they gave then.

`tests/fixtures/checkpoint_2026_11` holds a tiny detector (`model`), the workdir of a training that
started from it (`run`), an export, embeddings, pseudo-box records and a teacher's cache, with what
the code of that time made of them (`expected.npz`).
"""

import gzip
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from data_pipelines import open_source
from data_pipelines.input import TrainInput
from owl_det import cli
from owl_det.checkpoints.load import load_detector
from owl_det.checkpoints.store import Checkpoints
from owl_det.config import Config, PseudoBoxesSource, config_file
from owl_det.distillation.cache_request import cache_request
from owl_det.inference import embedding_files
from owl_det.inference.detections import Detections
from owl_det.inference.predictor import Predictor
from owl_det.training import train_step
from owl_det.types import TrainState

NAME = "checkpoint_2026_11"
QUERIES = ("red star", "blue ring", "a green cross")
IMAGES = (f"{NAME}/images/0.png", f"{NAME}/images/1.png")


@pytest.fixture(scope="module")
def copied(repository_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder above a copy of the files."""
    folder = tmp_path_factory.mktemp("before")
    shutil.copytree(repository_root / "tests" / "fixtures" / NAME, folder / NAME)
    packed = folder / NAME / "export" / "params.safetensors.gz"
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    return folder


@pytest.fixture(autouse=True)
def from_there(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files name each other by relative paths."""
    monkeypatch.chdir(copied)


@pytest.fixture(scope="module")
def expected(copied: Path) -> dict[str, np.ndarray]:
    with np.load(copied / NAME / "expected.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def predictor(copied: Path) -> Predictor:
    return Predictor.load(copied / NAME / "model")


def _assert_found(found: Detections, name: str, expected: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(found.scores, expected[f"{name}/scores"], atol=1e-6)
    np.testing.assert_allclose(found.boxes, expected[f"{name}/boxes"], rtol=1e-6, atol=1e-4)
    np.testing.assert_array_equal(found.labels, expected[f"{name}/labels"])


def test_a_detector_predicts_the_same(
    predictor: Predictor, expected: dict[str, np.ndarray]
) -> None:
    for i, found in enumerate(predictor.detect(IMAGES, QUERIES, threshold=0.0, top_k=20)):
        _assert_found(found, str(i), expected)
    vectors = predictor.encode_queries(QUERIES).embeddings
    np.testing.assert_allclose(vectors, expected["query_embeddings"], atol=1e-6)
    assert predictor.names == ("red star", "blue ring") and load_detector(f"{NAME}/model").step == 7


def test_a_workdir_predicts_the_same(expected: dict[str, np.ndarray]) -> None:
    (found,) = Predictor.load(f"{NAME}/run").detect(IMAGES[0], QUERIES, threshold=0.0, top_k=20)
    _assert_found(found, "run", expected)


def test_a_training_goes_on() -> None:
    """Its state is restored: the step, the parameters, and Adam's two moments of one gradient."""
    config = config_file.read(f"{NAME}/run/config.json", ["--config.num_steps=2"])
    checkpoints = Checkpoints(Path(NAME) / "run", config)
    state = checkpoints.restore(_template(config), TrainInput(config).version)
    assert int(state.step) == checkpoints.latest_step == 1
    saved = load_detector(f"{NAME}/run").params
    jax.tree.map(np.testing.assert_array_equal, state.params, saved)
    b1, b2 = config.optimizer.b1, config.optimizer.b2
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    moments = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    means = {path: value for path, value in moments.items() if ".mu" in path}
    assert sum(np.abs(mean).sum() for mean in means.values()) > 0
    for path, mean in means.items():
        square = moments[path.replace(".mu", ".nu")]
        np.testing.assert_allclose(square, (1 - b2) * (mean / (1 - b1)) ** 2, rtol=1e-4, atol=1e-12)


def _template(config: Config) -> TrainState:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: train_step.init_state(config))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)


def test_an_export_predicts_the_same(expected: dict[str, np.ndarray]) -> None:
    loaded = Predictor.load(f"{NAME}/export")
    for i, found in enumerate(loaded.detect(IMAGES, QUERIES, threshold=0.0, top_k=20)):
        _assert_found(found, str(i), expected)


def test_embeddings_are_searched(predictor: Predictor, expected: dict[str, np.ndarray]) -> None:
    (stored,) = embedding_files.read(f"{NAME}/embeddings")
    assert stored.names == ("0.png", "1.png")
    for i, found in enumerate(predictor.search(stored, QUERIES, threshold=0.0, top_k=20)):
        np.testing.assert_allclose(found.scores, expected[f"{i}/scores"], atol=1e-3)


def test_records_are_read_and_their_job_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    source = open_source.open_source(PseudoBoxesSource(records=f"{NAME}/records"), "")
    records = [source[i] for i in range(len(source))]
    assert [len(record.names) for record in records] == [8, 8]
    before = {p: p.stat().st_mtime_ns for p in Path(NAME, "records").glob("boxes-*")}
    command = ["annotate", f"--checkpoint={NAME}/model", f"--input={NAME}/images"]
    command += [f"--output={NAME}/records", "--labels=shapes_world", "--prompts=none"]
    command += ["--min_box_score=0.0", "--min_image_score=0.0", "--keep_below=1"]
    assert cli.main(command) == 0, capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in before} == before, "nothing is done again"


def test_a_teachers_cache_is_read(expected: dict[str, np.ndarray]) -> None:
    config = config_file.read(f"{NAME}/caching.json")
    batches = TrainInput(config, cache_request(config)).batches(0, num_data_shards=1)
    batch = next(batches)
    batches.close()
    cached = sorted(key for key in expected if key.startswith("teacher/"))
    assert sorted(key for key in batch if key.startswith("teacher/")) == cached
    for key in cached:
        np.testing.assert_array_equal(batch[key], expected[key])
    pixels = batch["image"].astype(np.float64).sum((1, 2, 3))
    np.testing.assert_array_equal(pixels, expected["image"])
