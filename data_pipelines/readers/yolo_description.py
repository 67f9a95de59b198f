"""What files beside YOLO labels tell: class names, key points, and which images are of a split."""

import dataclasses
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_pipelines import image_files, name_lists, text_file
from data_pipelines.features import Names
from data_pipelines.readers import folder
from owl_det.errors import DataError

# In the order of trust. Ultralytics, Roboflow; darknet, CVAT; labelImg, Label Studio.
_YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_YAML_SUFFIXES = (".yaml", ".yml")
_LISTS = ("classes.txt", "obj.names", "_darknet.labels", "classes.names", "names.txt")
_MAX_BYTES = 1 << 20  # of a YAML file that is not called so: with 10,000 names it has 0.3 MiB
# How tools call the splits; a split's own name comes first.
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


@dataclass(frozen=True, kw_only=True)
class Description:
    """The content of such a file."""

    file: Path
    names: Names = ()  # by class number, as they are written; empty = not told
    keypoints: tuple[int, int] | None = None  # how many, and numbers of each (kpt_shape)
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # as written in the file
    path: str = ""  # what the entries of `splits` are relative to, before the file's own folder


def find(places: Sequence[Path]) -> Description | None:
    """The description in the first of the folders that has one; None if none has.

    A YAML file goes before a list of names, which completes it. Raises `DataError` if one is
    malformed, or a folder has several YAML files with names.
    """
    for place in dict.fromkeys(places):
        found = _yaml_file(place)
        if found is not None and found.names:
            return found
        described = [d for d in (found, _names_list(place), _data_file(place)) if d is not None]
        if described:
            named = next((d for d in described if d.names), described[0])
            split = next((d for d in described if d.splits), described[0])
            return dataclasses.replace(
                described[0], file=named.file, names=named.names, splits=split.splits
            )
    return None


def read(file: Path) -> Description:
    """Reads a YAML file, darknet's `.data`, or a list of names. Raises `DataError`."""
    if file.suffix.lower() in _YAML_SUFFIXES:
        return _from_yaml(file, _load(file))
    if file.suffix.lower() == ".data":
        return _from_data(file)
    if any(map(image_files.is_image, text_file.lines(folder.read_text(file, "path")))):
        raise DataError(f"{file}: is a list of images; name the folder or data.yaml")
    return Description(file=file, names=name_lists.read_written(file, is_numbered=True))


def _yaml_file(place: Path) -> Description | None:
    known = next((place / n for n in _YAML_NAMES if os.path.isfile(place / n)), None)
    if known is not None:
        return read(known)
    # Others are called after the data set: coco8.yaml.
    others = [file for file in _files(place) if file.suffix.lower() in _YAML_SUFFIXES]
    described = [file for file in others if "names" in _load_or_nothing(file)]
    if len(described) > 1:
        raise DataError(
            f"{place}: {described[0].name} and {described[1].name} both have class names; call the "
            "one that counts data.yaml"
        )
    return read(described[0]) if described else None


def _names_list(place: Path) -> Description | None:
    known = [place / name for name in _LISTS if os.path.isfile(place / name)]
    found = known or [file for file in _files(place) if file.suffix.lower() == ".names"]
    return read(found[0]) if found else None


def _data_file(place: Path) -> Description | None:
    found = [file for file in _files(place) if file.suffix.lower() == ".data"]
    return read(found[0]) if found else None


def _files(place: Path) -> list[Path]:
    """The files of a folder that are not hidden, sorted."""
    if not os.path.isdir(place):
        return []
    names = sorted(name for name in os.listdir(place) if not image_files.is_hidden(name))
    return [place / name for name in names if os.path.isfile(place / name)]


