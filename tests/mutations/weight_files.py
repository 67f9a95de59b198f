"""Weight files of other programs, written by hand so that every part of them can be wrong."""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import msgpack
import numpy as np
from flax import serialization

from tests.mutations import raw, trees
from tests.mutations.trees import pick

Tensors = dict[str, np.ndarray]
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "bool": "BOOL"}


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def tensors(rng: np.random.Generator) -> Tensors:
    """A few small tensors of every dtype that weights have."""
    dtypes = (np.float32, np.float32, np.float16, ml_dtypes.bfloat16)
    shapes = ((), (3,), (2, 3), (2, 1, 2), (0, 4))
    made = {
        f"layer_{i}/{pick(rng, ('kernel', 'bias'))}": rng.normal(size=pick(rng, shapes)).astype(
            pick(rng, dtypes)
        )
        for i in range(int(rng.integers(1, 5)))
    }
    return made | ({"step": np.array([7], np.int64)} if rng.random() < 0.3 else {})


# --- safetensors ---------------------------------------------------------------------------------


def safetensors(made: Tensors, rng: np.random.Generator, mutations: int) -> bytes:
    header, data = safetensors_parts(made)
    for _ in range(mutations):
        header = trees.mutated(header, rng)
    text = trees.as_json(header, rng).encode()
    length = struct.pack("<Q", len(text))
    if mutations and rng.random() < 0.15:
        length = struct.pack(
            "<Q", pick(rng, (0, 1, len(text) - 1, len(text) + 1, 2**40, 2**64 - 1))
        )
    if mutations and rng.random() < 0.2:
        data = pick(rng, (data[:-1], data + b"\0", data + data, b"", data[4:]))
    return length + text + data


def safetensors_parts(made: Tensors) -> tuple[dict[str, Any], bytes]:
    """The header and the values."""
    header: dict[str, Any] = {"__metadata__": {"format": "np"}}
    data = b""
    for name, value in made.items():
        content = value.tobytes()
        offsets = [len(data), len(data) + len(content)]
        code = _CODES[value.dtype.name]
        header[name] = {"dtype": code, "shape": list(value.shape), "data_offsets": offsets}
        data += content
    return header, data


def read_safetensors(content: bytes) -> Tensors:
    """Names and values by the definition of the format; as float32."""
    size = int.from_bytes(content[:8], "little")
    found: Tensors = {}

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len({key for key, _ in pairs}) == len(pairs), "a key stands twice"
        return dict(pairs)

    for name, entry in json.loads(content[8 : 8 + size], object_pairs_hook=distinct).items():
        if name != "__metadata__":
            if isinstance(entry, list):  # which the library takes for the values in this order
                entry = dict(zip(("dtype", "shape", "data_offsets"), entry, strict=True))
            start, end = entry["data_offsets"]
            values = content[8 + size + start : 8 + size + end]
            dtype = {code: name for name, code in _CODES.items()}.get(entry["dtype"])
            found[name] = (
                np.frombuffer(values, dtype).reshape(entry["shape"]) if dtype else np.zeros(0)
            )
    return found


# --- npz -----------------------------------------------------------------------------------------


