"""Data: the sources, the augmentation, and how examples are made of both.

Zero means "off" or "no limit" where a key says so.
"""

from dataclasses import dataclass, field
from typing import Literal

from owl_det.config.checks import not_negative, positive, require


@dataclass(frozen=True, kw_only=True)
class ShapesWorldSource:
    """Images drawn from a seed: the embedded data set."""

    kind: Literal["shapes_world"] = "shapes_world"
    weight: float = 1.0
    split: Literal[
        "train",
        "test",
        "image_text",
        "image_text_test",
        "crowded",
        "balanced",
        "panoptic",  # with stuff, as those below
        "panoptic_test",
        "panoptic_text",
    ] = "train"
    image_size: int = 64
    num_images: int = 8192
    annotated_fraction: float = 1.0  # federated: share of base names annotated in each image

    def check(self, where: str) -> None:
        """Raises `ConfigError` for a value out of range."""
        positive(self, where, "image_size")
        require(0 < self.annotated_fraction <= 1, f"{where}.annotated_fraction: must be in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class CocoSource:
    """COCO JSON (and LVIS JSON, whose federated fields are honoured)."""

    kind: Literal["coco"] = "coco"
    weight: float = 1.0
    path: str = ""  # root folder; empty = data.path
    annotations: str = "annotations.json"  # relative to the root
    images: str = "images"
    # OV-COCO: 48 base and 17 novel categories for evaluation, the base ones alone for training.
    # LVIS: all categories but the rare ones, for training that leaves them novel.
    subset: Literal["all", "ov_coco", "ov_coco_base", "lvis_base"] = "all"
    # COCO's captions JSON of these images, relative to the root, for config.data.with_captions.
    captions: str = ""


@dataclass(frozen=True, kw_only=True)
class VocSource:
    """A folder of Pascal VOC XML files beside a folder of images."""

    kind: Literal["voc"] = "voc"
    weight: float = 1.0
    path: str = ""
    annotations: str = "Annotations"
    images: str = "JPEGImages"
    split_list: str = ""  # text file of stems, relative to the root; empty = every XML file
    names: tuple[str, ...] = ()  # class names; empty = those that occur in any XML file
    queries: tuple[str, ...] = ()  # what to ask for each name; empty = the names themselves


@dataclass(frozen=True, kw_only=True)
class YoloSource:
    """YOLO txt labels: one `class cx cy w h` line a box, relative to the image."""

    kind: Literal["yolo"] = "yolo"
    weight: float = 1.0
    path: str = ""  # root folder, or the data set's YAML file in it
    # Which part of a root that has several: images/train or train/images, or what the YAML file
    # says. Empty = the root holds one set.
    split: Literal["", "train", "val", "valid", "test"] = ""
    labels: str = "labels"
    images: str = "images"
    names: tuple[str, ...] = ()  # by class number; empty = of data.yaml, classes.txt or obj.names


@dataclass(frozen=True, kw_only=True)
class TfdsSource:
    """A TensorFlow Datasets detection builder, prepared as array_record (random access)."""

    kind: Literal["tfds"] = "tfds"
    weight: float = 1.0
    path: str = ""  # TFDS data directory; empty = data.path
    builder: str = "coco/2017"
    split: str = "train"


@dataclass(frozen=True, kw_only=True)
class ImageTextSource:
    """Images with captions and no boxes, for contrastive training and retrieval."""

    kind: Literal["image_text"] = "image_text"
    weight: float = 1.0
    path: str = ""
    # Of .tar (WebDataset) or .tfrecord files, or a folder of them, or of images; relative to the
    # root, empty = the root itself.
    images: str = ""
    # COCO's captions JSON, relative to the root; empty = captions lie with the images.
    captions: str = ""


@dataclass(frozen=True, kw_only=True)
class PseudoBoxesSource:
    """Records of `owl-det annotate`."""

    kind: Literal["pseudo_boxes"] = "pseudo_boxes"
    weight: float = 1.0
    path: str = ""
    records: str = ""  # the job's output folder, relative to the root; empty = the root itself
    min_box_score: float = 0.0  # boxes below are left out; 0 = as the job was told
    min_image_score: float = 0.0  # images whose best box is below are left out; 0 = likewise
    # Names that the annotator wrongly detects in an image, hardest first, are asked as negatives;
    # at most as many as owl-det annotate mined (--hard_negatives).
    hard_negatives: int = 0

    def check(self, where: str) -> None:
        """Raises `ConfigError` for a value out of range."""
        require(
            0 <= self.min_box_score <= (self.min_image_score or 1) <= 1,
            f"{where}: min_box_score <= min_image_score, both in [0, 1]",
        )
        not_negative(self, where, "hard_negatives")


SourceConfig = (
    ShapesWorldSource
    | CocoSource
    | VocSource
    | YoloSource
    | TfdsSource
    | ImageTextSource
    | PseudoBoxesSource
)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Training augmentation, in this order: merge, crop, flip, mosaic."""

    merge_iou: float = 0.0  # merge instances that overlap at least so much; 0 = off
    crop_probability: float = 0.0
    crop_min_area: float = 0.33  # of the image
    crop_keep: float = 0.6  # a box stays if so much of its area stays
    flip: bool = False
    mosaic_sizes: tuple[int, ...] = (1,)  # grid sides
    mosaic_probabilities: tuple[float, ...] = (1.0,)
    tile_scale_min: float = 1.0  # a tile's image is resized to U(min, 1) of the tile
    photometric: float = 0.0  # largest relative change of brightness and contrast; 0 = off

    def check(self, where: str) -> None:
        """Raises `ConfigError` for a value out of range."""
        for key in ("crop_probability", "photometric"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"{where}.{key}: must be in [0, 1], got {value}")
        require(
            len(self.mosaic_sizes) == len(self.mosaic_probabilities) > 0,
            f"{where}.mosaic_probabilities: one number for each of mosaic_sizes",
        )
        require(
            all(1 <= size <= 6 for size in self.mosaic_sizes),
            f"{where}.mosaic_sizes: grid sides go from 1 to 6",
        )
        require(
            all(p >= 0 for p in self.mosaic_probabilities) and sum(self.mosaic_probabilities) > 0,
            f"{where}.mosaic_probabilities: must be non-negative and not all zero",
        )
        require(0 < self.tile_scale_min <= 1, f"{where}.tile_scale_min: in (0, 1]")
        require(0 <= self.crop_keep <= 1, f"{where}.crop_keep: must be in [0, 1]")
        require(0 < self.crop_min_area <= 1, f"{where}.crop_min_area: in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str = ""  # root of the data set, for every source that names none of its own
    tokenizer: str = ""  # tokenizer.json or spiece.model; empty = CLIP's vocabulary, built in
    train: dict[str, SourceConfig] = field(default_factory=dict)
    eval: dict[str, SourceConfig] = field(default_factory=dict)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    max_instances: int = 100
    max_queries: int = 100  # of one image or mosaic
    max_distinct_queries: int = 0  # of one data shard's batch; 0 = no limit
    min_queries: int = 50  # pseudo-negatives are added up to here
    # What other images of a data shard's batch are asked for becomes negatives, up to max_queries.
    batch_negatives: bool = False
    train_prompts: Literal["none", "clip"] = "clip"
    eval_prompts: Literal["none", "clip_best7"] = "clip_best7"
    shuffle_labels: bool = False  # control: labels point at random queries
    with_captions: bool = False  # batches carry a caption of every image
    num_workers: int = 0  # threads that make examples; 0 = one per core

    def check(self, where: str) -> None:
        """Raises `ConfigError` for a value out of range, or sources that do not fit."""
        not_negative(self, where, "num_workers", "max_distinct_queries")
        positive(self, where, "max_instances", "max_queries")
        require(bool(self.train), f"{where}.train: name at least one source")
        require(
            all(source.weight > 0 for source in self.train.values()),
            f"{where}.train: weights are positive",
        )
        require(
            not self.with_captions or any(map(may_have_captions, self.train.values())),
            f"{where}.with_captions: no source of {where}.train has captions; of a coco source "
            "`captions` names the file that has them",
        )
        require(
            self.max_queries >= self.min_queries,
            f"{where}.max_queries: {self.max_queries} is below min_queries {self.min_queries}",
        )
        require(
            self.max_queries > self.min_queries or not self.batch_negatives,
            f"{where}.batch_negatives: min_queries {self.min_queries} leaves no room; lower it "
            f"below {where}.max_queries",
        )


def may_have_captions(source: SourceConfig) -> bool:
    """Whether a source can give its images captions, as far as the config tells."""
    kinds = (ShapesWorldSource, ImageTextSource, PseudoBoxesSource)
    return isinstance(source, kinds) or (isinstance(source, CocoSource) and bool(source.captions))
