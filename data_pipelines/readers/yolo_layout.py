"""Where the images and labels of a YOLO data set lie: the layouts that tools write."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import logging

from data_pipelines import image_files, text_file
from data_pipelines.names import plain
from data_pipelines.readers import folder
from data_pipelines.readers.yolo_description import SPLITS, Description
from owl_det.errors import DataError, SourceError

_SPLIT_FOLDER = re.compile(
    r"(?:obj_)?(train|val|test)(?:ing|id|idation)?(?:[-_ .]?(?:dev)?\d*)?(?:_data)?", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images, and where their labels are."""

    folder: Path  # what `images` are relative to
    images: tuple[Path, ...]  # sorted
    # Labels mirror the images in this folder; None = Ultralytics' rule finds that of each image.
    label_folder: Path | None = None
    links: str = ""  # what to say of links to folders among them, which are not followed

    def label_of(self, image: Path, index: "LabelIndex") -> Path | None:
        """The label file of one of `images`; None = it has none."""
        if self.label_folder is not None:
            return index.find((self.label_folder / image).with_suffix(""))
        places = _label_places(self.folder / image)
        found = (index.find(place.with_suffix("")) for place in places)
        return next((file for file in found if file is not None), None)

    def files(self) -> frozenset[str]:
        """The images, to compare sets by."""
        place = os.path.abspath(self.folder)
        return frozenset(os.path.join(place, image) for image in self.images)


class LabelIndex:
    """Label files by folder and stem: `.TXT` counts, and so do other cases and Unicode forms."""

    def __init__(self) -> None:
        self._exact: dict[Path, dict[str, Path]] = {}
        self._folded: dict[Path, dict[str, Path]] = {}

    def find(self, stem: Path) -> Path | None:
        """The label file whose path without its suffix is `stem`."""
        place = stem.parent
        if place not in self._exact:
            files = self.files(place)
            self._exact[place] = {file.stem: file for file in files}
            self._folded[place] = {plain(file.stem).casefold(): file for file in files}
        exact = self._exact[place].get(stem.name)
        return exact or self._folded[place].get(plain(stem.name).casefold())

    @staticmethod
    def files(place: Path) -> list[Path]:
        """The text files of a folder."""
        if not place.is_dir():
            return []
        names = sorted(name for name in os.listdir(place) if not image_files.is_hidden(name))
        return [place / name for name in names if name.lower().endswith(".txt")]


def whole_folder(images: Path, labels: Path) -> ImageSet:
    """All images of a folder and its subfolders; labels mirror them in another, or the same."""
    found = image_files.find(images)
    return ImageSet(
        folder=images,
        images=tuple(sorted(map(Path, found.images))),
        label_folder=labels,
        links=found.of_links() if found.links else "",
    )


def of_folders(images: Path, labels: Path, split: str) -> ImageSet:
    """The images of a folder, or of its subfolder of a split.

    Raises `DataError` where the folder has subfolders of several splits and none is asked for.
    """
    folder.require_folder(images, "images")
    folder.require_folder(labels, "labels")
    splits = _split_folders(images)
    if split:
        name = _chosen(splits, split, images)
        return whole_folder(images / name, labels / name)
    sets = {key: whole_folder(images / name, labels / name) for key, name in splits.items()}
    _require_one(sets, images)
    return whole_folder(images, labels)


def of_root(root: Path, description: Description | None, split: str) -> ImageSet:
    """The images of a data set's root, or those of one of its splits.

    Splits are those of the description, then those of folders. Raises `DataError` where there are
    several and none is asked for, or the one asked for is missing.
    """
    by_folder = _root_splits(root)
    if description and not split and _is_of_parent(description, root, by_folder):
        description = None
    described = {} if description is None else _described(description, split, by_folder)
    sets = by_folder | described
    sets = {key: sets[key] for key in dict.fromkeys([*SPLITS, *sets]) if key in sets}
    if split:
        return sets[_chosen({key: key for key in sets}, split, root)]
    _require_one(sets, root)
    images, labels = root / "images", root / "labels"
    if images.is_dir():
        _require_one(by_folder, root)
        whole = whole_folder(images, labels if labels.is_dir() else images)
        elsewhere = [s for s in described.values() if not s.files() <= whole.files()]
        if elsewhere:
            return elsewhere[0]
        if not labels.is_dir() and not any(map(LabelIndex.files, [images, *_places(whole)])):
            folder.require_folder(labels, "labels")
        return whole
    if sets:
        return next(iter(sets.values()))
    beside = tuple(map(Path, sorted(filter(image_files.is_image, _names(root)))))
    if beside:
        return ImageSet(folder=root, images=beside, label_folder=root)
    raise SourceError(
        f"{root}: has no folder `images`, no folder of a split such as train, and no images itself",
        keys="correct the key `path` of the source, or name the folders with `images` and `labels`",
        flags="correct --annotations, or name the folder of images with --images",
    )


def _is_of_parent(description: Description, root: Path, by_folder: Mapping[str, ImageSet]) -> bool:
    """True where a folder with images was named below the one whose splits are described."""
    above, place = map(os.path.abspath, (description.file.parent, root))
    is_below = place.startswith(os.path.join(above, ""))
    return is_below and bool(
        by_folder or (root / "images").is_dir() or any(map(image_files.is_image, _names(root)))
    )


def _places(image_set: ImageSet) -> set[Path]:
    """The folders in which the images lie."""
    return {(image_set.folder / image).parent for image in image_set.images}


def _root_splits(root: Path) -> dict[str, ImageSet]:
    """The sets of images/train; else of train/images, or of train with labels beside images."""
    images, labels = root / "images", root / "labels"
    if images.is_dir():
        return {
            key: whole_folder(images / name, labels / name)
            for key, name in _split_folders(images).items()
        }
    sets = {}
    for key, name in _split_folders(root).items():
        place = root / name
        if (place / "images").is_dir():
            sets[key] = whole_folder(place / "images", place / "labels")
        else:
            sets[key] = whole_folder(place, place)
    return sets


def _split_folders(place: Path) -> dict[str, str]:
    """Split → the subfolder of its images; train2014 beside train2017 go by their own names."""
    found: dict[str, list[str]] = {key: [] for key in SPLITS}
    for name in _names(place):
        match = _SPLIT_FOLDER.fullmatch(name)
        if match and (place / name).is_dir() and image_files.find(place / name).images:
            found[match[1].lower()].append(name)
    splits: dict[str, str] = {}
    for key, names in found.items():
        own = [name for name in names if name.lower() == key] or names
        if len(own) == 1:
            splits[key] = own[0]
        splits |= {name: name for name in names if splits.get(key) != name}
    return splits


def _names(place: Path) -> list[str]:
    if not place.is_dir():
        return []
    return sorted(name for name in os.listdir(place) if not image_files.is_hidden(name))


def _chosen(splits: Mapping[str, str], split: str, place: Path) -> str:
    if split not in splits:
        there = f"it has {', '.join(splits)}" if splits else "it has no splits"
        raise SourceError(
            f"{place}: has no split {split}; {there}",
            keys="correct the key `split` of the source",
            flags="correct --split",
        )
    return splits[split]


def _require_one(sets: Mapping[str, ImageSet], place: Path) -> None:
    """Raises `DataError` where several splits hold different images."""
    if len({image_set.files() for image_set in sets.values()}) > 1:
        names = ", ".join(f"{key} ({len(value.images)} images)" for key, value in sets.items())
        raise SourceError(
            f"{place}: holds several splits: {names}",
            keys=f"name one with the key `split` of the source, such as {next(iter(sets))!r}",
            flags=f"name one, such as --split {next(iter(sets))}",
        )


# --- what a description says ---------------------------------------------------------------------


def _described(
    description: Description, split: str, by_folder: Mapping[str, ImageSet]
) -> dict[str, ImageSet]:
    """The sets of the description that are there.

    Raises `DataError` if `split` is neither there nor among those that folders show.
    """
    sets: dict[str, ImageSet] = {}
    for key, entries in description.splits.items():
        required = key == split and key not in by_folder
        found = _of_entries(entries, description, required=required)
        if found is not None:
            sets[key] = found
        elif required:
            raise DataError(
                f"{description.file}: {key}: {', '.join(entries)}: holds no image; "
                "name another split"
            )
        elif key == split:
            logging.warning(
                "%s: %s: %s is not there; %s is read in its place",
                description.file,
                key,
                ", ".join(entries),
                by_folder[key].folder,
            )
    return sets


def _of_entries(
    entries: Sequence[str], description: Description, *, required: bool
) -> ImageSet | None:
    """The images of folders, of lists and of single files; None where one is not there.

    Raises `DataError` instead, if `required`.
    """
    images: list[Path] = []
    folders: list[Path] = []
    for entry in entries:
        place = _resolve(entry, _bases(description))
        if place is None and required:
            raise DataError(f"{description.file}: {entry}: no such folder or file; correct it")
        if place is None:
            return None
        if place.is_dir():
            folders.append(place)
        elif image_files.is_image(place):
            images.append(place)
        else:
            images += _listed(place, description)
    if len(folders) == 1 and not images:
        found = image_files.find(folders[0]).images
        return (
            ImageSet(folder=folders[0], images=tuple(sorted(map(Path, found)))) if found else None
        )
    for place in folders:
        images += [place / name for name in image_files.find(place).images]
    if not images:
        return None
    common = Path(os.path.commonpath([image.parent for image in images]))
    relative = dict.fromkeys(image.relative_to(common) for image in images)
    return ImageSet(folder=common, images=tuple(sorted(relative)))


def _bases(description: Description) -> list[Path]:
    """What entries are relative to: `path`, then the file's folder."""
    own = description.file.parent
    return [own / description.path, own] if description.path else [own]


def _resolve(entry: str, bases: Sequence[Path]) -> Path | None:
    """The file or folder of an entry.

    Files are written for other machines and other folders (`../train/images`, `/content/set/val`),
    so leading parts are left out until the rest is found.
    """
    parts = [part for part in entry.strip().replace("\\", "/").split("/") if part not in ("", ".")]
    whole = Path(entry.strip().replace("\\", "/"))
    candidates = [base / whole for base in bases]
    candidates += [base.joinpath(*parts[i:]) for i in range(1, len(parts)) for base in bases]
    found = next((path for path in candidates if os.path.exists(path)), None)
    return None if found is None else Path(os.path.normpath(found))


def _listed(file: Path, description: Description) -> Iterator[Path]:
    """The images of a text list. Raises `DataError` at a line without an image."""
    bases = [file.parent, *_bases(description)]
    for number, line in enumerate(text_file.lines(folder.read_text(file, "path")), start=1):
        entry = line.strip()
        if not entry:
            continue
        if not image_files.is_image(entry):
            raise DataError(f"{file}: line {number}: {entry[:80]!r} is no image")
        place = _resolve(entry, bases)
        if place is None:
            raise DataError(f"{file}: line {number}: there is no image {entry[:200]}")
        yield place


def _label_places(image: Path) -> list[Path]:
    """Where an image's label may be: the last `images` of its path becomes `labels`; beside it."""
    parts = list(image.parts)
    if "images" not in parts[:-1]:
        return [image]
    last = len(parts) - 2 - parts[-2::-1].index("images")
    return [Path(*parts[:last], "labels", *parts[last + 1 :]), image]