def npz(made: Tensors, rng: np.random.Generator, mutations: int, mark: Path) -> bytes:
    members = {f"{name}.npy": npy(value) for name, value in made.items()}
    names = list(members)
    for _ in range(mutations):
        name = pick(rng, list(members))
        kind = pick(rng, ("raw", "header", "header", "pickle", "rename", "other"))
        if kind == "raw":
            members[name] = raw.mutated(members[name], rng)
        elif kind == "header":
            members[name] = _with_npy_header(members[name], rng)
        elif kind == "pickle":
            members[name] = npy(np.array([Payload(mark)], object))
        elif kind == "rename":
            members[pick(rng, _MEMBER_NAMES)] = members.pop(name)
        else:
            members[pick(rng, _MEMBER_NAMES)] = pick(
                rng, (b"", b"text", pickle.dumps(Payload(mark)))
            )
    buffer = io.BytesIO()
    with zipfile.ZipFile(
        buffer, "w", pick(rng, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    ) as made_:
        for name, content in members.items():
            made_.writestr(name, content)
    content = buffer.getvalue()
    if mutations and rng.random() < 0.2:  # a name of the same length: two members of one name
        content = content.replace(names[0].encode(), pick(rng, names).encode()[: len(names[0])])
    return content


_MEMBER_NAMES = (
    "../up.npy",
    "/abs.npy",
    "a.npy.npy",
    ".npy",
    "x",
    "data.pkl",
    "a/data.pkl",
    "é.npy",
)
_MEMBER_NAMES += ("step.npy", "layer_0/kernel.npy", "folder/", "a.NPY", "a.npz")
_HEADERS = (
    "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 2), }",
    "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000, 1000000), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': 'x', }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,), }",
    "{'descr': '<U4', 'fortran_order': False, 'shape': (3,), }",
    "{'descr': '>f4', 'fortran_order': False, 'shape': (3,), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }",
    "{'descr': 'nonsense', 'fortran_order': False, 'shape': (3,), }",
    "{'descr': __import__('os').system('touch was_run'), 'shape': (3,), }",
    "{" * 500,
    "(" * 5000,
    "[1, 2]",
    "{'descr': '<f4', 'shape': (3,), }",
    "{'descr': '<f4', 'fortran_order': 1, 'shape': (3.0,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 99999999999999999999), }",
)


def npy(value: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=True)
    return buffer.getvalue()


def _with_npy_header(content: bytes, rng: np.random.Generator) -> bytes:
    header = pick(rng, _HEADERS).encode() + b"\n"
    version = pick(rng, (b"\x01\0", b"\x01\0", b"\x02\0", b"\x03\0", b"\x09\0"))
    length = struct.pack("<H" if version == b"\x01\0" else "<I", len(header))
    start = 10 + int.from_bytes(content[8:10], "little")
    return b"\x93NUMPY" + version + length + header + content[start:]


def read_npz(content: bytes) -> Tensors:
    """As `read_safetensors`; every member counts, also two of one name."""
    found: Tensors = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            assert name not in found, f"{name} is there twice"
            value = np.load(io.BytesIO(archive.read(member)), allow_pickle=False)
            found[name] = value.view(ml_dtypes.bfloat16) if value.dtype.str == "|V2" else value
    return found


# --- msgpack -------------------------------------------------------------------------------------


def flax_msgpack(made: Tensors, rng: np.random.Generator, mutations: int) -> bytes:
    """A tree as Flax writes it; leaves may be of other types, or cut into parts that do not fit."""
    tree: dict[str, Any] = nested(made)
    for _ in range(mutations):
        node = pick(rng, [tree, *(value for value in tree.values() if isinstance(value, dict))])
        key = pick(rng, list(node) or ["x"])
        node[pick(rng, (key, key, "", "a/b", "new"))] = pick(rng, _leaves(rng))
    content = serialization.msgpack_serialize(tree)
    if mutations and rng.random() < 0.3:
        content = _with_raw_leaf(rng)
    return content


def nested(made: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in made.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    return tree


def _leaves(rng: np.random.Generator) -> tuple[Any, ...]:
    part = np.zeros(2, np.float32)
    parts = {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 2}, "chunks": {"0": part}}
    return (
        *(None, 5, "text", b"bytes", {}, {"x": {}}, [1, 2], True, 1.5, 2**63),
        *(parts, {**parts, "chunks": {"0": part, "2": part}}, {**parts, "shape": {"0": -4}}),
        *({**parts, "chunks": {"0": part, "1": part.astype(np.int64)}}, {**parts, "shape": 4}),
        *(np.zeros((0, 3), np.float32), np.array(["a"]), np.zeros(2, np.complex64), np.float64(2)),
        rng.normal(size=(2, 2)).astype(np.float32),
    )


def _with_raw_leaf(rng: np.random.Generator) -> bytes:
    """An array whose shape, dtype or bytes are not as they should be."""
    shape = pick(rng, ([2], [2, 2], [-2], [2**40, 2**40], ["2"], "2", [2] * 50, None, [2.0], [0]))
    dtype = pick(rng, ("float32", "float16", "bfloat16", "object", "", "V2", "<f4", 5, "\u00e9"))
    values = pick(rng, (bytes(8), bytes(4), b"", "text", None, bytes(7)))
    packed: Any = msgpack.packb((shape, dtype, values), use_bin_type=True)
    code = pick(rng, (1, 1, 1, 2, 3, 100))
    leaf = msgpack.ExtType(code, pick(rng, (packed, packed, packed[:-1], b"", packed + packed)))
    content: Any = msgpack.packb({"layer_0": {"kernel": leaf}}, use_bin_type=True)
    return content


class _Extension(NamedTuple):
    """A value of a type that msgpack itself does not have; 1 is Flax's array, 3 its scalar."""

    code: int


def read_msgpack(content: bytes) -> set[str]:
    """The paths of all arrays, each once; those of Flax's parts count as one."""

    def distinct(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        assert len({key for key, _ in pairs}) == len(pairs), "a key stands twice"
        return dict(pairs)

    def paths(tree: dict[str, Any], prefix: str) -> list[str]:
        found = []
        for key, value in tree.items():
            is_chunked = isinstance(value, dict) and "__msgpack_chunked_array__" in value
            if is_chunked or (isinstance(value, _Extension) and value.code in (1, 3)):
                found.append(f"{prefix}{key}")
            elif isinstance(value, dict):
                found += paths(value, f"{prefix}{key}/")
        return found

    tree = msgpack.unpackb(
        content, object_pairs_hook=distinct, ext_hook=lambda code, data: _Extension(code)
    )
    found = paths(tree, "")
    assert len(set(found)) == len(found), "a path stands twice"
    return set(found)


# --- pickles -------------------------------------------------------------------------------------


def pickled(rng: np.random.Generator, mark: Path) -> bytes:
    """What PyTorch and others write; it runs code where it is loaded."""
    payload = pickle.dumps({"a": Payload(mark)}, protocol=int(rng.integers(0, 6)))
    kind = pick(rng, ("plain", "plain", "torch", "object array"))
    if kind == "plain":
        return payload
    if kind == "object array":
        return npy(np.array([Payload(mark)], object))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/data/0", bytes(16))
    return buffer.getvalue()
