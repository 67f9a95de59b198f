"""One XML file of Pascal VOC: the image it belongs to, and its objects."""

import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.readers import folder
from owl_det.errors import DataError

Corners = tuple[float, float, float, float]

_SIDES = ("xmin", "ymin", "xmax", "ymax")
_DECLARATION = re.compile(rb"""\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.-]+)["'][^>]*?\?>""")
# Why objects are dropped: "3 of 42 boxes dropped: 2 …".
NO_NAME = "without a name"
NO_BOX = "without a bndbox"
NO_OBJECT = "outside of any <object>"
SEVERAL_BOXES = "with several bndbox"
NO_NUMBERS = "with coordinates that are no numbers"


@dataclass(frozen=True, kw_only=True)
class VocObject:
    """An <object>; without a fault it has a name and corners."""

    name: str = ""  # as written
    corners: Corners = (
        math.nan,
        math.nan,
        math.nan,
        math.nan,
    )  # as written: pixels counted from 1, the last included
    fault: str = ""  # why it is dropped; empty = it is not


@dataclass(frozen=True, kw_only=True)
class VocFile:
    """The content of an XML file."""

    filename: str  # empty = not told
    size: tuple[int, int] | None  # height, width; None = not told (some tools write zeros)
    objects: tuple[VocObject, ...]


def read(file: Path) -> VocFile:
    """Reads a file. Tags may be in upper case or have a namespace.

    Raises `DataError`, naming the file, if it cannot be read, is not XML or no annotation.
    """
    try:
        root = _parse(folder.read_file(file, "annotations"))
    except ElementTree.ParseError as error:
        raise DataError(f"{file}: is not valid XML: {error}; mend or remove it") from error
    except (ValueError, LookupError) as error:  # an encoding that Python does not know
        raise DataError(f"{file}: cannot be decoded: {error}; convert it to UTF-8") from error
    except _HasDoctype as error:
        raise DataError(f"{file}: {error}") from None
    objects = _objects(root)
    filename = (root.findtext("filename") or "").strip()
    if root.tag != "annotation" and not objects and not filename:
        raise DataError(
            f"{file}: is no annotation of Pascal VOC: its root is <{root.tag[:40]}>; remove it"
        )
    return VocFile(
        filename=filename,
        size=_size(root.find("size")),
        objects=tuple(_object(entry) for entry in objects),
    )


class _HasDoctype(Exception):
    pass


class _PlainTags(ElementTree.TreeBuilder):
    """Tags without namespaces, in lower case.

    Refuses a DOCTYPE, the door to entity expansion and to reading other files.
    """

    def start(self, tag: str, attrs: dict[str, str]) -> ElementTree.Element:
        return super().start(_plain_tag(tag), attrs)

    def end(self, tag: str) -> ElementTree.Element:
        return super().end(_plain_tag(tag))

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise _HasDoctype(f"has a DOCTYPE ({name}), which annotations do not need; remove it")


def _plain_tag(tag: str) -> str:
    return tag.rpartition("}")[2].lower()


def _parse(content: bytes) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(content, ElementTree.XMLParser(target=_PlainTags()))
    except ValueError:
        # An encoding that the parser does not know, such as gb2312: Python may.
        declaration = _DECLARATION.match(content)
        if declaration is None:
            raise
        text = content[declaration.end() :].decode(declaration[1].decode())
        return ElementTree.fromstring(text, ElementTree.XMLParser(target=_PlainTags()))


def _objects(root: ElementTree.Element) -> list[ElementTree.Element]:
    """Every <object>, wherever it stands, and every <bndbox> that stands in none."""
    found, pending = [], [root]
    while pending:
        element = pending.pop()
        if element.tag in ("object", "bndbox"):
            found.append(element)
        else:
            pending += reversed(element)
    return found


def _size(size: ElementTree.Element | None) -> tuple[int, int] | None:
    height, width = (_number(size, key) for key in ("height", "width"))
    if not (1 <= height < math.inf and 1 <= width < math.inf):
        return None
    return int(height), int(width)


def _object(entry: ElementTree.Element) -> VocObject:
    if entry.tag == "bndbox":
        return VocObject(fault=NO_OBJECT)
    name = (entry.findtext("name") or "").strip()
    if not name:
        return VocObject(fault=NO_NAME)
    boxes = entry.findall("bndbox")
    if len(boxes) != 1:
        return VocObject(name=name, fault=SEVERAL_BOXES if boxes else NO_BOX)
    texts = [(boxes[0].findtext(side) or "").strip().lower() for side in _SIDES]
    x0, y0, x1, y1 = (_number(boxes[0], side) for side in _SIDES)
    if any(
        math.isnan(number) and text.lstrip("+-") != "nan"
        for text, number in zip(texts, (x0, y0, x1, y1), strict=True)
    ):
        return VocObject(name=name, fault=NO_NUMBERS)
    return VocObject(name=name, corners=(x0, y0, x1, y1))


def _number(element: ElementTree.Element | None, key: str) -> float:
    """The number in a field; not a number where there is none."""
    text = "" if element is None else (element.findtext(key) or "").strip()
    try:
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan
