"""Folders of images, cut into contiguous shards, with captions in one file or beside the images."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from absl import logging

from data_pipelines import image_files
from data_pipelines.image_files import FoundFiles
from data_pipelines.readers import captions
from data_pipelines.readers.captions import Texts
from data_pipelines.readers.image_text_shards import Place, Sample, Unreadable, cut, version_of
from owl_det import files
from owl_det.errors import DataError


class FolderShards:
    """The images of a folder. Implements `LocatedShards`."""

    def __init__(
        self,
        found: FoundFiles,
        num_shards: int,
        texts: Mapping[str, Texts] | None,
        captions_file: Path | None,
        beside: Mapping[str, str] = MappingProxyType({}),
    ):
        """`texts` by image, and where they were read; None: they lie `beside`, by image.

        Raises `DataError` if there are no images, or fewer than shards.
        """
        self._folder, self._texts = found.folder, texts
        self._files = list(found.images) if texts is None else sorted(texts)
        if not self._files:
            raise DataError(found.nothing("images, .tar or .tfrecord files"))
        self._beside = beside
        self._starts = cut(len(self._files), num_shards)
        self.name = str(self._folder)
        files = [self._folder / file for file in self._files]
        texts_beside = [self._folder / text for text in beside.values()]
        read = [captions_file] if captions_file else texts_beside
        version = version_of("folder", [*files, *read])
        self.version = f"{version}-{len(self)}"

    def __len__(self) -> int:
        return len(self._starts) - 1

    def samples(self, shard: int) -> Iterator[Sample | Unreadable]:
        """Files that are gone, or may not be read, are `Unreadable`; not if all are."""
        is_any_read = False
        for place in self.locate(shard):
            try:
                sample = self._read(place)
            except (FileNotFoundError, PermissionError) as error:
                sample = Unreadable(key=place.key, reason=str(error))
            else:
                is_any_read = True
            yield sample
        if not is_any_read:
            raise OSError(f"{self._folder}: no file of shard {shard} can be read; is it there?")

    def locate(self, shard: int) -> Iterator[Place]:
        for index in range(self._starts[shard], self._starts[shard + 1]):
            name = self._files[index]
            # Of names that are no UTF-8 the bytes are written out.
            key = os.fsencode(name).decode("utf-8", "backslashreplace")
            has_text = (
                name in self._beside if self._texts is None else bool(self._texts[name].texts)
            )
            yield Place(key=key, numbers=(index,), has_text=has_text)

    def fetch(self, shard: int, place: Place) -> Sample | Unreadable:
        try:
            return self._read(place)
        except OSError as error:
            return Unreadable(key=place.key, reason=str(error))

    def _read(self, place: Place) -> Sample | Unreadable:
        name = self._files[place.numbers[0]]
        image = files.read_bytes(self._folder / name)
        try:
            texts = self._texts[name] if self._texts is not None else self._text_beside(name)
        except DataError as error:
            return Unreadable(key=place.key, reason=str(error))
        return Sample(key=place.key, image=image, texts=texts.texts, note=texts.note)

    def _text_beside(self, name: str) -> Texts:
        beside = self._beside.get(name)
        return Texts() if beside is None else read_beside(self._folder / beside)


def open_folder(folder: Path, num_shards: int) -> FolderShards:
    """The images of a folder and its subfolders, with the captions that are found there.

    They are in captions.jsonl or metadata.jsonl, else in a text beside each image, else in a table
    such as metadata.csv, else in JSON beside each image. Raises `DataError` if there are no images,
    or if a file of captions is malformed.
    """
    found = image_files.find(folder)
    for line in found.lines()[:1] if any("/" in name for name in found.images) else []:
        logging.warning("%s", line)
    if found.links:
        logging.warning("%s: %s", folder, found.of_links())
    table = _first_table(found, captions.CAPTION_FILES)
    if table is not None:
        return _of_table(found, num_shards, *table)
    beside = _texts_beside(found, captions.BESIDE)
    if not _is_any_captioned(found, beside):
        table = _first_table(found, captions.TABLE_FILES)
        if table is not None:
            return _of_table(found, num_shards, *table)
        last = _texts_beside(found, captions.BESIDE_LAST)
        beside = last if _is_any_captioned(found, last) else beside
    for name in sorted(found.others & {*captions.PARQUET_FILES}):
        logging.warning("%s: is not read; write its captions to metadata.csv", folder / name)
    if not _is_any_captioned(found, beside):
        _tell_of_tables(found)
    return FolderShards(found, num_shards, None, None, beside)


def _tell_of_tables(found: FoundFiles) -> None:
    """Logs files that may hold captions, where none are found."""
    known = {*captions.CAPTION_FILES, *captions.TABLE_FILES, *captions.PARQUET_FILES}
    suffixes = (".csv", ".tsv", ".jsonl", ".parquet")
    others = sorted(
        name
        for name in found.others - known
        if name.lower().endswith(suffixes) or name.rpartition("/")[2] in known
    )
    if others:
        logging.warning(
            "%s: %s not read: tables of captions are called metadata.csv, metadata.jsonl or "
            "captions.json, and lie in the folder that is named",
            *(found.folder, f"{', '.join(others[:3])} {'are' if others[1:] else 'is'}"),
        )


def _first_table(found: FoundFiles, names: Sequence[str]) -> tuple[Path, dict[str, Texts]] | None:
    for name in names:
        file = found.folder / name
        if name in found.others and (texts := captions.read_table(file, frozenset(found.images))):
            return file, texts
    return None


def read_beside(file: Path) -> Texts:
    """The captions of a text or JSON file. Raises `DataError` if a text cannot be read."""
    content = files.read_bytes(file)
    if file.suffix == ".json":
        try:
            return captions.of_json(content, file.name)
        except DataError as error:
            return Texts(note=str(error))
    text, note = captions.of_text(content, str(file))
    return Texts(tuple(t.strip() for t in text), note)


def _of_table(
    found: FoundFiles, num_shards: int, file: Path, texts: Mapping[str, Texts]
) -> FolderShards:
    """An image that the file does not list has no caption, but is there."""
    every = dict.fromkeys(found.images, Texts()) | dict(texts)
    if not any(image in texts for image in found.images):
        missing = next(iter(texts))
        raise DataError(
            f"{file}: none of its {len(texts)} images is in the folder, such as {missing}; names "
            "are relative to the folder of the file"
        )
    return FolderShards(found, num_shards, every, file)


def _texts_beside(found: FoundFiles, suffixes: Sequence[str]) -> dict[str, str]:
    """The text file of each image that has one."""
    beside: dict[str, str] = {}
    for name in found.images:
        path = PurePosixPath(name)
        guesses = [*(str(path.with_suffix(s)) for s in suffixes), f"{name}{suffixes[0]}"]
        text = next((guess for guess in guesses if guess in found.others), None)
        if text is not None:
            beside[name] = text
    return beside


def _is_any_captioned(found: FoundFiles, beside: Mapping[str, str]) -> bool:
    """True at the first image with a caption beside it; labels of boxes are none."""
    for text in beside.values():
        try:
            if read_beside(found.folder / text).texts:
                return True
        except (DataError, OSError):
            return True  # it is reported where it is read
    return False
