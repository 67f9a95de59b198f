"""JSON files of Hugging Face with values of odd types: one line that names file and field."""

import copy
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from owl_det.convert import clip, huggingface, siglip, weights
from owl_det.errors import CheckpointError
from tests.convert import arrays, hf_folder

ODD = (True, -1, 1.5, "512", [], [1], {}, {"a": 1}, 10**400, float("nan"), float("inf"))
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_folder.write(tmp_path_factory.mktemp("hf") / "model")


def _refused(folder: Path, file: str, content: str | bytes) -> str:
    """The message for this content of a file, which is put back afterwards."""
    path = folder / file
    before = path.read_bytes()
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    try:
        with pytest.raises(CheckpointError) as error:
            huggingface.read(str(folder))
    finally:
        path.write_bytes(before)
    assert "\n" not in str(error.value) and str(path) in str(error.value), error.value
    return str(error.value)


def _with(tree: dict[str, Any], keys: tuple[str, ...], value: Any) -> str:
    changed = copy.deepcopy(tree)
    node = changed
    for key in keys[:-1]:
        node = node.setdefault(key, {})
    node[keys[-1]] = value
    return json.dumps(changed)


@pytest.mark.parametrize("value", [*ODD, None])
@pytest.mark.parametrize(
    "keys",
    [
        ("projection_dim",),
        *(("vision_config", key) for key in (*SIZES, "image_size", "patch_size", "num_channels")),
        *(("text_config", key) for key in (*SIZES, "vocab_size", "max_position_embeddings")),
    ],
    ids=".".join,
)
def test_a_size_of_odd_type_is_named(folder: Path, keys: tuple[str, ...], value: Any) -> None:
    message = _refused(folder, "config.json", _with(hf_folder.config(), keys, value))
    assert ".".join(keys) in message


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (("model_type",), (None, 1, [], {}, "owl")),
        (("vision_config",), (1, "x", [], [1], True)),
        (("text_config",), (0, "", [1])),
        (("vision_config", "hidden_act"), (1, [], {}, None)),
        (("text_config", "hidden_act"), (True, [1])),
        (("vision_config", "layer_norm_eps"), ("1e-5", [], float("nan"), None, 10**400)),
    ],
)
def test_other_settings_of_odd_type_are_named(
    folder: Path, keys: tuple[str, ...], values: tuple[Any, ...]
) -> None:
    for value in values:
        message = _refused(folder, "config.json", _with(hf_folder.config(), keys, value))
        assert ".".join(keys) in message, (value, message)


@pytest.mark.parametrize("kind", ["owlvit", "owlv2"])
@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("image_mean", (1, "x", {}, [1], [None] * 3, ["a"] * 3, [1e400] * 3, [10**400] * 3)),
        ("image_std", (True, [1, 2], [[1], [2], [3]], [float("nan")] * 3)),
        ("resample", ([], {}, "2", 1.5, True, 7)),
        ("do_resize", (0, "false", [], {}, False)),
        ("do_rescale", (0, "yes", False)),
        ("do_center_crop", (1, "no", [], {})),
        ("rescale_factor", ("x", [], float("nan"), float("inf"), 1, None)),
        ("size", ({}, [], "x", 31, {"height": [1], "width": None}, {"shortest_edge": 32})),
        ("image_processor_type", (1, [], {}, "ViTImageProcessor")),
        ("feature_extractor_type", (1, [1])),
    ],
)
def test_preprocessing_of_odd_type_is_named(
    folder: Path, kind: str, key: str, values: tuple[Any, ...]
) -> None:
    base = hf_folder.processor(kind)
    if key == "feature_extractor_type":
        del base["image_processor_type"]
    for value in values:
        message = _refused(folder, "preprocessor_config.json", json.dumps(base | {key: value}))
        assert key in message, (value, message)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"{" * 5000,
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"9" * 9999,
    ],
    ids=range(8),
)
def test_what_is_no_json_object_is_refused(folder: Path, file: str, content: bytes) -> None:
    _refused(folder, file, content)


def test_null_is_what_transformers_takes_it_for(folder: Path, tmp_path: Path) -> None:
    keys = ("image_mean", "image_std", "resample", "do_resize", "do_center_crop")
    nulls = hf_folder.write(tmp_path / "nulls", changed_processor=dict.fromkeys(keys))
    assert huggingface.read(str(nulls)).preprocess == huggingface.read(str(folder)).preprocess


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    made = hf_folder.write(tmp_path)
    content = (made / "config.json").read_bytes()
    (made / "config.json").write_bytes(b"\xef\xbb\xbf" + content)
    assert huggingface.read(str(made)).config.image_size == hf_folder.SIDE


TOWERS = {
    "vision_model.embeddings.patch_embedding.weight": np.zeros((8, 3, 4, 4), np.float32),
    "text_projection.weight": np.zeros((8, 8), np.float32),
}


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"vision_config": []}, "vision_config"),
        ({"text_config": "x"}, "text_config"),
        ({"vision_config": {"hidden_act": []}}, "vision_config.hidden_act"),
        ({"text_config": {"layer_norm_eps": "1"}}, "text_config.layer_norm_eps"),
        ({"vision_config": {"layer_norm_eps": None}}, "vision_config.layer_norm_eps"),
    ],
)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_towers_name_the_field(kind: str, config: dict[str, Any], field: str) -> None:
    positions = np.zeros((4 + (kind == "clip"), 8), np.float32)
    tensors = TOWERS | {"vision_model.embeddings.position_embedding.weight": positions}
    with pytest.raises(CheckpointError, match=f"config.json: {field}: expected"):
        if kind == "clip":
            clip.load(arrays.weights(tensors), config, {})
        else:
            described = {"model_type": "siglip", **config}
            siglip.load(arrays.weights(tensors), described, {}, "spiece.model")


@pytest.mark.parametrize("value", [[], {}, "2", True, 9])
def test_towers_name_resample(value: Any) -> None:
    from owl_det.convert import towers

    with pytest.raises(CheckpointError, match=r"preprocessor_config.json: resample: .* is not one"):
        towers.preprocess_of("here", {"resample": value}, clip.PREPROCESS)


@pytest.mark.parametrize(
    "header",
    [
        "{" * 3000,
        "{'descr': '<f4', 'fortran_order': True, 'shape': (2, True, 3), }",
        "__import__('os').getcwd()",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999, 3), }",
    ],
)
def test_headers_of_npz_members_run_nothing(header: str, tmp_path: Path) -> None:
    text = header.encode()
    text += b" " * (64 - (len(text) + 11) % 64) + b"\n"
    member = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(24)
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("a.npy", member)
    with pytest.raises(CheckpointError, match=r"w.npz: (damaged npz file|tensor a: )") as error:
        weights.open_weights(tmp_path / "w.npz").read("a")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["\ud800", "a\0b", "..", "/etc/passwd", "a/b", 1, None, []])
def test_an_index_names_files_beside_it_alone(name: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"t": name}}))
    with pytest.raises(CheckpointError) as error:
        weights.open_weights(tmp_path)
    assert str(tmp_path) in str(error.value)
