"""What readers of image folders share: labels in memory, image files read when asked for."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from absl import logging
from jaxtyping import Float32

from data_pipelines import text_file
from data_pipelines.features import Category, Names, Record
from data_pipelines.image_files import IMAGE_SUFFIXES
from data_pipelines.image_ops import UnreadableImage
from data_pipelines.label_counts import LabelCounts, dropped_text
from data_pipelines.readers.image_names import ImageNames
from data_pipelines.readers.labelled_image import BEYOND, TINY, TWICE
from data_pipelines.readers.labelled_image import LabelledImage as LabelledImage
from data_pipelines.readers.labelled_image import Proper as Proper
from data_pipelines.readers.labelled_image import keep_proper as keep_proper
from data_pipelines.readers.labelled_image import labelled as labelled
from data_pipelines.readers.tally import Tally
from data_pipelines.readers.true_sizes import TrueSizes
from owl_det import files
from owl_det.errors import DataError, SourceError

_ODD_SHARE = 0.01  # of all boxes: so many of `_USUAL` are found in good data sets
_USUAL = (BEYOND, TINY, TWICE)

# The flag of a command that stands for a key of a source, where its name is another.
_FLAGS = {"labels": "--annotations", "path": "--annotations"}

# Of images that are looked for by their stem, versions leave out guesses that came later, so that
# data sets keep their version.
_LATER_GUESSES = frozenset(IMAGE_SUFFIXES) - {
    *(".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
}


class FolderReader:
    """Random access to the records of one image folder. Implements `source.Source`."""

    def __init__(
        self,
        kind: str,
        name: str,
        folder: Path,
        images: Sequence[LabelledImage],
        categories: Sequence[Category],
        dropped: Mapping[str, int],
        odd: Mapping[str, int] = MappingProxyType({}),
        *,
        examples: Mapping[str, str] = MappingProxyType({}),
        spelled: Mapping[str, str] = MappingProxyType({}),
    ):
        """`version` is `kind` and a hash of the images and categories, without the folders.

        `dropped` counts the boxes of the files that are not used by reason ("without area"), `odd`
        those that are used but look wrong ("reach beyond their images"); `examples` says for a
        reason where one of them is. They are logged. `spelled` is how names are written in the
        files, where they are not written as they are asked for; the version holds those.

        Some images are measured: boxes are clipped to the images as they are. Raises `DataError`
        if the folder is missing, there are no images, or the first hundred of them are all missing.
        """
        require_folder(folder, "images")
        if not images:
            raise DataError(f"the data set {name} has no images: no label names one of {folder}")
        self._files = ImageNames(folder, [image.files for image in images])
        _require_some(self._files, folder, name, images[:100])
        self.name = name
        self.categories = tuple(categories)
        self.version = f"{kind}-{_digest(images, categories, spelled)}"
        self.image_folder = folder
        self._images = images
        self._all_names = tuple(category.name for category in categories)
        tally = Tally(self._all_names, dropped, odd)
        for image in images:
            tally.add(image)
        self._true_sizes = TrueSizes(name, images, tally)
        self._true_sizes.look(lambda image: self._files.find(image.files))
        _warn(name, self.counts, +tally.odd, examples)

    @property
    def counts(self) -> LabelCounts:
        """Of all images, as far as it is known how large they are."""
        return self._true_sizes.counts()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        """Raises `UnreadableImage` if the image file is missing or cannot be read."""
        labels = self._images[index]
        file = self._files.find(labels.files)
        if file is None:
            raise UnreadableImage(f"{self.image_folder / labels.files[0]}: no such file")
        try:
            image = files.read_bytes(file)
        except OSError as error:
            raise UnreadableImage(f"{file}: {error.strerror}") from error
        labels = self._true_sizes.fitted(index, image, file)
        try:
            boxes_xyxy = self._boxes_xyxy(labels, image)
        except UnreadableImage as error:
            raise UnreadableImage(f"{file}: {error}") from error
        return Record(
            image=image,
            image_id=labels.image_id,
            boxes_xyxy=boxes_xyxy,
            names=tuple((name,) for name in labels.names),
            is_crowd=labels.is_crowd,
            scores=np.ones(len(labels.names), np.float32),
            negatives=self._negatives(labels),
            not_exhaustive=labels.not_exhaustive,
            areas=labels.areas,
            source=str(file),
            captions=labels.captions,
            given_id=labels.given_id,
        )

    def missing(self, count: int) -> list[str]:
        """Files of the first `count` images that are not there."""
        absent = (i for i in self._images[:count] if self._files.find(i.files) is None)
        return [str(self.image_folder / image.files[0]) for image in absent]

    def _count_images_anew(self) -> None:
        """For readers whose categories' `frequency` is the number of images with a box.

        They counted boxes within the sizes that their label files state; some images have others.
        """
        changes = self._true_sizes.image_changes
        self.categories = tuple(
            dataclasses.replace(c, frequency=c.frequency + changes[c.name]) for c in self.categories
        )

    def _boxes_xyxy(self, labels: LabelledImage, image: bytes) -> Float32[np.ndarray, "m 4"]:
        """For formats whose boxes depend on the size of the image."""
        del image
        return labels.boxes_xyxy

    def _negatives(self, labels: LabelledImage) -> Names:
        if labels.negatives is not None:
            return labels.negatives
        present = {*labels.names, *labels.not_exhaustive}
        return tuple([name for name in self._all_names if name not in present])


def image_counts(images: Iterable[LabelledImage], names: Iterable[str]) -> dict[str, int]:
    """In how many images each name occurs."""
    counts = dict.fromkeys(names, 0)
    for image in images:
        for name in set(image.names):
            counts[name] += 1
    return counts


def misplaced(problem: str, key: str) -> SourceError:
    """The error of a file or folder to which a key of the source, or a flag, points wrongly."""
    return SourceError(
        problem,
        keys=f"correct the key `{key}` or `path` of the source "
        "(or data.path, where the source has no path of its own)",
        flags=f"correct {_FLAGS.get(key, f'--{key}')}",
    )


def require_folder(folder: Path, key: str) -> None:
    """Raises `SourceError` if there is no such folder."""
    if not folder.is_dir():
        raise misplaced(f"{folder}: no such folder", key)


def read_file(file: Path, key: str) -> bytes:
    """The bytes of a label file; raises `SourceError` naming the key that led there."""
    try:
        return files.read_bytes(file)
    except OSError as error:
        raise misplaced(f"{file}: {error.strerror}", key) from error


def read_text(file: Path, key: str) -> str:
    """The text of a label file; raises as `read_file` and `text_file.decode`."""
    return text_file.decode(read_file(file, key), file)


def _warn(
    name: str, counts: LabelCounts, odd: Mapping[str, int], examples: Mapping[str, str]
) -> None:
    """One line for all boxes that are not used, or used though they look wrong."""
    total = counts.num_read
    parts = [dropped_text(counts.dropped, total)] if counts.num_dropped else []
    notable = {
        what: count
        for what, count in odd.items()
        if what not in _USUAL or count > _ODD_SHARE * total
    }
    parts += [f"{count} of {total} boxes {what}" for what, count in notable.items()]
    if not parts:
        return
    shown = [examples[key] for key in (*counts.dropped, *notable) if key in examples]
    such = f" (such as {'; '.join(shown)})" if shown else ""
    logging.warning("%s: %s%s", name, "; ".join(parts), such)


def _require_some(
    files: ImageNames, folder: Path, name: str, images: Sequence[LabelledImage]
) -> None:
    """Raises `SourceError` if none of the images is there; says if they are named otherwise."""
    absent = [image.files for image in images if not files.exact(image.files)]
    alike = [(names[0], path) for names in absent if (path := files.alike(names))]
    if alike:
        logging.warning(
            "%s: %d of the first %d images are named otherwise than in the label file, such as %r, "
            "taken to be %s",
            name,
            len(alike),
            len(images),
            *alike[0],
        )
    if alike or len(absent) < len(images):
        return
    cause = files.cause(images[0].files)
    raise misplaced(
        f"{folder}: holds none of the first {len(images)} images of {name}, such as "
        f"{images[0].files[0]}{': ' if cause else ''}{cause}",
        "images",
    )


def _digest(
    images: Iterable[LabelledImage], categories: Iterable[Category], spelled: Mapping[str, str]
) -> str:
    def written(names: Iterable[str]) -> Names:
        return tuple([spelled.get(name, name) for name in names])

    known = [
        (c.id if c.given_id is None else c.given_id, spelled.get(c.name, c.name), c.groups)
        for c in categories
    ]
    digest = hashlib.sha256(repr(known).encode())
    for image in sorted(images, key=lambda image: image.files):
        files = tuple(
            file
            for i, file in enumerate(image.files)
            if i == 0 or os.path.splitext(file)[1] not in _LATER_GUESSES
        )
        image_id = image.image_id if image.given_id is None else image.given_id
        negatives = None if image.negatives is None else written(image.negatives)
        labels = (files, image_id, written(image.names), negatives, written(image.not_exhaustive))
        digest.update(repr(labels).encode())
        digest.update(image.boxes_xyxy.tobytes())
        digest.update(image.is_crowd.tobytes())
        if image.captions:
            digest.update(repr(image.captions).encode())
    return digest.hexdigest()[:12]
