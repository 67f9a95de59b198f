"""Pascal VOC: one XML file an image."""

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from data_pipelines import image_files, image_ops, text_file
from data_pipelines import names as names_lib
from data_pipelines.features import Category, Names
from data_pipelines.readers import folder, labelled_image, voc_xml
from data_pipelines.readers.labelled_image import LabelledImage, Proper, Size
from data_pipelines.readers.voc_xml import VocFile, VocObject
from owl_det import files
from owl_det.errors import ConfigError, DataError, SourceError


class VocReader(folder.FolderReader):
    """Images and boxes of a folder of VOC XML files; the annotation is taken to be exhaustive.

    VOC counts pixels from 1 and includes the last one, so (xmin, ymin, xmax, ymax) becomes the
    corners (xmin - 1, ymin - 1, xmax, ymax), clipped to the image. Objects without a box, and boxes
    with xmax <= xmin or ymax <= ymin in the file, are dropped and counted. `difficult` objects are
    objects like others. An image is the one that is called like its XML file, else the one that
    <filename> names. Its id is the position, from 1, of its XML file among all of the folder in
    sorted order, whatever the split.
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
        malformed (file named), has a class that is not among `names`, or if two XML files have one
        image.
        """
        folder.require_folder(annotations, "annotations")
        files = _xml_files(annotations)
        stems = _read_split(split_list, files) if split_list else list(files)
        # Without `names` all files are read, so that every split has the same categories.
        parsed = {stem: voc_xml.read(files[stem]) for stem in (stems if names else files)}
        names = names or _names_in(parsed.values(), annotations)
        read, locations = _Labels(_renaming(names, queries)), _Locations(images)
        image_ids = {stem: index for index, stem in enumerate(files, start=1)}
        for stem in stems:
            places = locations.of(parsed[stem].filename, files[stem])
            read.add(parsed[stem], files[stem], image_ids[stem], places, images)
        locations.tell(is_whole=split_list is None)
        asked = [names_lib.plain(query) for query in queries or names]
        counts = folder.image_counts(read.images, asked)
        categories = [
            Category(id=index, name=query, frequency=float(counts[query]))
            for index, query in enumerate(asked, start=1)
        ]
        super().__init__(
            "voc",
            f"{annotations.parent.name}/{split_list.stem if split_list else 'all'}",
            images,
            read.images,
            categories,
            read.dropped,
            read.odd,
            examples=read.examples,
            spelled=dict(zip(asked, queries or names, strict=True)),
        )
        self._count_images_anew()


def _names_in(parsed: Iterable[VocFile], annotations: Path) -> Names:
    """The names of all objects, sorted. Raises `DataError` if two are one text to the model."""
    names = {entry.name for image in parsed for entry in image.objects if entry.name}
    names_lib.require_distinct(sorted(names), f"{annotations}: <name>")
    return tuple(sorted(names))


def _xml_files(annotations: Path) -> dict[str, Path]:
    """Stem → file, sorted. Raises `DataError` if there is none."""
    others = image_files.find(annotations).others
    names = sorted(name for name in others if name.lower().endswith(".xml"))
    below = [name for name in names if "/" in name]
    files = [annotations / name for name in names if "/" not in name]
    if not files:
        there = f"; {below[0]} lies in a subfolder" if below else ""
        raise folder.misplaced(f"{annotations}: holds no XML file{there}", "annotations")
    if below:
        logging.warning(
            "%s: %d XML files lie in subfolders and are left out, such as %s",
            annotations,
            len(below),
            below[0],
        )
    by_stem: dict[str, Path] = {}
    for file in files:
        if file.stem in by_stem:
            raise DataError(
                f"{annotations}: {by_stem[file.stem].name} and {file.name} are files of one image; "
                "remove one"
            )
        by_stem[file.stem] = file
    return by_stem


# --- the split -----------------------------------------------------------------------------------


def _read_split(split_list: Path, files: Mapping[str, Path]) -> list[str]:
    stems: list[str] = []
    rows = text_file.lines(folder.read_text(split_list, "split_list"))
    for number, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        stem = next((stem for stem in _stems(row.strip()) if stem in files), None)
        if stem is None:
            comma = "; a line is a stem, without commas" if "," in row else ""
            raise DataError(
                f"{split_list}: line {number}: there is no annotation {_stems(row)[-1][:200]}.xml"
                f"{comma}"
            )
        stems.append(stem)
    if not stems:
        raise folder.misplaced(f"{split_list}: names no image", "split_list")
    twice = [stem for stem, count in Counter(stems).items() if count > 1]
    if twice:
        logging.warning(
            "%s: names %d images twice, such as %s; they are read once",
            split_list,
            len(twice),
            twice[0],
        )
    return list(dict.fromkeys(stems))


def _stems(row: str) -> list[str]:
    """What a line may mean, the likeliest first: `a 1`, `my image -1`, `JPEGImages/a.jpg`."""
    row = row.strip()
    texts = [row, re.sub(r"\s+[+-]?[01]$", "", row), row.split()[0]]
    bases = [re.split(r"[\\/]", text)[-1] for text in texts]
    cut = [
        os.path.splitext(base)[0]
        for base in bases
        if image_files.is_image(base) or base.lower().endswith((".xml", ".txt"))
    ]
    return list(dict.fromkeys([*texts, *bases, *cut]))


# --- names ---------------------------------------------------------------------------------------


def _renaming(names: Names, queries: Names) -> dict[str, str]:
    """The key of a class name → what to ask for it, as it is asked."""
    if queries and len(queries) != len(names):
        raise ConfigError(
            f"queries: {len(queries)} for {len(names)} names ({', '.join(names)}); "
            "give one for each, in the same order"
        )
    try:
        names_lib.require_distinct(names, "names")
        names_lib.require_distinct(queries, "queries")
    except DataError as error:
        raise ConfigError(f"names, queries: must be distinct: {error}") from None
    asked = map(names_lib.plain, queries or names)
    return dict(zip(map(_key, names), asked, strict=True))


def _key(name: str) -> str:
    """The same for spellings that are one text to the model."""
    return names_lib.plain(name).lower()


# --- images --------------------------------------------------------------------------------------


class _Locations:
    """The image files of XML files, no two of which may have the same."""

    def __init__(self, images: Path):
        folder.require_folder(images, "images")
        self._images = images
        self._there = frozenset(image_files.find(images).images)
        self._alike: dict[str, list[str]] = {}
        for name in sorted(self._there):
            if "/" not in name:
                self._alike.setdefault(_stem_key(name), []).append(name)
        self._taken: dict[str, Path] = {}  # image → its XML file
        self._at_odds: list[str] = []  # XML files whose <filename> is another image

    def of(self, filename: str, file: Path) -> tuple[str, ...]:
        """Where the image of an XML file may be. Raises `DataError` if another file has it."""
        places = self._places(filename, file.stem)
        found = next((place for place in places if self._is_there(place)), None)
        if found is None:
            return places
        other = self._taken.setdefault(os.path.normpath(found), file)
        if other != file:
            raise DataError(
                f"{file}: its image is {found}, which {other.name} has already; call each XML file "
                "like its image, or correct <filename>"
            )
        return places

    def _places(self, filename: str, stem: str) -> tuple[str, ...]:
        own = _guesses(stem)
        if not filename:
            return own
        # The order of these is part of versions.
        named = tuple(dict.fromkeys([filename, *_guesses(Path(filename).stem), *own]))
        first = next((place for place in named if self._is_there(place)), "")
        if first in own or _stem_key(filename) == _stem_key(f"{stem}.x"):
            return named
        if any(place in self._there for place in own):
            self._at_odds += [f"{stem}.xml ({first})"] if first else []
            return tuple(dict.fromkeys([*own, *named]))
        alike = self._alike.get(_stem_key(f"{stem}.x"), [])
        if len(alike) == 1:
            return (*alike, *named)
        if first:
            return named
        # A name with a dot that begins no suffix.
        return tuple(dict.fromkeys([*named, *_guesses(filename)]))

    def tell(self, is_whole: bool) -> None:
        """Logs which images were taken in doubt and, of a whole folder, which have no XML file."""
        if self._at_odds:
            logging.warning(
                "%s: %d XML files name another image of the folder in <filename>, such as %s; the "
                "one that is called like the XML file is taken",
                *(self._images, len(self._at_odds), self._at_odds[0]),
            )
        without = sorted(n for n in self._there if "/" not in n and n not in self._taken)
        if is_whole and without:
            logging.warning(
                "%s: %d of %d images have no XML file and are left out, such as %s",
                *(self._images, len(without), len(without) + len(self._taken), without[0]),
            )

    def _is_there(self, place: str) -> bool:
        return place in self._there or ("/" in place and os.path.isfile(self._images / place))


