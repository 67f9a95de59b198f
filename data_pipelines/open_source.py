"""Opens the data set that an entry of a config describes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipelines.source import Source
from owl_det.config import (
    CocoSource,
    ImageTextSource,
    PseudoBoxesSource,
    ShapesWorldSource,
    SourceConfig,
    TfdsSource,
    VocSource,
    YoloSource,
)
from owl_det.errors import DataError


def open_source(entry: SourceConfig, data_path: str) -> Source:
    """Opens the source of one entry; `data_path` is the root where the entry names none.

    Raises `DataError` where files are missing, malformed or empty.
    """
    root = Path(getattr(entry, "path", "") or data_path)
    openers: dict[str, Callable[[Any, Path], Source]] = {
        "shapes_world": _shapes_world,
        "coco": _coco,
        "voc": _voc,
        "yolo": _yolo,
        "tfds": _tfds,
        "image_text": _image_text,
        "pseudo_boxes": _pseudo_boxes,
    }
    return openers[entry.kind](entry, root)


# Readers are imported when asked for: TensorFlow Datasets takes seconds, shapes world needs none.


def _shapes_world(entry: ShapesWorldSource, root: Path) -> Source:
    if entry.split.startswith("panoptic"):
        from data_pipelines.panoptic_world import PanopticWorld

        if entry.annotated_fraction < 1:
            raise DataError(f"shapes_world: {entry.split} has no annotated_fraction; leave it at 1")
        return PanopticWorld(
            split=entry.split, image_size=entry.image_size, num_images=entry.num_images
        )
    from data_pipelines.shapes_world import ShapesWorld

    return ShapesWorld(
        split=entry.split,
        image_size=entry.image_size,
        num_images=entry.num_images,
        annotated_fraction=entry.annotated_fraction,
    )


def _coco(entry: CocoSource, root: Path) -> Source:
    from data_pipelines import ov_coco
    from data_pipelines.readers.coco import CocoReader

    groups = {"all": None, "ov_coco": ov_coco.GROUPS, "ov_coco_base": ov_coco.BASE_GROUPS}
    return CocoReader(
        root / entry.annotations,
        root / entry.images,
        groups=groups.get(entry.subset),
        without_rare=entry.subset == "lvis_base",
        captions=root / entry.captions if entry.captions else None,
    )


def _voc(entry: VocSource, root: Path) -> Source:
    from data_pipelines.readers.voc import VocReader

    return VocReader(
        root / entry.annotations,
        root / entry.images,
        split_list=root / entry.split_list if entry.split_list else None,
        names=entry.names,
        queries=entry.queries,
    )


def _yolo(entry: YoloSource, root: Path) -> Source:
    from data_pipelines.readers.yolo import YoloReader

    return YoloReader(
        root,
        labels=entry.labels,
        images=entry.images,
        names=entry.names,
        split="val" if entry.split == "valid" else entry.split,
    )


def _tfds(entry: TfdsSource, root: Path) -> Source:
    from data_pipelines.readers.tfds import TfdsReader

    return TfdsReader(entry.builder, entry.split, data_dir=root)


def _image_text(entry: ImageTextSource, root: Path) -> Source:
    from data_pipelines.readers import image_text_files
    from data_pipelines.readers.image_text_reader import ImageTextReader

    where = root / entry.images
    if entry.captions:
        shards = image_text_files.open_coco_captions(where, root / entry.captions)
    else:
        keys = "the key `images` or `path` of the source"
        shards = image_text_files.open_files(where, keys)
    return ImageTextReader(shards)


def _pseudo_boxes(entry: PseudoBoxesSource, root: Path) -> Source:
    from data_pipelines.readers.pseudo_boxes import PseudoBoxesReader

    return PseudoBoxesReader(
        root / entry.records,
        min_box_score=entry.min_box_score,
        min_image_score=entry.min_image_score,
        hard_negatives=entry.hard_negatives,
    )
