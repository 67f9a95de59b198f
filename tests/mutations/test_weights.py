"""Weight files, mutated: every tensor of a file that is read is there with its values.

Pickles are never loaded, whatever the file is called.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from owl_det.convert.weights import FLOATS, open_weights
from owl_det.errors import CheckpointError
from tests.mutations import harness, raw, trees, weight_files
from tests.mutations.harness import Case

_KINDS = ("safetensors", "safetensors", "npz", "msgpack", "shards", "pickle")
_ENDINGS = (".safetensors", ".npz", ".msgpack", ".bin", ".pt", ".pkl", ".npy", "")
_INDEX = "model.safetensors.index.json"


@harness.COUNTS
def test_mutated_weights(count: int, tmp_path: Path) -> None:
    harness.check(_case, count, tmp_path / "data")


def test_the_unmutated_are_read_whole(tmp_path: Path) -> None:
    for seed in range(20):
        for kind in ("safetensors", "npz", "msgpack", "shards"):
            rng = np.random.default_rng(seed)
            made = weight_files.tensors(rng)
            case = _of_kind(kind, made, rng, tmp_path / f"{kind}{seed}", is_good=True)
            found = harness.read_and_verify(case)
            for name, value in made.items():
                if name != "step":
                    np.testing.assert_array_equal(found[name], value.astype(np.float32))


def _reproduce(seed: int) -> Any:
    return harness.reproduce(_case, seed)


def _case(rng: np.random.Generator, folder: Path) -> Case:
    return _of_kind(trees.pick(rng, _KINDS), weight_files.tensors(rng), rng, folder)


def _of_kind(
    kind: str,
    made: weight_files.Tensors,
    rng: np.random.Generator,
    folder: Path,
    is_good: bool = False,
) -> Case:
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / "was_run"
    mutations = 0 if is_good else int(rng.integers(0, 4))
    if kind == "shards":
        return _shards(made, rng, folder, mutations)
    if kind == "safetensors":
        content = weight_files.safetensors(made, rng, mutations)
    elif kind == "npz":
        content = weight_files.npz(made, rng, mutations, mark)
    elif kind == "msgpack":
        content = weight_files.flax_msgpack(made, rng, mutations)
    else:
        content = weight_files.pickled(rng, mark)
    if not is_good and rng.random() < 0.3:
        content = raw.mutated(content, rng)
    file = folder / f"weights{trees.pick(rng, _ENDINGS)}"
    file.write_bytes(content.replace(b"was_run", bytes(mark)) if b"touch" in content else content)
    return _written(file, mark, lambda: _expected(kind, content), [file.name])


def _shards(
    made: weight_files.Tensors, rng: np.random.Generator, folder: Path, mutations: int
) -> Case:
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(made)}
    index: Any = {"metadata": {"total_size": 1}, "weight_map": files}
    for _ in range(mutations):
        index = trees.mutated(index, rng)
    text = trees.as_json(index, rng).encode()
    text = raw.mutated(text, rng) if mutations == 3 else text
    (folder / _INDEX).write_bytes(text)
    for file in sorted(set(files.values())):
        part = {name: made[name] for name in made if files[name] == file}
        (folder / file).write_bytes(weight_files.safetensors(part, rng, mutations=0))

    def expected() -> weight_files.Tensors:
        # Files that the index does not name are other models' affair.
        known = set(json.loads(text.decode("utf-8-sig"))["weight_map"].values())
        return {name: value for name, value in made.items() if files[name] in known}

    return _written(folder, folder / "was_run", expected, [str(folder)])


def _written(path: Path, mark: Path, expected: Callable[[], Any], names: list[str]) -> Case:
    def read() -> dict[str, np.ndarray | None]:
        weights = open_weights(path)
        assert weights.shapes.keys() == weights.dtypes.keys()
        found: dict[str, np.ndarray | None] = {}
        for name, shape in weights.shapes.items():
            try:
                value = weights.read(name)
            except CheckpointError as error:
                harness.check_message(str(error), names)
                found[name] = None
                continue
            assert weights.dtypes[name] in FLOATS
            assert value.shape == tuple(shape) and value.dtype == np.float32
            found[name] = value
        return found

    def verify(found: dict[str, np.ndarray | None], lines: list[str]) -> None:
        assert not mark.exists()
        wanted = expected()
        numbers = f"{len(wanted)} tensors in the file, {len(found)} read"
        assert set(found) == set(wanted), numbers
        for name, value in found.items() if isinstance(wanted, dict) else []:
            if value is not None:
                same = np.asarray(wanted[name], np.float32).reshape(value.shape)
                np.testing.assert_array_equal(value, same)

    return Case(read=read, verify=verify, names=names)


def _expected(kind: str, content: bytes) -> Any:
    """The tensors of a file, or the names alone where the format is too wide for a few lines."""
    if content[8:9] == b"{":
        return weight_files.read_safetensors(content)
    if content.startswith(b"PK"):
        return weight_files.read_npz(content)
    return weight_files.read_msgpack(content)
