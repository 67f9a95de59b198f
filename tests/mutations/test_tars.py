"""WebDataset's tar files, mutated: every image is read, or said to be lost."""

import io
import itertools
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import image_files
from data_pipelines.open_source import open_source
from data_pipelines.readers.tar_shards import MAX_MEMBER_BYTES
from owl_det.config import ImageTextSource
from tests.mutations import harness, pictures, raw, tars
from tests.mutations.harness import Case
from tests.mutations.tars import Part

_FILES = ("shard-0.tar", "shard-1.tar")
_DAMAGED = -1  # stands for the place of damage among the members of a tar file


@harness.COUNTS
def test_mutated_tars(count: int, tmp_path: Path) -> None:
    # Nearly always something can be read; what is lost is counted.
    harness.check(_case, count, tmp_path / "data", min_share=0.01)


def test_the_unmutated_are_read_whole(tmp_path: Path) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        parts = _good(rng)
        case = _written({_FILES[0]: tars.written(parts, rng)}, tmp_path)
        opened, records = harness.read_and_verify(case)
        assert [r.image for r in records] == [p.content for p in parts if p.name.endswith("jpg")]
        assert all(record.captions for record in records)


def _reproduce(seed: int) -> Any:
    return harness.reproduce(_case, seed)


def _case(rng: np.random.Generator, folder: Path) -> Case:
    files = {}
    for name in _FILES[: int(rng.integers(1, 3))]:
        parts = _good(rng)
        for _ in range(rng.integers(1, 4)):
            parts = tars.mutated(parts, rng)
        content = tars.written(parts, rng)
        if rng.random() < 0.35:
            content = tars.with_other_header(content, rng)
        files[name] = raw.mutated(content, rng) if rng.random() < 0.1 else content
    return _written(files, folder)


def _written(files: dict[str, bytes], folder: Path) -> Case:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    entry = ImageTextSource(path=str(folder))

    def read() -> Any:
        opened = open_source(entry, "")
        return opened, harness.records(opened, str(folder))

    def verify(value: Any, lines: list[str]) -> None:
        opened, records = value
        members = [_members(content) for content in files.values()]
        expected = sum(map(_num_samples, members))
        said = [re.search(r"(\d+) images are left out", line) for line in lines]
        found = len(opened) + sum(int(match[1]) for match in said if match)
        assert found == expected, f"{expected} images or samples without, {found} read or lost"
        images = {content for of_file in members for _, content in of_file}
        assert all(r.image in images for r in records if r is not None), "bytes of no member"

    return Case(read=read, verify=verify, names=[str(folder)])


def _num_samples(members: list[tuple[Any, bytes]]) -> int:
    """The images of a tar file, the keys without one, and the damage that ends it."""
    total = 0
    for key, group in itertools.groupby(members, lambda member: _key(member[0])):
        if key != _DAMAGED:
            total += max(1, sum(_is_image(name) for name, _ in group))
    return total + (members[-1:] == [(_DAMAGED, b"")] or not members)


def _key(name: Any) -> Any:
    folder, _, file = name.rpartition("/") if name != _DAMAGED else ("", "", "")
    return _DAMAGED if name == _DAMAGED else (folder, file.split(".")[0])


def _is_image(name: str) -> bool:
    return "." in name.split("/")[-1] and image_files.is_image("x." + name.split(".")[-1])


def _members(content: bytes) -> list[tuple[Any, bytes]]:
    """Name and content of each member, folders and hidden ones aside; the damage, if there is."""
    found: list[tuple[Any, bytes]] = []
    try:
        tar = tarfile.open(fileobj=io.BytesIO(content), mode="r:")
        for member in tar:
            name = member.name.encode("utf-8", "backslashreplace").decode()
            is_cut = member.offset_data + member.size > len(content)
            is_refused = member.issparse() or member.size > MAX_MEMBER_BYTES
            is_left_out = member.isdir() or image_files.is_hidden(name)
            is_cut = is_cut and member.isfile() and not is_refused and not is_left_out
            if is_cut or member.size < 0:
                return [*found, (_DAMAGED, b"")]
            if not is_left_out and (member.isfile() or _is_image(name)):
                start = member.offset_data
                found.append((name, content[start : start + member.size]))
        is_ended = not content[tar.offset :].strip(b"\0")
    except (tarfile.TarError, ValueError, OSError, OverflowError):
        is_ended = False
    return found if is_ended else [*found, (_DAMAGED, b"")]


# --- good files ----------------------------------------------------------------------------------


def _good(rng: np.random.Generator) -> list[Part]:
    parts = []
    for number in range(int(rng.integers(1, 5))):
        key = f"{number:04d}" if rng.random() < 0.8 else f"part/{number:04d}"
        text = f"a picture of {number}"
        parts.append(Part(name=f"{key}.jpg", content=pictures.jpeg(20 + number, 20)))
        if rng.random() < 0.5:
            parts.append(Part(name=f"{key}.txt", content=text.encode()))
        else:
            parts.append(Part(name=f"{key}.json", content=json.dumps({"caption": text}).encode()))
    return parts
