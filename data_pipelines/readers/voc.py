"""Pascal VOC: one XML file an image."""

import math
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipelines import image_ops
from data_pipelines.features import Category, Names
from data_pipelines.readers import folder
from data_pipelines.readers.folder import LabelledImage
from owl_det.errors import ConfigError, DataError

_SIDES = ("xmin", "ymin", "xmax", "ymax")


class VocReader(folder.FolderReader):
    """Images and boxes of a folder of VOC XML files; the annotation is taken to be exhaustive.

    VOC counts pixels from 1 and includes the last one, so (xmin, ymin, xmax, ymax) becomes the
    corners (xmin - 1, ymin - 1, xmax, ymax), clipped to the image. Boxes with xmax <= xmin or
    ymax <= ymin in the file are dropped and counted. `difficult` objects are objects like others.
    An image's id is the position, from 1, of its XML file among all of the folder in sorted order,
    whatever the split.
    """

    def __init__(
        self,
        annotations: Path,
        images: Path,
        *,
        split_list: Path | None = None,
        names: Names = (),
        queries: Names = (),
    ):
        """`split_list` has one stem a line (what follows it on the line is ignored).

        `names` are the class names; empty = all that occur in any XML file of the folder, sorted.
        `queries` says what to ask for each of `names`.

        Raises `ConfigError` if `queries` does not fit `names`; `DataError` if something is missing,
        malformed (file and field named), or has a class that is not among `names`.
        """
        folder.require_folder(annotations, "annotations")
        files = {file.stem: file for file in sorted(annotations.glob("*.xml"))}
        if not files:
            raise DataError(f"{annotations}: holds no XML file; correct the key `annotations`")
        stems = _read_split(split_list, files) if split_list else list(files)
        # Without `names` all files are read, so that every split has the same categories.
        parsed = {stem: _parse(files[stem]) for stem in (stems if names else files)}
        if not names:
            found = {name for image in parsed.values() for name in image.names}
            names = tuple(sorted(found))
        rename = _renaming(names, queries)
        image_ids = {stem: index for index, stem in enumerate(files, start=1)}

        labelled = []
        dropped, odd = Counter[str](), Counter[str]()
        for stem in stems:
            image, proper = _labelled(parsed[stem], files[stem], images, image_ids[stem], rename)
            labelled.append(image)
            dropped += proper.dropped
            odd += proper.odd
        counts = folder.image_counts(labelled, rename.values())
        categories = [
            Category(id=index, name=query, frequency=float(counts[query]))
            for index, query in enumerate(rename.values(), start=1)
        ]
        name = f"{annotations.parent.name}/{split_list.stem if split_list else 'all'}"
        super().__init__("voc", name, images, labelled, categories, dropped, odd)


@dataclass(frozen=True, kw_only=True)
class _Parsed:
    filename: str  # empty = not said
    size: tuple[int, int] | None  # height, width
    names: tuple[str, ...]
    corners: tuple[tuple[float, ...], ...]  # as in the file


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses a DOCTYPE, the door to entity expansion and to reading other files."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise DataError(f"has a DOCTYPE ({name}), which annotations do not need; remove it")


def _parse(file: Path) -> _Parsed:
    content = folder.read_file(file, "annotations")
    try:
        parser = ElementTree.XMLParser(target=_NoDoctype())
        root = ElementTree.fromstring(content, parser)
    except ElementTree.ParseError as error:
        raise DataError(f"{file}: is not valid XML: {error}; mend or remove it") from error
    except (ValueError, LookupError) as error:  # an encoding that Python does not know
        raise DataError(f"{file}: cannot be decoded: {error}; convert it to UTF-8") from error
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    objects = root.findall("object")
    return _Parsed(
        filename=(root.findtext("filename") or "").strip(),
        size=_size(root, file),
        names=tuple(_text(entry, "name", file) for entry in objects),
        corners=tuple(_corners(entry, file) for entry in objects),
    )


def _size(root: ElementTree.Element, file: Path) -> tuple[int, int] | None:
    """Height and width; None if the file does not say (some tools write zeros)."""
    if root.find("size") is None:
        return None
    height, width = (_number(root, f"size/{key}", file) for key in ("height", "width"))
    return (int(height), int(width)) if height > 0 and width > 0 else None


def _corners(entry: ElementTree.Element, file: Path) -> tuple[float, ...]:
    return tuple(_number(entry, f"bndbox/{side}", file) for side in _SIDES)


def _text(element: ElementTree.Element, key: str, file: Path) -> str:
    text = (element.findtext(key) or "").strip()
    if not text:
        raise DataError(f"{file}: <{element.tag}>: the field {key} is missing or empty")
    return text


def _number(element: ElementTree.Element, key: str, file: Path) -> float:
    text = _text(element, key, file)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{file}: <{element.tag}>: {key}: expected a number, got {text!r}")
    return value


def _read_split(split_list: Path, files: dict[str, Path]) -> list[str]:
    stems = []
    lines = folder.read_text(split_list, "split_list").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        stem = line.split()[0]
        if stem not in files:
            raise DataError(f"{split_list}: line {number}: there is no annotation {stem}.xml")
        stems.append(stem)
    if not stems:
        raise DataError(f"{split_list}: names no image; correct the key `split_list`")
    return list(dict.fromkeys(stems))


def _renaming(names: Names, queries: Names) -> dict[str, str]:
    """Class name → what to ask for it."""
    if queries and len(queries) != len(names):
        raise ConfigError(
            f"queries: {len(queries)} for {len(names)} names ({', '.join(names)}); "
            "give one for each, in the same order"
        )
    rename = dict(zip(names, queries or names, strict=True))
    if len(rename) != len(names) or len(set(rename.values())) != len(names):
        raise ConfigError(f"names, queries: must be distinct, got {names} and {queries or names}")
    return rename


def _labelled(
    parsed: _Parsed, file: Path, images: Path, image_id: int, rename: dict[str, str]
) -> tuple[LabelledImage, folder.Proper]:
    """The labels of an image, with what was dropped of them."""
    unknown = [name for name in parsed.names if name not in rename]
    if unknown:
        raise DataError(
            f"{file}: the class {unknown[0]!r} is not among the names {', '.join(rename)}; "
            "add it to the key `names`, or leave `names` empty"
        )
    files = _image_files(parsed.filename, file.stem)
    corners = [
        (x0 - 1, y0 - 1, x1, y1) if x1 > x0 and y1 > y0 else (x0, y0, x0, y0)
        for x0, y0, x1, y1 in parsed.corners
    ]
    return folder.labelled(
        files=files,
        image_id=image_id,
        boxes_xyxy=corners,
        names=[rename[name] for name in parsed.names],
        is_crowd=[False] * len(corners),
        size=parsed.size or _measure(images, files),
    )


def _image_files(filename: str, stem: str) -> tuple[str, ...]:
    stems = [Path(filename).stem, stem] if filename else [stem]
    guesses = [f"{s}{suffix}" for s in stems for suffix in folder.IMAGE_SUFFIXES]
    return tuple(dict.fromkeys([filename, *guesses] if filename else guesses))


def _measure(images: Path, files: Sequence[str]) -> tuple[int, int] | None:
    """Height and width from the image; None if it cannot be read, as none is used then."""
    found = next((images / file for file in files if (images / file).is_file()), None)
    if found is None:
        return None
    try:
        return image_ops.image_size(found.read_bytes())
    except (OSError, image_ops.UnreadableImage):
        return None
