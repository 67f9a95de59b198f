"""Which other format a file is that was given as COCO's JSON, so that the message can say so."""

from collections.abc import Mapping
from typing import Any

_EXPORT = "export it as COCO"
_BEGINNINGS = (
    (b"PK\x03\x04", "is a zip archive; unpack it"),
    (b"\x1f\x8b", "is compressed (gzip); unpack it"),
    (b"BZh", "is compressed (bzip2); unpack it"),
    (b"\xfd7zXZ", "is compressed (xz); unpack it"),
    (b"version https://git-lfs", "is a pointer of Git LFS; run `git lfs pull` where it comes from"),
    (b"\x89PNG", "is an image; name the JSON file of the labels"),
    (b"\xff\xd8\xff", "is an image; name the JSON file of the labels"),
)
# Keys of an object that show what it is.
_OBJECTS = (
    ({"_via_img_metadata"}, f"is a project of VGG Image Annotator; {_EXPORT}"),
    ({"_via_settings"}, f"is a project of VGG Image Annotator; {_EXPORT}"),
    ({"shapes", "imagePath"}, f"is labelme's file of one image; {_EXPORT}"),
    ({"items", "categories", "info"}, f"is Datumaro's format (CVAT); {_EXPORT}"),
    ({"log", "version", "runs"}, f"is a log, not labels; {_EXPORT}"),
)
_FIRST_ENTRIES = (
    ({"image_id", "category_id", "score"}, "it is a list of detections (COCO's results)"),
    ({"image", "annotations"}, f"it is a list in CreateML's format; {_EXPORT}"),
    ({"annotations", "data"}, f"it is an export of Label Studio's own JSON; {_EXPORT}"),
    ({"completions", "data"}, f"it is an export of Label Studio's own JSON; {_EXPORT}"),
    ({"predictions", "data"}, f"it is an export of Label Studio's own JSON; {_EXPORT}"),
    ({"name", "labels"}, f"it is a list in BDD100K's (Scalabel's) format; {_EXPORT}"),
    ({"image_id", "bbox"}, "it is the list of `annotations` alone"),
)


def kind_of_bytes(content: bytes) -> str:
    """What is wrong with a file by its first bytes, with a remedy; empty = it may be JSON."""
    start = content[:1000].removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start:
        return "is empty; download it again" if not content.strip() else ""
    for beginning, kind in _BEGINNINGS:
        if start.startswith(beginning):
            return kind
    if start.startswith(b"<"):
        is_page = b"<html" in start.lower() or b"<!doctype html" in start.lower()
        return "is a web page; download the file itself" if is_page else f"is XML; {_EXPORT}"
    return ""


def kind_of_json(parsed: Any) -> str:
    """What a parsed file is, if it is no object with the lists of COCO; empty = it may be one."""
    if isinstance(parsed, list):
        first = parsed[0] if parsed else None
        keys = set(first) if isinstance(first, dict) else set()
        found = next((kind for has, kind in _FIRST_ENTRIES if has <= keys), "")
        return found or f"it is a list of {len(parsed)} entries{_keys(keys)}"
    if not isinstance(parsed, dict):
        return f"it is a single {type(parsed).__name__}"
    if {"images", "annotations"} & parsed.keys():
        return ""
    found = next((kind for has, kind in _OBJECTS if has <= parsed.keys()), "")
    if not found and parsed and all(map(_is_via, list(parsed.values())[:5])):
        found = f"is an export of VGG Image Annotator; {_EXPORT}"
    return f"it {found}" if found else ""


def _is_via(entry: Any) -> bool:
    return isinstance(entry, Mapping) and {"filename", "regions"} <= entry.keys()


def _keys(keys: set[Any]) -> str:
    named = ", ".join(sorted(str(key)[:30] for key in keys)[:8])
    return f" with the keys {named}" if named else ""
