"""Captions: under which keys and in which files they stand, and which texts are none.

Keys are compared in lower case, with "-" and " " as "_": `TEXT` and `Alt-Text` are known.
"""

import codecs
import csv
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from absl import logging

from data_pipelines import image_files, names, text_file
from data_pipelines.readers import json_fields
from owl_det import files
from owl_det.errors import DataError

# The first that an entry has is taken.
CAPTION_KEYS = (
    *("caption", "text", "captions", "texts", "txt", "prompt", "prompts", "alt", "alt_text"),
    *("sentence", "sentences", "image_caption", "description", "title", "raw"),
)
FILE_KEYS = (
    *("file_name", "file", "image", "image_path", "path", "filename", "file_path", "filepath"),
    *("image_file", "image_name", "image_filename", "img", "img_path"),
)
CAPTION_FILES = ("captions.jsonl", "metadata.jsonl")  # these come before texts beside the images
TABLE_FILES = (  # and these after
    *("captions.csv", "metadata.csv", "captions.tsv", "metadata.tsv"),
    *("captions.json", "metadata.json", "captions.txt"),
)
PARQUET_FILES = ("captions.parquet", "metadata.parquet")
BESIDE = (".txt", ".TXT", ".caption")  # in place of an image's suffix
BESIDE_LAST = (".json",)  # after everything else: most of these are labels
LABELS = "its text holds numbers of boxes, and is no caption"

_LABEL_HEADERS = ("imagesource:", "gsd:")  # of DOTA
_DELIMITERS = (",", "\t", ";", "|")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_MAX_NAMED = 8  # keys of an entry, in messages


class Texts(NamedTuple):
    """The captions of one image, and what is there that is none."""

    texts: tuple[str, ...] = ()
    note: str = ""


def of_text(content: bytes, where: str) -> Texts:
    """The caption that a text file is; it may be empty. Raises `DataError` if it is no text."""
    text = names.visible(text_file.decode(content, Path(where)))
    if _is_labels(text):
        return Texts(note=LABELS)
    return Texts((text,) if text.strip() else ())


def of_entry(entry: Any) -> Texts:
    """The captions of a JSON object or a row of a table: a text, or a list of texts.

    Raises `ValueError` if it is no object, or holds half characters, which no file can.
    """
    if not isinstance(entry, dict):
        raise ValueError("the JSON is no object")
    known = _by_key(entry)
    note = f"it has the keys {_listed(entry)}; none is a caption" if entry else ""
    for key in (key for key in CAPTION_KEYS if key in known):
        values = known[key] if isinstance(known[key], list) else [known[key]]
        values = [_nested(value) for value in values]
        texts = [value for value in values if isinstance(value, str)]
        for text in texts:
            text.encode()
        odd = [value for value in values if not isinstance(value, str) and value is not None]
        note = f"{len(odd)} of {len(values)} entries of its {key} are no text" if odd else ""
        if texts:
            seen = (names.visible(text) for text in texts)
            return Texts(tuple(text for text in seen if text.strip()), note)
    return Texts(note=note)


def of_json(content: bytes, where: str) -> Texts:
    """As `of_entry`, of a JSON file. Raises `DataError` if it is none."""
    try:
        return of_entry(json.loads(text_file.decode(content, Path(where))))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {error}; correct or remove it") from None


def of_values(values: Iterable[bytes]) -> tuple[str, ...]:
    """Captions of a TFRecord's feature. Raises `ValueError` if one is no UTF-8."""
    texts = (names.visible(value.decode("utf-8-sig")) for value in values)
    return tuple(text for text in texts if text.strip())


def read_table(path: Path, images: frozenset[str]) -> dict[str, Texts] | None:
    """Texts by image, relative to the folder of `path`: .jsonl, .json, .csv, .tsv or .txt.

    `images` are those that are there: a name without a suffix stands for one of them. None if the
    file is about something else: it names no images, or has no captions. Raises `DataError` naming
    the line of what is malformed.
    """
    found: dict[str, Texts] = {}
    alike = _Alike(images)
    if path.suffix == ".json":
        entries = _json_entries(path, alike)
    else:
        entries = _json_lines(path) if path.suffix == ".jsonl" else _rows(path)
    if entries is None:
        return None
    for where, entry in entries:
        try:
            texts = of_entry(entry)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: {error}; correct the line") from None
        image = _image_of(entry, where, path.parent)
        image = alike.find(image)
        before = found.get(image, Texts())
        found[image] = Texts(before.texts + texts.texts, before.note or texts.note)
    _warn_of(path, found, images)
    return found


