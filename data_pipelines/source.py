"""A source: a random-access data set of `Record`s with the categories it is evaluated on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from data_pipelines.features import Category, Record
from owl_det import config as config_lib
from owl_det.errors import DataError


class Source(Protocol):
    name: str
    categories: tuple[Category, ...]
    version: str  # of the data set; with a hash of what determines its content

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """The record at `index`. Raises `image_ops.UnreadableImage` if its file cannot be read."""
        ...


def build(source: Any, data_path: str) -> Source:
    """Opens the source that a config entry describes.

    Raises `DataError` where files are missing, malformed or empty.
    """
    builders: dict[str, Callable[[Any, Path], Source]] = {
        "shapes_world": _shapes_world,
        "coco": _coco,
        "voc": _voc,
        "yolo": _yolo,
        "tfds": _tfds,
        "image_text": _image_text,
        "pseudo_boxes": _pseudo_boxes,
    }
    root = Path(getattr(source, "path", "") or data_path)
    return builders[source.kind](source, root)


# Readers are imported when asked for: TensorFlow Datasets takes seconds, shapes world needs none.


def _shapes_world(source: config_lib.ShapesWorldSource, root: Path) -> Source:
    from data_pipelines.panoptic_world import SPLITS, PanopticWorld
    from data_pipelines.shapes_world import ShapesWorld

    if source.split in SPLITS:
        if source.annotated_fraction < 1:
            raise DataError(
                f"shapes_world: {source.split} has no annotated_fraction; leave it at 1"
            )
        return PanopticWorld(
            split=source.split, image_size=source.image_size, num_images=source.num_images
        )
    return ShapesWorld(
        split=source.split,
        image_size=source.image_size,
        num_images=source.num_images,
        annotated_fraction=source.annotated_fraction,
    )


def _coco(source: config_lib.CocoSource, root: Path) -> Source:
    from data_pipelines import ov_coco
    from data_pipelines.readers.coco import CocoReader

    groups = {"all": None, "ov_coco": ov_coco.GROUPS, "ov_coco_base": ov_coco.BASE_GROUPS}
    return CocoReader(
        root / source.annotations,
        root / source.images,
        groups=groups.get(source.subset),
        without_rare=source.subset == "lvis_base",
        captions=root / source.captions if source.captions else None,
    )


def _voc(source: config_lib.VocSource, root: Path) -> Source:
    from data_pipelines.readers.voc import VocReader

    return VocReader(
        root / source.annotations,
        root / source.images,
        split_list=root / source.split_list if source.split_list else None,
        names=source.names,
        queries=source.queries,
    )


def _yolo(source: config_lib.YoloSource, root: Path) -> Source:
    from data_pipelines.readers.yolo import YoloReader

    return YoloReader(
        root,
        labels=source.labels,
        images=source.images,
        names=source.names,
        split="val" if source.split == "valid" else source.split,
    )


def _tfds(source: config_lib.TfdsSource, root: Path) -> Source:
    from data_pipelines.readers.tfds import TfdsReader

    return TfdsReader(source.builder, source.split, data_dir=root)


def _image_text(source: config_lib.ImageTextSource, root: Path) -> Source:
    from data_pipelines.readers import image_text
    from data_pipelines.readers.image_text_reader import ImageTextReader

    where = root / source.images
    if source.captions:
        return ImageTextReader(image_text.open_coco_captions(where, root / source.captions))
    return ImageTextReader(image_text.open_files(where, "the key `images` or `path` of the source"))


def _pseudo_boxes(source: config_lib.PseudoBoxesSource, root: Path) -> Source:
    from data_pipelines.readers.pseudo_boxes import PseudoBoxesReader

    return PseudoBoxesReader(
        root / source.records,
        min_box_score=source.min_box_score,
        min_image_score=source.min_image_score,
        hard_negatives=source.hard_negatives,
    )
