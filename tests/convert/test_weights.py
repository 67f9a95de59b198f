"""Weight files: what is read, and what is refused with one clear line."""

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import save_file

from owl_det.convert import weights
from owl_det.convert.weights import open_weights
from owl_det.errors import CheckpointError


def _tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a/kernel": rng.normal(size=(3, 5)).astype(np.float32),
        "a/bias": rng.normal(size=5).astype(np.float16),
        "b": rng.normal(size=(2, 2)).astype(ml_dtypes.bfloat16),
        "scale": np.array(3.5, np.float32),
        "step": np.array([7], np.int64),
    }


def _nested(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    a = {name[2:]: value for name, value in tensors.items() if name.startswith("a/")}
    return {"a": a, **{name: value for name, value in tensors.items() if "/" not in name}}


def _write(path: Path, kind: str) -> Path:
    tensors = _tensors()
    if kind == "safetensors":
        save_file(tensors, path)
    elif kind == "msgpack":
        path.write_bytes(serialization.msgpack_serialize(_nested(tensors)))
    elif kind == "npz":
        with path.open("wb") as file:
            np.savez(file, **tensors)  # pyright: ignore[reportArgumentType]
    else:
        path.mkdir()
        names = sorted(tensors)
        files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
        for file in set(files.values()):
            save_file({n: tensors[n] for n in names if files[n] == file}, path / file)
        index = {"metadata": {}, "weight_map": files}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("kind", ["safetensors", "msgpack", "npz", "shards"])
def test_every_format_gives_the_same_tensors(kind: str, tmp_path: Path) -> None:
    # The ending says nothing; the content decides.
    read = open_weights(_write(tmp_path / "weights.pt", kind))
    expected = _tensors()
    assert set(read.shapes) == set(expected)
    for name, value in expected.items():
        assert read.shapes[name] == value.shape
        if name == "step":
            assert read.dtypes[name] not in weights.FLOATS
            with pytest.raises(CheckpointError, match="step has dtype .*; weights are float32"):
                read.read(name)
            continue
        assert read.dtypes[name] == value.dtype.name
        assert read.read(name).dtype == np.float32
        np.testing.assert_array_equal(read.read(name), value.astype(np.float32))


def test_chunked_arrays_of_flax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)
    value = np.arange(77, dtype=np.float32).reshape(7, 11)
    file = tmp_path / "big.msgpack"
    file.write_bytes(serialization.msgpack_serialize({"big": value}))
    assert b"__msgpack_chunked_array__" in file.read_bytes()
    read = open_weights(file)
    assert dict(read.shapes) == {"big": (7, 11)}
    np.testing.assert_array_equal(read.read("big"), value)


def test_below_and_renamed(tmp_path: Path) -> None:
    read = open_weights(_write(tmp_path / "w", "safetensors"))
    assert set(read.below("a/").shapes) == {"kernel", "bias"}
    np.testing.assert_array_equal(read.below("a/").read("kernel"), read.read("a/kernel"))
    renamed = read.below("a/").renamed(str.upper)
    np.testing.assert_array_equal(renamed.read("KERNEL"), read.read("a/kernel"))
    with pytest.raises(CheckpointError, match="clash"):
        read.renamed(lambda name: "same")


class _Payload:
    """Unpickling this makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def _torch_zip(payload: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/data/0", bytes(16))
    return buffer.getvalue()


def _object_npz(payload: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.array([payload], dtype=object))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["pickle", "torch", "object array", "folder", "msgpack"])
def test_a_pickle_is_refused_and_not_run(kind: str, tmp_path: Path) -> None:
    mark = tmp_path / "was_run"
    payload = pickle.dumps(_Payload(mark))
    path = tmp_path / "weights.safetensors"
    if kind == "pickle":
        path.write_bytes(payload)
    elif kind == "torch":
        path.write_bytes(_torch_zip(payload))
    elif kind == "object array":
        path.write_bytes(_object_npz(_Payload(mark)))
    elif kind == "msgpack":
        path.write_bytes(msgpack.packb({"a": msgpack.ExtType(1, payload)}))
    else:
        path.mkdir()
        (path / "pytorch_model.bin").write_bytes(payload)
    with pytest.raises(CheckpointError, match="pickle|damaged msgpack") as error:
        open_weights(path)
    assert "\n" not in str(error.value)
    assert not mark.exists()


def _header(entry: dict[str, Any], num_bytes: int) -> bytes:
    header = json.dumps({"a": entry}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(num_bytes)


def _npz(shape: tuple[int, ...], num_bytes: int) -> bytes:
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        member, {"descr": "<f4", "fortran_order": False, "shape": shape}
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.npy", member.getvalue() + bytes(num_bytes))
    return buffer.getvalue()


def _npz_of(member: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.npy", member)
    return buffer.getvalue()


def _deflated_npz(damage: bool) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, a=np.arange(1000, dtype=np.float32))
    content = bytearray(buffer.getvalue())
    start = content.index(b"a.npy") + len("a.npy") + 20  # the local header has an extra field
    if damage:
        content[start : start + 8] = b"\xff" * 8
    return bytes(content)


def _npz_twice() -> bytes:
    """Two members of one name, which a dictionary would take for one."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.npy", _npy(np.zeros(1, np.float32)))
        archive.writestr("b.npy", _npy(np.ones(1, np.float32)))
    return buffer.getvalue().replace(b"b.npy", b"a.npy")


