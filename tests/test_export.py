"""Exports: what is written computes what the checkpoint does, and nothing else is loaded."""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from owl_det import cli, files
from owl_det.checkpoints import identity
from owl_det.checkpoints.load import save_model
from owl_det.errors import CheckpointError, UserError
from owl_det.inference import export, export_folder, ranking, stablehlo
from owl_det.inference.predictor import Predictor
from owl_det.types import LoadedModel
from tests import tiny

BLOCKED = ("flax", "optax", "orbax", "tensorflow", "tensorflow_datasets", "clu", "ml_collections")
# Batches of 1 and 3 images; 2 and 20 queries are padded to 16 and 32.
CASES = [(batch_size, num_queries) for batch_size in (1, 3) for num_queries in (2, 20)]
WORDS = [f"{colour} {shape}" for colour in ("red", "blue") for shape in "abcdefghij"]


def _images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((40, 40), (31, 77), (64, 9))]


def _model(**changes: Any) -> LoadedModel:
    """Its parameters do not depend on `changes`: dtype, attention."""
    made = tiny.loaded()
    config = dataclasses.replace(made.config, **changes)
    return dataclasses.replace(made, config=config, eval_prompts="clip_best7")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "checkpoint"
    save_model(path, _model())
    return path


@pytest.fixture(scope="module")
def exported(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "model"
    report = export.export(saved, path)
    assert set(report["max_abs_difference"].values()) == {0.0}
    return path


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """An export to damage."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def _edit(folder: Path, **changes: Any) -> None:
    """Changes keys of the metadata; `rehash` names a file whose hash is made right again."""
    file = folder / export_folder.METADATA
    metadata = json.loads(file.read_text())
    name = changes.pop("rehash", None)
    if name:
        metadata["sha256"][name] = files.sha256(folder / name)
    file.write_text(json.dumps(metadata | changes))


@pytest.mark.slow
def test_an_export_runs_without_flax_and_gives_the_boxes_of_the_checkpoint(
    saved: Path, exported: Path, tmp_path: Path, repository_root: Path
) -> None:
    np.savez(tmp_path / "images.npz", *_images())
    code = f"""
import sys
for name in {BLOCKED!r}: sys.modules[name] = None
import numpy as np
from owl_det import Predictor
predictor = Predictor.load({str(exported)!r})
images = list(np.load({str(tmp_path / "images.npz")!r}).values())
found = {{}}
for batch_size, num_queries in {CASES!r}:
    results = predictor.detect(
        images, {WORDS!r}[:num_queries], threshold=0.0, batch_size=batch_size, top_k=50
    )
    for row, result in enumerate(results):
        for key in ("boxes", "scores", "labels"):
            found[f"{{batch_size}} {{num_queries}} {{row}} {{key}}"] = getattr(result, key)
np.savez({str(tmp_path / "found.npz")!r}, **found)
assert not [name for name in sys.modules if name.split(".")[0] in {BLOCKED!r} and sys.modules[name]]
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository_root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(tmp_path / "found.npz")
    reference = Predictor.load(saved)
    for batch_size, num_queries in CASES:
        queries = WORDS[:num_queries]
        expected = reference.detect(
            _images(), queries, threshold=0.0, batch_size=batch_size, top_k=50
        )
        for row, result in enumerate(expected):
            name = f"{batch_size} {num_queries} {row}"
            # Boxes that lie in the padding are left out.
            num_pairs = min(50, 16 * num_queries)
            assert len(result) == num_pairs if row == 0 else 0 < len(result) <= num_pairs
            np.testing.assert_allclose(found[f"{name} boxes"], result.boxes, atol=1e-3)
            np.testing.assert_allclose(found[f"{name} scores"], result.scores, atol=1e-6)
            assert (found[f"{name} labels"] == result.labels).mean() > 0.95  # ties may swap


def test_the_predict_command_takes_an_export(
    saved: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sample", "--out", str(tmp_path), "--num_images", "1"]) == 0
    capsys.readouterr()
    printed = []
    for path in (saved, exported):
        command = ["predict", str(tmp_path), "--checkpoint", str(path), "--query", "red circle"]
        assert cli.main([*command, "--threshold", "0", "--top_k", "3"]) == 0
        printed.append(json.loads(capsys.readouterr().out))
    for ours, theirs in zip(printed[0]["detections"], printed[1]["detections"], strict=True):
        assert ours["box"] == pytest.approx(theirs["box"], abs=0.011)
        assert ours["score"] == pytest.approx(theirs["score"], abs=2e-5)


def test_metadata_describes_the_model(exported: Path) -> None:
    metadata = json.loads((exported / export_folder.METADATA).read_text())
    model = _model()
    assert metadata["model"]["image"] == dataclasses.asdict(model.config.image)
    assert metadata["fingerprint"] == identity.model_hash(model)
    other = dataclasses.replace(model, params=jax.tree.map(lambda x: x + 1, model.params))
    assert metadata["fingerprint"] != identity.model_hash(other)
    assert metadata["tokenizer"]["num_positions"] == 8 and len(metadata["prompt_templates"]) == 7
    loaded, _ = stablehlo.load(exported)
    assert loaded.preprocess == model.preprocess and loaded.step == 5
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
    assert {path.stat().st_mode & 0o777 for path in exported.iterdir()} == {0o644}
    functions = sum((exported / name).stat().st_size for name in metadata["sha256"])
    functions -= (exported / stablehlo.PARAMS).stat().st_size
    assert functions < 200_000  # parameters are not inside


@pytest.mark.nightly
def test_bfloat16_models_export(tmp_path: Path) -> None:
    save_model(tmp_path / "checkpoint", _model(dtype="bfloat16"))
    report = export.export(tmp_path / "checkpoint", tmp_path / "export")
    assert max(report["max_abs_difference"].values()) < 0.02


def test_cudnn_attention_becomes_portable(tmp_path: Path) -> None:
    save_model(tmp_path / "checkpoint", _model(attention="cudnn"))
    export.export(tmp_path / "checkpoint", tmp_path / "export")
    assert len(Predictor.load(tmp_path / "export").detect(_images(), ["cat"], threshold=0)) == 3


def test_damaged_files_are_one_clear_error(copy: Path) -> None:
    for name in (stablehlo.PARAMS, stablehlo.ENCODE_QUERIES, stablehlo.EMBED_TOKENS):
        file = copy / name
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=f"{name}: damaged, or of another export"):
            stablehlo.load(copy)
        file.write_bytes(content[: len(content) // 2])
        _edit(copy, rehash=name)
        with pytest.raises(CheckpointError, match=f"{name}: no (function|safetensors)"):
            stablehlo.load(copy)
        file.unlink()
        with pytest.raises(CheckpointError, match=f"{name}: cannot be read"):
            stablehlo.load(copy)
        file.write_bytes(content)
        _edit(copy, rehash=name)
    stablehlo.load(copy)


def test_functions_of_another_model_are_refused(copy: Path) -> None:
    encode, score = copy / stablehlo.ENCODE_QUERIES, copy / stablehlo.EMBED_TOKENS
    encode.write_bytes(score.read_bytes())
    _edit(copy, rehash=stablehlo.ENCODE_QUERIES)
    with pytest.raises(CheckpointError, match=r"encode_queries.*inputs and outputs are not those"):
        stablehlo.load(copy)


def test_metadata_that_does_not_fit_is_refused(copy: Path) -> None:
    file = copy / export_folder.METADATA
    text = file.read_text()
    model = json.loads(text)["model"]
    for changes, message in (
        ({"version": 2}, "not the metadata of an export of version 1"),
        ({"format": "onnx"}, "'onnx' export, which only its own runtime loads"),
        ({"step": None}, "'step' is missing or no int"),
        ({"model": model | {"image_size": 64}}, "inputs and outputs are not those"),
        ({"model": model | {"imaeg_size": 64}}, "imaeg_size"),
        ({"eval_prompts": "all"}, "'all' is not one of"),
    ):
        _edit(copy, **changes)
        with pytest.raises(CheckpointError, match=message):
            stablehlo.load(copy)
        file.write_text(text)
    file.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="cannot be read"):
        stablehlo.load(copy)
    file.write_text(" " * (stablehlo.MAX_METADATA_BYTES + 1))
    with pytest.raises(CheckpointError, match="cannot be read"):
        stablehlo.load(copy)


def test_parameters_that_do_not_fit_are_refused(copy: Path) -> None:
    file = copy / stablehlo.PARAMS
    good = safetensors.numpy.load_file(file)
    name = "class_head/embedding/bias"
    for bad in (
        {k: v for k, v in good.items() if k != name},
        good | {name: good[name].astype(np.float16)},
        good | {name: good[name][:-1]},
        good | {"more": good[name]},
    ):
        safetensors.numpy.save_file(bad, file)
        _edit(copy, rehash=stablehlo.PARAMS)
        with pytest.raises(CheckpointError, match=f"{stablehlo.PARAMS}: ({name}|more) is"):
            stablehlo.load(copy)


def test_a_function_that_calls_native_code_is_refused(copy: Path) -> None:
    """The right signature, and a LAPACK call inside."""
    good = jax.export.deserialize(bytearray((copy / stablehlo.ENCODE_QUERIES).read_bytes()))
    (params, tokens), _ = jax.tree.unflatten(good.in_tree, good.in_avals)

    def encode_queries(params: Any, tokens: Any) -> dict[str, jax.Array]:
        made = good.call(params, tokens)["embeddings"]
        factor = jnp.linalg.cholesky(jnp.eye(16))
        return {"embeddings": made @ factor}

    bad = jax.export.export(jax.jit(encode_queries))(
        *jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, tokens))
    )
    (copy / stablehlo.ENCODE_QUERIES).write_bytes(bad.serialize())
    _edit(copy, rehash=stablehlo.ENCODE_QUERIES)
    with pytest.raises(CheckpointError, match="encode_queries.* calls native code .*lapack"):
        stablehlo.load(copy)


