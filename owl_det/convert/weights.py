"""Weight files of other programs, read without running any code from them.

Shapes and dtypes come from the header; a tensor is read when it is asked for. The format is told
by the content, not by the ending of the name: safetensors (also sharded, with an index), Flax's
msgpack, and NumPy's npz. Pickles (`.pt`, `.bin`, object arrays) are refused.
"""

import json
import mmap
import os
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import msgpack
import numpy as np
from safetensors import SafetensorError, safe_open

from owl_det import files
from owl_det.errors import CheckpointError

MAX_TENSOR_BYTES = 16 * 2**30  # in float32; the largest published tensor here has 1.6 GB
MAX_INDEX_BYTES = 64 * 2**20  # of a JSON file beside the weights
MAX_AXES = 8

FLOATS = ("float32", "float16", "bfloat16")  # what weights may be; all are exact in float32

_SAFETENSORS_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FLAX_DTYPES: dict[str, Any] = {
    name: np.dtype(name)
    for name in "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float64".split()
} | {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_PICKLE = (
    "is a pickle, which could run code and is not read; save the weights as safetensors instead"
)


@dataclass(frozen=True)
class Weights:
    """Named tensors of a file or folder."""

    source: str  # for messages
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]  # one of FLOATS, or the name of what cannot be read
    read: Callable[[str], np.ndarray]  # float32; raises CheckpointError

    def below(self, prefix: str) -> "Weights":
        """The tensors whose names start with `prefix`, which is cut off."""
        names = {name.removeprefix(prefix): name for name in self.shapes if name.startswith(prefix)}
        return Weights(
            self.source,
            {short: self.shapes[name] for short, name in names.items()},
            {short: self.dtypes[name] for short, name in names.items()},
            lambda short: self.read(names[short]),
        )

    def renamed(self, rename: Callable[[str], str]) -> "Weights":
        """The same tensors under other names. Raises `CheckpointError` if two become one."""
        names: dict[str, str] = {}
        for name in self.shapes:
            if rename(name) in names:
                raise CheckpointError(f"{self.source}: {name} and {names[rename(name)]} clash")
            names[rename(name)] = name
        return Weights(
            self.source,
            {new: self.shapes[name] for new, name in names.items()},
            {new: self.dtypes[name] for new, name in names.items()},
            lambda new: self.read(names[new]),
        )