class _TextLoader(yaml.BaseLoader):
    """Keeps every scalar as it is written: names such as no, 007 or 1e3 are no other types.

    It knows no tags, so none is ever acted upon.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) != len(node.value):
            keys = [key.value for key, _ in node.value if isinstance(key.value, str)]
            twice = next((key for key in keys if keys.count(key) > 1), "a key")
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice} stands twice", node.start_mark
            )
        return mapping


def _load(file: Path) -> dict[Any, Any]:
    text = folder.read_text(file, "path")
    try:
        content = yaml.load(text, Loader=_TextLoader)
    except (yaml.YAMLError, RecursionError) as error:
        told = " ".join(str(error).split())
        raise DataError(f"{file}: is not valid YAML: {told}") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected keys such as `names`, got {_kind(content)}")
    return content


def _load_or_nothing(file: Path) -> dict[Any, Any]:
    """The content of a YAML file that may be anything; nothing if it is of no data set."""
    try:
        return _load(file) if file.stat().st_size < _MAX_BYTES else {}
    except DataError:
        return {}


def _from_yaml(file: Path, content: Mapping[Any, Any]) -> Description:
    names = _yaml_names(content["names"], file) if "names" in content else ()
    count = content.get("nc", "")
    if names and count not in ("", str(len(names))):
        raise DataError(
            f"{file}: nc: {_shown(count)} classes, but names has {len(names)}; correct one of the "
            "two"
        )
    path = content.get("path", "")
    if not isinstance(path, str):
        raise DataError(f"{file}: path: expected a folder, got {_kind(path)}")
    return Description(
        file=file,
        names=names,
        keypoints=_keypoints(content.get("kpt_shape"), file),
        splits=_splits(content, file),
        path=path,
    )


def _yaml_names(names: Any, file: Path) -> Names:
    """Class names by number, of a list, of a mapping with numbers, or of a list in a file."""
    if isinstance(names, str) and names and os.path.isfile(file.parent / names):
        return name_lists.read_written(file.parent / names, is_numbered=True)
    if isinstance(names, dict):
        numbers = [key.strip() if isinstance(key, str) else "" for key in names]
        if sorted(numbers) != sorted(map(str, range(len(numbers)))):
            raise DataError(f"{file}: names: class numbers must run from 0 without gaps")
        by_number = dict(zip(numbers, names.values(), strict=True))
        names = [by_number[str(index)] for index in range(len(numbers))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{file}: names: expected a list of class names, got {_kind(names)}")
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise DataError(f"{file}: names: {index}: expected a name, got {_kind(name)}")
    return tuple(names)


def _keypoints(shape: Any, file: Path) -> tuple[int, int] | None:
    if shape is None or shape == "":
        return None
    numbers = shape if isinstance(shape, list) else ()
    if (
        len(numbers) != 2
        or not all(isinstance(n, str) and re.fullmatch(r"\d{1,4}", n) for n in numbers)
        or numbers[1] not in ("2", "3")
    ):
        raise DataError(
            f"{file}: kpt_shape: expected [number of key points, 2 or 3], got {_shown(shape)}"
        )
    return int(numbers[0]), int(numbers[1])


def _splits(content: Mapping[Any, Any], file: Path) -> dict[str, tuple[str, ...]]:
    """Split → folders, lists or images, as written; a split without any is left out."""
    splits: dict[str, tuple[str, ...]] = {}
    for split, aliases in SPLITS.items():
        for alias in aliases:
            entries = content.get(alias)
            entries = [entries] if isinstance(entries, str) else entries or []
            if not isinstance(entries, list) or not all(isinstance(e, str) for e in entries):
                raise DataError(f"{file}: {alias}: expected folders, got {_kind(entries)}")
            # YAML writes "nothing" in these ways.
            told = tuple(e for e in entries if e not in ("", "~", "null", "None"))
            if told and split not in splits:
                splits[split] = told
    return splits


def _from_data(file: Path) -> Description:
    """Darknet's `key = value` lines, as CVAT writes them."""
    pairs = [
        line.split("=", 1)
        for line in text_file.lines(folder.read_text(file, "path"))
        if "=" in line and not line.lstrip().startswith("#")
    ]
    content = {key.strip(): value.strip() for key, value in pairs}
    # Written for darknet's own folder: data/obj.names.
    listed = Path(content.get("names", "").replace("\\", "/"))
    candidates = (file.parent / listed, file.parent / listed.name)
    found = next((path for path in candidates if listed.name and os.path.isfile(path)), None)
    return Description(
        file=file,
        names=name_lists.read_written(found, is_numbered=True) if found else (),
        splits=_splits(content, file),
    )


def _kind(value: Any) -> str:
    """What a value is, without its content: aliases can make that endless."""
    if value is None:
        return "None"
    if isinstance(value, str):
        return _shown(value)
    if isinstance(value, dict):
        return "a group of keys"
    return "an empty list" if not value else f"a list of {len(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value[:9]):
        return f"[{', '.join(value[:9])}]"
    return repr(value[:60]) if isinstance(value, str) else _kind(value)