def test_an_oversized_function_is_not_read(copy: Path) -> None:
    with (copy / stablehlo.EMBED_TOKENS).open("wb") as file:
        file.truncate(stablehlo.MAX_FUNCTION_BYTES + 1)
    with pytest.raises(CheckpointError, match="bytes are too many for a function"):
        stablehlo.load(copy)


def test_the_command_names_what_is_wrong(
    saved: Path,
    exported: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, "is_installed", lambda package: False)
    for source, target, kind, message in (
        (tmp_path / "nowhere", tmp_path / "out", "stablehlo", "no checkpoint there"),
        (exported, tmp_path / "out", "stablehlo", "is an export already"),
        (saved, exported, "stablehlo", "exists and is not empty"),
        (saved, tmp_path / "out", "onnx", "pip install -e '.[onnx]'"),
        (saved, tmp_path / "out", "saved_model", "pip install tensorflow-cpu"),
    ):
        assert cli.main(["export", str(source), str(target), "--format", kind]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_export_that_differs_is_not_kept(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_wrong(folder: Path, model: LoadedModel) -> export.Runtime:
        functions = ranking.DetectorFunctions.of_model(model)
        return lambda inputs: {
            k: v + np.float32(0.01)
            for k, v in export._run(functions, model, inputs, "stablehlo").items()
        }

    monkeypatch.setitem(export.WRITERS, "stablehlo", write_wrong)
    with pytest.raises(UserError, match="differs from the checkpoint: .* by 0.01"):
        export.export(saved, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def _sizes(model: LoadedModel, t: int, b: int, q: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(t + b + q)
    return {
        "tokens": rng.integers(1, 49408, (t, q, 8), np.int32),
        "image": rng.integers(0, 256, (b, 32, 32, 3), np.uint8),
        "query_embeddings": rng.normal(size=(t, q, 16)).astype(np.float32),
        "is_query": np.arange(q) > 0,
    }


# TensorFlow takes long to import, and speaks of its own machinery.
@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["saved_model", "onnx"])
def test_other_runtimes_take_any_number_of_images_prompts_and_queries(
    kind: str, tmp_path: Path
) -> None:
    if kind == "onnx":
        pytest.importorskip("jax2onnx", reason="needs the extra onnx")
    else:
        pytest.importorskip("tensorflow", reason="a SavedModel needs TensorFlow")
    model = export._portable(_model(), kind)
    run = export.WRITERS[kind](tmp_path, model)
    functions = ranking.DetectorFunctions.of_model(model)
    for t, b, q in ((1, 1, 1), (1, 3, 5), (7, 2, 20)):
        inputs = _sizes(model, t, b, q)
        expected, found = export._run(functions, model, inputs, kind), run(inputs)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=2e-5, err_msg=name)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_onnx_runtime_loads_an_export_without_a_word(
    saved: Path, tmp_path: Path, repository_root: Path
) -> None:
    pytest.importorskip("jax2onnx", reason="needs the extra onnx")
    export.export(saved, tmp_path / "onnx", "onnx")
    code = f"""
import onnxruntime
for name in {export.FUNCTIONS["onnx"]!r}:
    onnxruntime.InferenceSession({str(tmp_path / "onnx")!r} + "/" + name + ".onnx")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    # Of machines without a GPU it speaks of its absence, on some kernels.
    assert not [line for line in done.stderr.splitlines() if "nitializer" in line], done.stderr


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_example_of_the_page_finds_what_the_predictor_finds(
    saved: Path,
    tmp_path: Path,
    repository_root: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("jax2onnx", reason="needs the extra onnx")
    page = (repository_root / "docs/export.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").symlink_to(saved)
    commands = re.findall(r"^    owl-det ((?:export RUN|sample) .*)$", page, re.MULTILINE)
    assert [cli.main(shlex.split(command)) for command in commands] == [0, 0]
    capsys.readouterr()
    scope: dict[str, Any] = {}
    exec(compile(example.replace(">= 0.3", ">= 0"), "docs/export.md", "exec"), scope)
    queries = scope["queries"]
    (found,) = Predictor.load(saved).detect(
        ["images/shapes_0000.png"], queries, threshold=0, top_k=10**6
    )
    scores = scope["scores"][0]
    assert len(capsys.readouterr().out.splitlines()) == len(scores) == 16
    for label in range(len(queries)):
        ours = np.sort(found.scores[found.labels == label])
        np.testing.assert_allclose(np.sort(scores[:, label]), ours, atol=1e-5)
    best = scope["boxes"][0][scores.max(-1).argmax()] * 64
    np.testing.assert_allclose(found.boxes[0], np.clip(best, 0, 64), atol=0.01)