def _npy(value: np.ndarray) -> bytes:
    member = io.BytesIO()
    np.save(member, value)
    return member.getvalue()


def _flax(shape: Any, dtype: str, num_bytes: int) -> bytes:
    array = msgpack.ExtType(1, msgpack.packb((shape, dtype, bytes(num_bytes))))
    return msgpack.packb({"a": array})


def _chunks(shape: dict[str, Any], chunks: Any) -> bytes:
    tree = {"a": {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks}}
    return serialization.msgpack_serialize(tree)


def _deep(depth: int) -> bytes:
    return b"\x81\xa1a" * depth + b"\xc0"


BROKEN = {
    "empty": b"",
    "text": b"hello, weights",
    "html": b"<!DOCTYPE html>\n<html>",
    "only a header": _header({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, 0),
    "truncated": _header({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, 15),
    "absurd shape": _header({"dtype": "F32", "shape": [2**60], "data_offsets": [0, 16]}, 16),
    "overflowing": _header({"dtype": "F32", "shape": [2**33, 2**31], "data_offsets": [0, 0]}, 0),
    "negative": _header({"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}, 16),
    "unknown dtype": _header({"dtype": "PY", "shape": [4], "data_offsets": [0, 16]}, 16),
    "no JSON": struct.pack("<Q", 4) + b"{{{{" + bytes(8),
    "zip cut": _npz((4,), 16)[:40],
    "npz too long": _npz((4,), 20),
    "npz absurd": _npz((2**50,), 16),
    "npz absurd and empty": _npz((0, 10**20), 0),
    "npz name twice": _npz_twice(),
    "msgpack name twice": b"\x82\xa1a\x01\xa1a\x02",
    "msgpack cut": _flax([4], "float32", 16)[:-3],
    "msgpack absurd": _flax([2**50], "float32", 16),
    "msgpack too short": _flax([4], "float32", 15),
    "msgpack negative": _flax([-4], "float32", 16),
    "msgpack many axes": _flax([1] * 40, "float32", 4),
    "msgpack dtype": _flax([4], "object", 16),
    "msgpack shape": _flax("four", "float32", 16),
    "msgpack deep": _deep(100_000),
    "msgpack number keys": msgpack.packb({1: {2: 3}}),
    "npz deflate": _deflated_npz(damage=True),
    "npz header": _npz_of(b"\x93NUMPY\x01\x00\x76\x00" + b"-" * 116 + b"1\n"),
    "msgpack dtype number": msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(([1], 3, b"")))}),
    "chunks without shape": msgpack.packb({"a": {"__msgpack_chunked_array__": True}}),
    "chunks too few": _chunks({"0": 4}, {"0": np.zeros(3, np.float32)}),
    "chunks no arrays": _chunks({"0": 4}, {"0": 1}),
    "chunks none": _chunks({"0": 4}, {}),
    "chunks unnumbered": _chunks({"x": 4}, {"0": np.zeros(4, np.float32)}),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_one_clear_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(BROKEN[kind])
    with pytest.raises(CheckpointError, match=str(path)) as error:
        open_weights(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "expected a JSON object"),
        ("{}", "weight_map is missing"),
        ('{"weight_map": {"a": "../../secret"}}', "is not a file beside the index"),
        ('{"weight_map": {"a": 3}}', "is not a file beside the index"),
        ('{"weight_map": {"a": ""}}', "is not a file beside the index"),
        ('{"weight_map": {"a": ".."}}', "is not a file beside the index"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors: no such file"),
        ('{"weight_map": {"other": "there.safetensors"}}', "tensor other is missing"),
    ],
)
def test_broken_indices_are_one_clear_line(index: str, message: str, tmp_path: Path) -> None:
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "there.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message) as error:
        open_weights(tmp_path)
    assert "\n" not in str(error.value)


def test_members_of_an_npz_may_have_any_name(tmp_path: Path) -> None:
    value = np.arange(3, dtype=np.float32)
    # Python 2 wrote its long integers with an L, of which NumPy warns.
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (3L,), }".ljust(117) + b"\n"
    old = b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + value.tobytes()
    with zipfile.ZipFile(tmp_path / "w", "w") as archive:
        archive.writestr("plain", _npy(value))
        archive.writestr("old.npy", old)
    read = open_weights(tmp_path / "w")
    assert set(read.shapes) == {"plain", "old"}
    for name in read.shapes:
        np.testing.assert_array_equal(read.read(name), value)


def test_what_an_index_leaves_out_of_a_shard_is_there(tmp_path: Path) -> None:
    tensors = {name: np.full(2, i, np.float32) for i, name in enumerate("ab")}
    save_file(tensors, tmp_path / "s.safetensors")
    index = {"weight_map": {"a": "s.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    read = open_weights(tmp_path)
    assert list(read.shapes) == ["a", "b"]
    np.testing.assert_array_equal(read.read("b"), tensors["b"])


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        open_weights(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no model.safetensors"):
        open_weights(tmp_path)
