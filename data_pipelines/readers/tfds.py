"""TensorFlow Datasets: detection builders prepared for random access."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from data_pipelines import image_ops
from data_pipelines import names as names_lib
from data_pipelines.features import Category, Names, Record
from data_pipelines.image_ops import UnreadableImage
from data_pipelines.label_counts import LabelCounts
from data_pipelines.readers.coco import plain_name
from data_pipelines.readers.labelled_image import Proper, keep_proper
from owl_det.config import digest
from owl_det.errors import DataError
from owl_det.optional import installation

_SURVEYED = 1000  # records read at construction to estimate how frequent each name is


class TfdsReader:
    """Random access to one split of a TFDS builder. Implements `source.Source`.

    The builder's features must hold `image` and `objects` with `bbox` and `label` (COCO, LVIS, VOC,
    Objects365 and the like); `objects/is_crowd` and `image/id` are used where they exist, an id
    is otherwise the position of the record, from 1. With `neg_category_ids` (LVIS) only those names
    are negatives; otherwise the annotation is taken to be exhaustive and every name without a box
    is a negative. LVIS names are made plain (`coco.plain_name`). A category's `id` is its label.

    Labels are read with each record, because they lie beside the pixels. So `frequency` is the
    number of images with the name among at most a thousand, evenly spaced, plus one, and
    `dropped_boxes` counts the images met so far. Boxes without a class (label -1) are dropped too.
    """

    counts: LabelCounts | None = None  # not known without reading all

    def __init__(self, builder: str, split: str, *, data_dir: Path):
        """`builder` is a TFDS name such as `coco/2017`, `split` may be a slice (`train[:10%]`).

        Raises `DataError` if the builder is unknown, not prepared below `data_dir` in a format with
        random access, has no such split, or lacks a feature; nothing is ever downloaded.
        """
        self._data, features, full_name = _open(builder, split, data_dir)
        objects = _objects(features, builder)
        self._is_federated = "neg_category_ids" in features
        self._has_crowds = "is_crowd" in objects
        spelled = tuple(
            plain_name(name) if self._is_federated else name for name in objects["label"].names
        )
        names_lib.require_distinct(spelled, full_name)
        self._names = tuple(names_lib.plain(name) for name in spelled)
        self.name = f"{full_name}/{split}"
        self._dropped: dict[int, Counter[str]] = {}  # index → why boxes are dropped
        if not len(self._data):
            raise DataError(f"{self.name}: the data set is empty; correct the key `split`")
        counts, labels = self._survey()
        self.categories = tuple(
            Category(id=index, name=name, frequency=counts[index])
            for index, name in enumerate(self._names)
        )
        content = digest([self.name, len(self), spelled, labels])
        self.version = f"tfds-{content}"

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        """Raises `UnreadableImage` if not even the header of the image can be read."""
        entry = self._data[index]
        source = f"{self.name}[{index}]"
        try:
            height, width = image_ops.image_size(entry["image"])
        except UnreadableImage as error:
            raise UnreadableImage(f"{source}: {error}") from error
        proper, num_unnamed = self._boxes(entry["objects"], height, width)
        dropped = proper.dropped + Counter({"without a class": num_unnamed})
        self._count_dropped(index, +dropped)
        partial = entry.get("not_exhaustive_category_ids", ())
        image_id, given_id = self._image_id(entry, index)
        return Record(
            image=entry["image"],
            image_id=image_id,
            boxes_xyxy=proper.boxes_xyxy,
            names=tuple((name,) for name in proper.names),
            is_crowd=proper.is_crowd,
            scores=np.ones(len(proper.names), np.float32),
            negatives=self._negatives(entry, {*proper.names, *proper.not_exhaustive}),
            not_exhaustive=(*self._named(partial), *proper.not_exhaustive),
            source=source,
            given_id=given_id,
        )

    def _boxes(self, objects: Mapping[str, Any], height: int, width: int) -> tuple[Proper, int]:
        """The boxes of an image in its pixels, and how many have no class."""
        labels = np.asarray(objects["label"], int).reshape(-1)
        # -1 is how TFDS writes a class that it does not know.
        is_named = (labels >= 0) & (labels < len(self._names))
        is_crowd = objects["is_crowd"] if self._has_crowds else np.zeros(len(labels), bool)
        y0, x0, y1, x1 = np.asarray(objects["bbox"], np.float64).reshape(-1, 4)[is_named].T
        proper = keep_proper(
            np.stack([x0 * width, y0 * height, x1 * width, y1 * height], axis=1),
            self._named(labels[is_named]),
            np.asarray(is_crowd, bool).reshape(-1)[is_named],
            height,
            width,
        )
        return proper, int((~is_named).sum())

    def _image_id(self, entry: Mapping[str, Any], index: int) -> tuple[int, int | str | None]:
        """A number of 31 bits, and the data set's own id where that is none."""
        given = entry.get("image/id", index + 1)
        given = given.decode("utf-8", "replace") if isinstance(given, bytes) else given
        if isinstance(given, str):
            return index + 1, given
        # Numbers that are too large make room below the largest.
        return (int(given), None) if 0 <= given < 2**31 else (2**31 - 1 - index, int(given))

    def _named(self, labels: Sequence[int] | np.ndarray) -> Names:
        return tuple(self._names[label] for label in labels if 0 <= label < len(self._names))

    @property
    def dropped_boxes(self) -> int:
        """How many were dropped from the records read so far, each record counted once."""
        return sum(sum(dropped.values()) for dropped in self._dropped.copy().values())

    def _negatives(self, entry: Mapping[str, Any], present: set[str]) -> Names:
        if self._is_federated:
            return self._named(entry["neg_category_ids"])
        return tuple(name for name in self._names if name not in present)

    def _count_dropped(self, index: int, dropped: Counter[str]) -> None:
        if not dropped:
            return
        if not self._dropped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
            logging.warning("%s: dropping boxes, first in [%d]: %s", self.name, index, reasons)
        self._dropped[index] = dropped

    def _survey(self) -> tuple[list[float], list[list[int]]]:
        """About how many images have each label, and the labels of evenly spaced records.

        A label that none of these has counts as a tenth of one of them.
        """
        indices = np.unique(np.linspace(0, len(self) - 1, _SURVEYED).round().astype(int))
        labels = [
            [int(label) for label in self._data[int(index)]["objects"]["label"]]
            for index in indices
        ]
        counts = [0] * len(self._names)
        for image in labels:
            for label in {label for label in image if 0 <= label < len(counts)}:
                counts[label] += 1
        return [max(count, 0.1) * len(self) / len(indices) for count in counts], labels