def open_weights(path: str | os.PathLike[str]) -> Weights:
    """Opens a weight file, or a folder with `model.safetensors` or its sharded form.

    Raises `CheckpointError`, with one line, if it is missing, damaged, of an unknown format or a
    pickle.
    """
    path = Path(path)
    try:
        return _open_folder(path) if path.is_dir() else _open_file(path)
    except FileNotFoundError as error:  # of a folder, perhaps a file that its index names
        raise CheckpointError(f"{error.filename or path}: no such file or folder") from None
    except (OSError, ValueError) as error:  # the latter of names that no file can have
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a small file. Raises `CheckpointError` naming it."""
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise CheckpointError(f"{path}: larger than {MAX_INDEX_BYTES} bytes")
        value = json.loads(files.read_text(path, "utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


def _open_file(path: Path) -> Weights:
    head = files.open_range(path, 0, 16)
    if head[8:9] == b"{" and head[4:8] == bytes(4):
        return _open_safetensors(path)
    if head[:4] == b"PK\x03\x04":
        return _open_npz(path)
    if head[:1] == b"\x80" and len(head) > 1:
        raise CheckpointError(f"{path}: {_PICKLE}")
    if head and (0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)):  # a map that is not empty
        return _open_msgpack(path)
    raise CheckpointError(f"{path}: not a whole safetensors, msgpack or npz file")


def _open_folder(folder: Path) -> Weights:
    if (folder / "model.safetensors.index.json").exists():
        return _open_shards(folder)
    if (folder / "model.safetensors").exists():
        return _open_file(folder / "model.safetensors")
    if pickled := sorted(folder.glob("*.bin")):
        raise CheckpointError(f"{pickled[0]}: {_PICKLE}")
    raise CheckpointError(f"{folder}: holds no model.safetensors and no index of its shards")


# --- safetensors ---------------------------------------------------------------------------------


def _open_safetensors(path: Path) -> Weights:
    try:
        file: Any = safe_open(files.fetch(path), framework="numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        dtypes = {
            name: _SAFETENSORS_NAMES.get(str(part.get_dtype()), str(part.get_dtype()))
            for name, part in slices.items()
        }
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged safetensors file ({error})") from None

    def read(name: str) -> np.ndarray:
        _check_readable(path, name, dtypes[name], shapes[name])
        try:
            return np.asarray(file.get_tensor(name), np.float32)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: tensor {name}: {error}") from None

    return Weights(str(path), shapes, dtypes, read)


def _open_shards(folder: Path) -> Weights:
    index = folder / "model.safetensors.index.json"
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: weight_map is missing or empty")
    shards: dict[str, Weights] = {}
    for name, file in places.items():
        if not isinstance(file, str) or file in ("", "..") or Path(file).name != file:
            raise CheckpointError(f"{index}: {name}: {file!r} is not a file beside the index")
        if file not in shards:
            shards[file] = _open_file(folder / file)  # never a folder, which may name itself
        if name not in shards[file].shapes:
            raise CheckpointError(f"{folder / file}: tensor {name} is missing")
    # What the index leaves out of a shard is there all the same.
    inside = {name: file for file, shard in shards.items() for name in shard.shapes}
    places |= {name: file for name, file in inside.items() if name not in places}
    return Weights(
        str(folder),
        {name: shards[file].shapes[name] for name, file in places.items()},
        {name: shards[file].dtypes[name] for name, file in places.items()},
        lambda name: shards[places[name]].read(name),
    )


# --- npz -----------------------------------------------------------------------------------------

# RuntimeError: members that ask for a password, and unknown compression.
_DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, RuntimeError)
_DAMAGED_ZIP += (SyntaxError, TypeError, tokenize.TokenError, MemoryError)  # of headers


def _open_npz(path: Path) -> Weights:
    try:
        archive = zipfile.ZipFile(files.fetch(path))
        if any(name.endswith(".pkl") for name in archive.namelist()):
            raise CheckpointError(f"{path}: {_PICKLE}")
        members = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise ValueError("two members have one name")
        headers = {name: _npy_header(archive, member) for name, member in members.items()}
    except _DAMAGED_ZIP as error:
        raise CheckpointError(f"{path}: damaged npz file ({error})") from None

    def read(name: str) -> np.ndarray:
        shape, dtype = headers[name]
        _check_readable(path, name, dtype, shape)
        try:
            with archive.open(members[name]) as member, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of headers that Python 2 wrote
                values = np.lib.format.read_array(member, allow_pickle=False)
        except _DAMAGED_ZIP as error:
            raise CheckpointError(f"{path}: tensor {name}: {error}") from None
        # NumPy has no bfloat16 of its own and writes it as two nameless bytes.
        values = values.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else values
        return np.asarray(values, np.float32)

    return Weights(
        str(path),
        {name: shape for name, (shape, _) in headers.items()},
        {name: dtype for name, (_, dtype) in headers.items()},
        read,
    )


def _npy_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[tuple[int, ...], str]:
    """Shape and dtype, without the values. Raises `ValueError` if these are more or fewer."""
    with archive.open(member) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers that Python 2 wrote
        shape, dtype = _read_npy_header(file)
        length = file.tell() + _num_values(_checked_shape(shape)) * dtype.itemsize
    if dtype.hasobject:
        raise ValueError(f"{member.filename} holds pickled Python objects, which are not read")
    if length != member.file_size:
        raise ValueError(f"{member.filename} of shape {shape} is not {member.file_size} bytes long")
    return shape, "bfloat16" if dtype.str == "|V2" else dtype.name


def _read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy format {version} is not known")
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    return shape, dtype


# --- msgpack -------------------------------------------------------------------------------------


# RecursionError and the like: what a hostile nesting may lead to.
_DAMAGED_MSGPACK = (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException)
_DAMAGED_MSGPACK += (RecursionError, MemoryError)


def _open_msgpack(path: Path) -> Weights:
    """A tree that Flax serialised; names are paths with slashes. Leaves that are no arrays go."""
    with files.open_read(files.fetch(path)) as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        tree = msgpack.unpackb(data, ext_hook=_flax_leaf, object_pairs_hook=_distinct, raw=False)
        if not isinstance(tree, dict):
            raise ValueError("not a tree of names")
        leaves: dict[str, list[np.ndarray]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, chunks, shape in _flax_arrays(tree, ""):
            if name in leaves:
                raise ValueError(f"{name} is there twice")
            leaves[name], shapes[name] = chunks, shape
    except _DAMAGED_MSGPACK as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: damaged msgpack file ({reason})") from None
    finally:
        data.close()
    dtypes = {name: chunks[0].dtype.name for name, chunks in leaves.items()}

    def read(name: str) -> np.ndarray:
        _check_readable(path, name, dtypes[name], shapes[name])
        values = np.concatenate([np.asarray(chunk, np.float32).ravel() for chunk in leaves[name]])
        return values.reshape(shapes[name])

    return Weights(str(path), shapes, dtypes, read)


def _distinct(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice in one tree")
    return dict(pairs)


def _flax_leaf(code: int, data: bytes) -> Any:
    """Flax's extension types: 1 an array, 3 a NumPy scalar; others (2: complex) mean nothing here.

    Raises `ValueError` if the bytes are not as many as shape and dtype say.
    """
    if code not in (1, 3):
        return None
    shape, dtype_name, values = msgpack.unpackb(data, raw=True)
    name = dtype_name.decode("ascii")
    if name not in _FLAX_DTYPES:
        raise ValueError(f"dtype {name[:20]!r} is not known")
    shape = _checked_shape(shape)
    dtype = np.dtype(_FLAX_DTYPES[name])
    if not isinstance(values, bytes) or len(values) != _num_values(shape) * dtype.itemsize:
        raise ValueError(f"an array of shape {shape} and {name} has {len(values)} bytes")
    return np.frombuffer(values, dtype).reshape(shape)


def _flax_arrays(
    tree: dict[str, Any], prefix: str
) -> Iterator[tuple[str, list[np.ndarray], tuple[int, ...]]]:
    """Path, parts and shape of every array; Flax cuts those of more than 1 GB into parts."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, np.ndarray):
            yield name, [value], value.shape
        elif isinstance(value, dict) and "__msgpack_chunked_array__" in value:
            shape = _checked_shape(_in_order(value["shape"]))
            chunks = _in_order(value["chunks"])
            if not chunks or not all(isinstance(chunk, np.ndarray) for chunk in chunks):
                raise ValueError(f"{name}: parts of an array are missing")
            if sum(chunk.size for chunk in chunks) != _num_values(shape):
                raise ValueError(f"{name}: its parts do not make an array of shape {shape}")
            if len({chunk.dtype for chunk in chunks}) > 1:
                raise ValueError(f"{name}: its parts differ in dtype")
            yield name, chunks, shape
        elif isinstance(value, dict):
            yield from _flax_arrays(value, f"{name}/")


def _in_order(numbered: Any) -> list[Any]:
    """The values of {"0": …, "1": …}."""
    if not isinstance(numbered, dict):
        raise ValueError("parts of an array are not numbered")
    keys = [str(i) for i in range(len(numbered))]
    if set(keys) != set(numbered):
        raise ValueError("parts of an array are not numbered from 0")
    return [numbered[key] for key in keys]


# --- checks --------------------------------------------------------------------------------------


def _checked_shape(shape: Any) -> tuple[int, ...]:
    is_shape = isinstance(shape, (list, tuple)) and len(shape) <= MAX_AXES
    if not is_shape or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise ValueError(f"{str(shape)[:60]} is not a shape")
    return tuple(shape)


def _num_values(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=object))


def _check_readable(path: Path, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    if dtype not in FLOATS:
        raise CheckpointError(
            f"{path}: tensor {name} has dtype {dtype}; weights are {', '.join(FLOATS)}"
        )
    if _num_values(shape) * 4 > MAX_TENSOR_BYTES:
        raise CheckpointError(f"{path}: tensor {name} of shape {shape} is absurdly large")