class _Alike:
    """The images of a folder, by names that are written in another way."""

    def __init__(self, images: frozenset[str]):
        self._images = images
        self._by_stem = {image.rpartition(".")[0]: image for image in sorted(images, reverse=True)}
        self._by_key: dict[str, list[str]] = {}
        for image in sorted(images):
            for key in {self._key(image), self._key(image.rpartition(".")[0])}:
                self._by_key.setdefault(key, []).append(image)

    def find(self, name: str) -> str:
        """The image of that name; the name itself if there is none, or no telling which it is."""
        if name in self._images:
            return name
        found = self._by_key.get(self._key(name), [])
        return self._by_stem.get(name, found[0] if len(found) == 1 else name)

    @staticmethod
    def _key(name: str) -> str:
        """The same for Unicode's forms, upper and lower case, and the slashes of Windows."""
        return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()


def read_coco(path: Path) -> dict[str, Texts]:
    """Texts of each image of a captions file of COCO, by file name. Raises `DataError`."""
    content = json_fields.load(path, "captions")
    by_id: dict[Any, str] = {}
    for i, entry in enumerate(json_fields.items(content, "images", path)):
        where = f"{path}: images[{i}]"
        given = json_fields.text(entry, "file_name", where)
        name = inside(given)
        if name is None:
            raise DataError(f"{where}.file_name: {given!r} lies outside the folder; correct it")
        by_id[_id(entry, "id", where)] = name
    captions: dict[str, tuple[str, ...]] = dict.fromkeys(by_id.values(), ())
    for i, entry in enumerate(json_fields.items(content, "annotations", path)):
        where = f"{path}: annotations[{i}]"
        image_id = _id(entry, "image_id", where)
        if image_id not in by_id:
            raise DataError(f"{where}.image_id: no image has the id {image_id}")
        text = names.visible(json_fields.text(entry, "caption", where)).strip()
        if text:
            captions[by_id[image_id]] += (text,)
    return {image: Texts(texts) for image, texts in captions.items()}


def inside(name: str) -> str | None:
    """The name, spelt in one way; None if no file in the folder can have it."""
    path = PurePosixPath(name)
    is_outside = path.is_absolute() or ".." in path.parts or "\0" in name
    is_text = name.encode("utf-8", "replace").decode() == name  # no lone surrogates
    if not is_text or is_outside or any(len(part.encode()) > 255 for part in path.parts):
        return None
    return path.as_posix()


def _is_labels(text: str) -> bool:
    """True if each line is a class and at least four numbers, as labels of boxes are."""
    lines = [line for line in text_file.lines(text) if not line.startswith(_LABEL_HEADERS)]
    rows = [re.split(r"[\s,;]+", line.strip(" ,;")) for line in lines if line.strip(" ,;")]
    return bool(rows) and all(_is_label(row) for row in rows)


def _is_label(row: list[str]) -> bool:
    numbers = [word for word in row if _NUMBER.fullmatch(word)]
    if len(numbers) == len(row):
        return len(row) >= 5
    if len(numbers) >= 8 and row[:8] == numbers[:8]:  # four corners, and what is written there
        return True
    has_fraction = any("." in number for number in numbers)
    return len(numbers) >= 4 and has_fraction and len(row) - len(numbers) <= 2