def _guesses(stem: str) -> tuple[str, ...]:
    return tuple(f"{stem}{suffix}" for suffix in image_files.IMAGE_SUFFIXES)


def _stem_key(name: str) -> str:
    return names_lib.visible(os.path.splitext(name)[0]).casefold()


def _measure(images: Path, names: Sequence[str]) -> Size | None:
    """Height and width of the image; None if it cannot be read, as no box is used then."""
    found = next((images / name for name in names if os.path.isfile(images / name)), None)
    if found is None:
        return None
    try:
        return image_ops.image_size(files.read_bytes(found))
    except (OSError, image_ops.UnreadableImage):
        return None


# --- boxes ---------------------------------------------------------------------------------------


class _Labels:
    """The labels of the images, as they are read."""

    def __init__(self, rename: Mapping[str, str]):
        self.images: list[LabelledImage] = []
        self.dropped, self.odd = Counter[str](), Counter[str]()
        self.examples: dict[str, str] = {}  # reason → file and object
        self._rename = rename

    def add(
        self, parsed: VocFile, file: Path, image_id: int, places: tuple[str, ...], images: Path
    ) -> None:
        """Raises `DataError` if an object has a class that is not among the names."""
        self._require_known(parsed, file)
        self._count(parsed, file)
        good = [entry for entry in parsed.objects if not entry.fault]
        self.odd[labelled_image.TWICE] += labelled_image.num_twice(
            [(_key(entry.name), entry.corners) for entry in good]
        )
        image, proper = folder.labelled(
            files=places,
            image_id=image_id,
            boxes_xyxy=np.array([_corners(entry) for entry in good], np.float64).reshape(-1, 4),
            names=self._asked(good),
            is_crowd=[False] * len(good),
            size=parsed.size or _measure(images, places),
            not_exhaustive=self._asked(entry for entry in parsed.objects if entry.fault),
        )
        self.images.append(image)
        self.dropped += proper.dropped
        self.odd += proper.odd
        self._give_examples(good, proper, file)

    def _require_known(self, parsed: VocFile, file: Path) -> None:
        named = (entry.name for entry in parsed.objects if entry.name)
        unknown = next((name for name in named if _key(name) not in self._rename), None)
        if unknown is not None:
            raise SourceError(
                f"{file}: the class {unknown!r} is not among the names "
                f"{', '.join(self._rename.values())}",
                keys="add it to the key `names`, or leave `names` empty",
                flags="correct <name>",
            )

    def _count(self, parsed: VocFile, file: Path) -> None:
        for number, entry in enumerate(parsed.objects, start=1):
            if entry.fault:
                self.dropped[entry.fault] += 1
                self.examples.setdefault(entry.fault, f"{file}: <object> {number}")

    def _give_examples(self, good: Sequence[VocObject], proper: Proper, file: Path) -> None:
        dropped = [entry for entry, kept in zip(good, proper.is_kept, strict=True) if not kept]
        boxes = np.array([_corners(entry) for entry in dropped]).reshape(-1, 4)
        for entry, reason in zip(dropped, labelled_image.reasons(boxes), strict=True):
            shown = " ".join(f"{value:g}" for value in entry.corners)
            self.examples.setdefault(reason, f"{file}: {entry.name!r} {shown}")

    def _asked(self, entries: Iterable[VocObject]) -> Names:
        return tuple(self._rename[_key(entry.name)] for entry in entries if entry.name)


def _corners(entry: VocObject) -> tuple[float, float, float, float]:
    """Corners of an object's box; without area where the file's are the same or swapped."""
    x0, y0, x1, y1 = entry.corners
    if not all(map(math.isfinite, entry.corners)):
        return entry.corners
    if x1 == x0 or y1 == y0:
        return x0, y0, x0, y0
    return (x0, y0, x1, y1) if x1 < x0 or y1 < y0 else (x0 - 1, y0 - 1, x1, y1)
