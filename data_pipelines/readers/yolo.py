"""YOLO: one txt file an image, one box a line."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Float32

from data_pipelines import image_files, image_ops, text_file
from data_pipelines import names as names_lib
from data_pipelines.features import Category, Names
from data_pipelines.readers import folder, labelled_image, yolo_description, yolo_layout, yolo_lines
from data_pipelines.readers.folder import LabelledImage
from data_pipelines.readers.yolo_description import Description
from data_pipelines.readers.yolo_layout import ImageSet, LabelIndex
from data_pipelines.readers.yolo_lines import Faults, Line, PolygonDoubts
from owl_det.errors import DataError, SourceError

_LABELS, _IMAGES = "labels", "images"  # the keys' defaults
_ANY = 10**9  # names: whatever the class number
# Text files beside labels that are none, whatever they hold.
_NO_LABELS = ("classes.txt", "train.txt", "val.txt", "valid.txt", "test.txt", "names.txt")


class YoloReader(folder.FolderReader):
    """Images, and boxes relative to them; the annotation is taken to be exhaustive.

    A line is `class cx cy width height`, or `class x1 y1 x2 y2 x3 y3 …`, a polygon whose extent is
    the box; where the data set's YAML file has `kpt_shape`, the numbers of a box may be followed by
    those of key points. A faulty line is dropped and counted; many of one fault are an error. An
    image without a txt file has no boxes. Folders are searched in depth; labels mirror the image
    folder. An image's id is its position, from 1, in sorted order; a category's id is its class
    number.
    """

    def __init__(
        self,
        root: Path,
        *,
        labels: str = _LABELS,
        images: str = _IMAGES,
        names: Names = (),
        split: str = "",
    ):
        """`root` is a folder, or the YAML file that describes a data set.

        `labels` and `images` are folders below the root. Left at their defaults, the layouts of
        Ultralytics, Roboflow and CVAT are found, and what the YAML file says of splits counts.
        `names` are the class names by number; empty = those of the YAML file, else of a list such
        as `classes.txt`, in the root or beside the labels. `split` is train, val or test; empty =
        there is only one set.

        Raises `DataError` if something is missing or malformed (file and line named), no image has
        labels, or there are several splits and none is named.
        """
        root, description, image_set = _find(root, labels, images, split)
        written = _class_names(names, description, root)
        names = tuple(map(names_lib.plain, written))
        if not image_set.images:
            links = f"; {image_set.links}" if image_set.links else ""
            raise folder.misplaced(f"{image_set.folder}: holds no image{links}", "images")
        read = _Labels(image_set, names, description.keypoints if description else None)
        counts = folder.image_counts(read.images, names)
        categories = [
            Category(id=index, name=name, frequency=float(counts[name]))
            for index, name in enumerate(names)
        ]
        super().__init__(
            "yolo",
            f"{root.name}/{split}" if split else root.name,
            image_set.folder,
            read.images,
            categories,
            read.dropped,
            read.odd,
            examples=read.faults.examples,
            spelled=dict(zip(names, written, strict=True)),
        )

    def _boxes_xyxy(self, labels: LabelledImage, image: bytes) -> Float32[np.ndarray, "m 4"]:
        height, width = image_ops.image_size(image)
        return labels.boxes_xyxy * np.array([width, height, width, height], np.float32)


def _find(
    root: Path, labels: str, images: str, split: str
) -> tuple[Path, Description | None, ImageSet]:
    """The folder of a data set, its description if there is one, and its images and labels.

    Raises `DataError` as `YoloReader` does.
    """
    description = yolo_description.read(root) if os.path.isfile(root) else None
    if description is not None:
        root = root.parent
    image_folder, label_folder = root / images, root / labels
    if description is None:
        places = (root, label_folder, label_folder.parent, image_folder.parent, root.parent)
        description = yolo_description.find(places)
    if (labels, images) == (_LABELS, _IMAGES):
        return root, description, yolo_layout.of_root(root, description, split)
    return root, description, yolo_layout.of_folders(image_folder, label_folder, split)


def _class_names(names: Names, description: Description | None, root: Path) -> Names:
    """The names by class number as they are written, all of them different."""
    if names:
        where = f"{root}: names"
    elif description is not None and description.names:
        where, names = f"{description.file}: names", description.names
    elif description is not None:
        raise DataError(f"{description.file}: names: expected a list of class names, got None")
    else:
        raise SourceError(
            f"{root}: has neither data.yaml nor classes.txt, and no other list of class names",
            keys="write one, or give the class names in the key `names`",
            flags="write one there or beside the labels",
        )
    names_lib.require_distinct(names, where)
    return names


class _Labels:
    """The labels of all images of a set."""

    def __init__(
        self, image_set: ImageSet, names: Sequence[str], keypoints: tuple[int, int] | None
    ):
        self.images: list[LabelledImage] = []
        self.faults, self.odd, self.dropped = Faults(), Counter[str](), Counter[str]()
        self._names = names
        # No key points at all is said of polygons that look like poses.
        self._keypoints = keypoints if keypoints and keypoints[0] else None
        self._may_be_polygons = keypoints is None
        self._doubts = PolygonDoubts()
        index = LabelIndex()
        files = [image_set.label_of(image, index) for image in image_set.images]
        _require_labels(files, image_set)
        for image_id, (image, file) in enumerate(
            zip(image_set.images, files, strict=True), start=1
        ):
            lines = [] if file is None else self._read(file)
            self._add(image, image_id, lines)
        self._doubts.refuse()
        self.faults.refuse_many()
        self.dropped += self.faults.counts
        _tell(image_set, files)

    def _read(self, file: Path) -> list[Line]:
        lines = []
        text = folder.read_text(file, "labels")
        for number, row in enumerate(text_file.lines(text), start=1):
            if not row.strip():
                continue
            where = f"{file}: line {number}"
            line = yolo_lines.parse(row, len(self._names), self._keypoints)
            self.faults.add(line, where)
            is_read = line.fault in ("", yolo_lines.FAR_OUTSIDE)
            if is_read and self._may_be_polygons and len(row.split()) > 5:
                self._doubts.add(row, where)
            lines.append(line)
        return lines

    def _add(self, image: Path, image_id: int, lines: Sequence[Line]) -> None:
        good = [line for line in lines if not line.fault]
        proper = folder.keep_proper(
            [line.corners for line in good], self._named(good), [False] * len(good), 1, 1
        )
        self.dropped += proper.dropped
        self.odd += proper.odd
        boxes = [(line.class_number, line.corners) for line in good]
        self.odd[labelled_image.TWICE] += labelled_image.num_twice(boxes)
        faulty = [line for line in lines if line.fault]
        self.images.append(
            LabelledImage(
                files=(image.as_posix(),),
                image_id=image_id,
                boxes_xyxy=proper.boxes_xyxy,
                names=proper.names,
                is_crowd=proper.is_crowd,
                not_exhaustive=(*proper.not_exhaustive, *self._named(faulty)),
            )
        )

    def _named(self, lines: Iterable[Line]) -> Names:
        """The class name of each line that tells its class."""
        numbers = (line.class_number for line in lines)
        return tuple(self._names[number] for number in numbers if number is not None)


def _require_labels(files: Sequence[Path | None], image_set: ImageSet) -> None:
    if any(file is not None for file in files):
        return
    label = image_set.images[0].with_suffix(".txt")
    place = image_set.label_folder
    raise folder.misplaced(
        f"{place}: holds no label file of any image in {image_set.folder}, such as {label}"
        if place is not None
        else f"{image_set.folder}: none of its images has a label file, such as {label}, in a "
        "folder `labels` or beside it",
        "labels",
    )


def _tell(image_set: ImageSet, files: Sequence[Path | None]) -> None:
    """Logs what of images and labels has no counterpart, and what is not searched."""
    if image_set.links:
        logging.warning("%s: %s", image_set.folder, image_set.links)
    without = [str(i) for i, f in zip(image_set.images, files, strict=True) if f is None]
    if without:
        logging.warning(
            "%s: %d of %d images have no label file and count as images without boxes, such as %s",
            image_set.folder,
            len(without),
            len(files),
            without[0],
        )
    shared = [file for file, count in Counter(f for f in files if f).items() if count > 1]
    if shared:
        logging.warning(
            "%s: %d label files belong to two images each, such as %s",
            image_set.folder,
            len(shared),
            shared[0],
        )
    orphans = _orphans(image_set, {file for file in files if file is not None})
    if orphans:
        logging.warning(
            "%s: %d label files have no image, such as %s",
            image_set.label_folder,
            len(orphans),
            orphans[0],
        )


def _orphans(image_set: ImageSet, used: set[Path]) -> list[Path]:
    """Label files of the folder and its subfolders that belong to no image."""
    place = image_set.label_folder
    if place is None:
        return []
    names = sorted(name for name in image_files.find(place).others if name.lower().endswith(".txt"))
    others = [place / name for name in names]
    return [file for file in others if file not in used and _has_labels(file)]


def _has_labels(file: Path) -> bool:
    """True if a line of a text file is one of labels, it is empty or cannot be read."""
    if file.name.lower() in _NO_LABELS:
        return False
    try:
        rows = [row for row in text_file.lines(folder.read_text(file, "labels")) if row.strip()]
    except DataError:
        return True
    if not rows:
        return True
    faults = (yolo_lines.parse(row, _ANY, None).fault for row in rows)
    return any(fault not in (yolo_lines.NO_CLASS, yolo_lines.NO_NUMBERS) for fault in faults)