def _open(
    builder: str, split: str, data_dir: Path
) -> tuple[Sequence[Mapping[str, Any]], Mapping[str, Any], str]:
    """The records (images still encoded), their features and the full name with version."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(f"{builder}: needs TensorFlow Datasets: {installation('tfds')}") from error

    class Encoded(tfds.decode.SkipDecoding):
        """Leaves images encoded, and those inside sequences too (masks, which nobody reads)."""

        def decode_batch_example_np(self, example_data: Any) -> Any:
            return example_data

    try:
        opened: Any = tfds.builder(builder, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError, ImportError) as error:
        raise DataError(
            f"{builder}: neither a TFDS builder nor prepared below {data_dir}; "
            f"correct the key `builder` or `path` of the source ({str(error).splitlines()[0]})"
        ) from error
    features = _entries(opened.info.features)
    decoders: dict[str, Any] = {"image": Encoded()}
    decoders["objects"] = {
        key: Encoded()
        for key, feature in _objects(features, builder).items()
        if isinstance(feature, tfds.features.Image)
    }
    try:
        records = opened.as_data_source(split, decoders=decoders)
    except NotImplementedError as error:
        raise DataError(
            f"{opened.info.full_name}: not prepared below {data_dir} for random access; run "
            f"tfds build {builder} --data_dir={data_dir} --file_format=array_record"
        ) from error
    except (ValueError, KeyError) as error:
        raise DataError(
            f"{opened.info.full_name}: split {split!r} cannot be read: {error}; "
            f"it has {', '.join(opened.info.splits) or 'no splits'}"
        ) from error
    return records, features, opened.info.full_name


def _objects(features: Mapping[str, Any], builder: str) -> Mapping[str, Any]:
    """The features of each object. Raises `DataError` if this is no detection data set."""
    objects = _entries(getattr(features.get("objects"), "feature", None))
    if "image" not in features or not {"bbox", "label"} <= objects.keys():
        raise DataError(
            f"{builder}: needs the features image, objects/bbox and objects/label; "
            f"it has {', '.join(features)}"
        )
    return objects


def _entries(features: Any) -> dict[str, Any]:
    """The entries of a FeaturesDict, which is no Mapping; none if it is another feature."""
    return dict(features.items()) if hasattr(features, "items") else {}