def _by_key(entry: Mapping[str, Any]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for key, value in entry.items():
        known.setdefault(re.sub(r"[- ]", "_", names.visible(key).strip().lower()), value)
    return known


def _nested(value: Any) -> Any:
    """The text of an object that holds one: {"raw": "a dog", "tokens": […]}."""
    if not isinstance(value, dict):
        return value
    known = _by_key(value)
    return next((known[key] for key in CAPTION_KEYS if isinstance(known.get(key), str)), value)


def _listed(keys: Iterable[str]) -> str:
    shown = list(keys)
    more = ", …" if len(shown) > _MAX_NAMED else ""
    return ", ".join(shown[:_MAX_NAMED]) + more


def _image_of(entry: Mapping[str, Any], where: str, folder: Path) -> str:
    known = _by_key(entry)
    named = next((known[key] for key in FILE_KEYS if key in known), None)
    image = inside(named) if isinstance(named, str) and named.strip() else None
    if image is None:
        raise DataError(
            f"{where}: no `file_name` that lies in {folder} (it has {_listed(entry)}); "
            "correct the line"
        )
    return image


def _id(entry: Mapping[str, Any], key: str, where: str) -> Any:
    """Numbers, as COCO has them; texts are read as well."""
    value = entry.get(key)
    return value if isinstance(value, str) else json_fields.integer(entry, key, where)


def _decoded(path: Path) -> str:
    try:
        content = files.read_bytes(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; make it readable") from error
    return text_file.decode(content, path)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with files.open_read(path) as file:
        is_wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        file.seek(0)
        lines = _decoded(path).encode().split(b"\n") if is_wide else file
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            try:
                # What is left of a byte order mark alone is a blank line.
                text = line.decode("utf-8-sig").strip()
                if text:
                    yield where, json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{where}: {error}; correct the line: one JSON object each"
                ) from None


def _json_entries(path: Path, alike: _Alike) -> Iterator[tuple[str, Any]] | None:
    """A list of objects, captions by file name, or COCO's."""
    try:
        content = json.loads(_decoded(path))
    except (ValueError, RecursionError) as error:
        logging.warning("%s: no JSON (%s); it is not read", path, error)
        return None
    if isinstance(content, dict) and "images" in content and "annotations" in content:
        if not any("caption" in _by_key(x) for x in _objects(content["annotations"])):
            return None
        coco = ({"file_name": k, "captions": list(v.texts)} for k, v in read_coco(path).items())
        return ((str(path), entry) for entry in coco)
    if isinstance(content, dict):
        by_image = [{"file_name": k, "captions": v} for k, v in content.items()]
        are_images = all(image_files.is_image(name) for name in content) or any(
            image_files.is_image(alike.find(name)) for name in content
        )
        content = by_image if are_images else None
    entries = _objects(content)
    has_names = any(not _by_key(entry).keys().isdisjoint(FILE_KEYS) for entry in entries)
    if not has_names:
        return None
    return ((f"{path}: entry {i}", entry) for i, entry in enumerate(entries))


def _objects(content: Any) -> list[dict[str, Any]]:
    entries = content if isinstance(content, list) else []
    return [entry for entry in entries if isinstance(entry, dict)]


def _rows(path: Path) -> Iterator[tuple[str, Any]] | None:
    """Rows of a table whose header names images and captions; logs why another is not read."""
    text = _decoded(path)
    start = text_file.lines(text)[0]
    headers = {
        mark: [names.visible(cell).strip() for cell in _split(start, mark)] for mark in _DELIMITERS
    }
    for mark, header in headers.items():
        known = _by_key(dict.fromkeys(header)).keys()
        if not known.isdisjoint(FILE_KEYS) and not known.isdisjoint(CAPTION_KEYS):
            _require_distinct(header, path)
            return _table_rows(path, text, header, mark)
    header = max(headers.values(), key=len)
    known = _by_key(dict.fromkeys(header)).keys()
    if any(image_files.is_image(cell) for cell in header):
        fault = "has no header; write file_name and caption into a first line"
    elif known.isdisjoint(FILE_KEYS):
        fault = f"has the columns {_listed(header)}; none names images: rename one to 'file_name'"
    else:
        fault = f"has the columns {_listed(header)}; none is a caption: rename one to 'caption'"
    logging.warning("%s: %s; it is not read", path, fault)
    return None


def _require_distinct(header: list[str], path: Path) -> None:
    """Of two columns of one key only one would be read."""
    counts = Counter(key for cell in header for key in _by_key({cell: None}))
    twice = [key for key in (*FILE_KEYS, *CAPTION_KEYS) if counts[key] > 1]
    if twice:
        raise DataError(f"{path}, line 1: two columns are called {twice[0]!r}; rename one of them")


def _split(line: str, mark: str) -> list[str]:
    return next(csv.reader([line], delimiter=mark), [])


def _table_rows(
    path: Path, text: str, header: list[str], mark: str
) -> Iterator[tuple[str, dict[str, str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    line = 1
    try:
        next(reader)
        for cells in reader:
            where = f"{path}, line {line + 1}"
            line = reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{where}: has {len(cells)} cells, and the header has {len(header)}; put a "
                    f"caption that holds {mark!r} in double quotes"
                )
            yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {line + 1}: {error}; correct its quotes") from None


def _warn_of(path: Path, found: Mapping[str, Texts], images: frozenset[str]) -> None:
    """Logs images that are not there, images that are not listed, and entries without a caption."""
    absent = [image for image in found if image not in images]
    unlisted = len(images) - (len(found) - len(absent))
    notes = [texts.note for texts in found.values() if texts.note]
    if absent:
        logging.warning(
            "%s: %d of its %d images are not in the folder, such as %s",
            *(path, len(absent), len(found), absent[0]),
        )
    if unlisted:
        logging.warning("%s: %d of %d images have no entry there", path, unlisted, len(images))
    if notes:
        logging.warning("%s: of %d of %d images: %s", path, len(notes), len(found), notes[0])
