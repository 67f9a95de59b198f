"""The schema of a config: every key and its default.

`configs/*.py` edit a locked `ml_collections.ConfigDict` made from `Config()`; `resolve.py` checks
the result and turns it into these frozen dataclasses, and everything below `main.py` reads only
those. Zero means "off" or "no limit" where a key says so, so that every key has one type on the
command line.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

Protocol = Literal["coco", "lvis", "fixed"]

# --- model ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ImageTowerConfig:
    """A vision transformer; the defaults are CLIP's (SigLIP and LiT: see docs/towers.md)."""

    patch_size: int = 32
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    # "sincos2d" starts the (learned) positions from a 2-D sine-cosine grid: from scratch, patches
    # find their neighbours far sooner than from CLIP's small random numbers.
    position_init: Literal["normal", "sincos2d"] = "normal"
    # How a whole image is pooled; map (attention pooling) and mean have no class token.
    pooling: Literal["class_token", "map", "mean"] = "class_token"
    pre_norm: bool = True  # a norm before the first layer
    patch_bias: bool = False
    # From the pooled token to the shared space: nothing, a matrix, a matrix and a bias.
    projection: Literal["none", "linear", "affine"] = "linear"
    # "values": patch tokens do not attend in the last block, each passes on its own value. Dense
    # features keep to their place (MaskCLIP, CLIPSelf); the class token attends as ever.
    last_block: Literal["full", "values"] = "full"
    droplayer_rate: float = 0.2  # of the last layer; ramps linearly from 0 (first layer)
    dropout_rate: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """A text transformer; the defaults are CLIP's: causal, pooled at the end token."""

    # Whose rules turn text to ids; "siglip" and "siglip2" need a file (config.data.tokenizer).
    tokenizer: Literal["clip", "siglip", "siglip2"] = "clip"
    vocabulary_size: int = 49408
    num_positions: int = 16
    width: int = 512
    num_layers: int = 12
    num_heads: int = 8
    mlp_width: int = 2048
    is_causal: bool = True
    pooling: Literal["end_token", "last"] = "end_token"  # last: at the last position, even padding
    projection_bias: bool = False
    droplayer_rate: float = 0.1
    dropout_rate: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """CLIP's ResNet-50 (image side): a teacher, nothing of it is trained."""

    width: int = 64  # of the first stage; the last has 32 times as much
    num_blocks: tuple[int, ...] = (3, 4, 6, 3)  # of each stage
    num_heads: int = 32  # of the attention pool
    norm_epsilon: float = 1e-5  # of the batch norms


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The detector: two towers and heads."""

    family: Literal["owl"] = "owl"  # of detectors: a row of `modeling.build.FAMILIES`
    image_size: int = 768  # side of the padded square, pixels
    embedding_dim: int = 512  # of class embeddings and query embeddings
    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    # Only in a checkpoint of kind "resnet", where it takes the place of `image`.
    resnet: ResNetConfig = field(default_factory=ResNetConfig)
    # Which contrastive parameters there are beside the detector's: image pooling and projection and
    # a scale of the cosine, for "sigmoid" (SigLIP) also a bias.
    contrastive: Literal["none", "softmax", "sigmoid"] = "none"
    activation: Literal["quick_gelu", "gelu", "gelu_tanh"] = "quick_gelu"
    head_activation: Literal["quick_gelu", "gelu", "gelu_tanh"] = "gelu_tanh"
    norm_epsilon: float = 1e-5
    merge_norm_epsilon: float = 1e-6  # of the norm after the class token is merged in
    box_bias: Literal["both", "location", "none"] = "both"
    has_objectness_head: bool = True  # OWL-ViT has none: objectness is 0 for every token
    class_prior: float = 0.01  # initial score of every query, sets the bias of the logit shift
    class_initial_scale: float = 1.0  # of the cosine, sets the bias of the logit scale
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix work; parameters stay float32
    # xla: on a CPU a part of the scores at a time; plain: all of them at once; portable: as xla,
    # but chosen where the program runs (exports); cudnn: fused, on NVIDIA GPUs.
    attention: Literal["xla", "cudnn", "plain", "portable"] = "xla"
    # What the backward pass computes again per layer: nothing; all of it; all but products with
    # weights (and, where attention goes by chunks, its result): little time for much memory.
    remat: Literal["none", "full", "dots"] = "none"
    scan_unroll: int = 1  # layers unrolled per scan step; more compiles longer, runs faster


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """How pixels become the model's input. Travels with every checkpoint."""

    # pad: the longer side becomes the square's, the rest is padding at the bottom and right;
    # stretch: both sides become the square's (Hugging Face's OWL-ViT).
    geometry: Literal["pad", "stretch"] = "pad"
    # Pillow's antialiased kernels, then padding; or "gaussian": padding, then a Gaussian filter and
    # linear interpolation, as scikit-image does (Hugging Face's OWLv2 and Scenic's notebook).
    resize: Literal["bilinear", "bicubic", "gaussian"] = "bilinear"
    pad_value: float = 0.5  # of the [0, 1] image
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """OWLv2's training efficiency. Off at inference."""

    token_drop_rate: float = 0.0  # share of patches dropped, least pixel variance first
    token_drop_noise: float = 0.01  # uniform noise added to the [0, 1] image before the variance
    instance_top_k: int = 0  # tokens kept by objectness for heads and losses; 0 = all


@dataclass(frozen=True, kw_only=True)
class HungarianAssigner:
    """One prediction for each instance, at the least total cost (DETR, OWL-ViT).

    The cost of a pair has the weights of the losses.
    """

    kind: Literal["hungarian"] = "hungarian"


Assigner = HungarianAssigner  # which instance each prediction stands for; a union by `kind`


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    assigner: Assigner = field(default_factory=HungarianAssigner)
    focal_alpha: float = 0.3
    focal_gamma: float = 2.0
    class_weight: float = 1.0  # weights of the loss and of the matching cost
    l1_weight: float = 1.0
    giou_weight: float = 1.0
    objectness_weight: float = 1.0
    # Share of unmatched tokens, drawn at random, that the class loss counts; HierKD takes 0.1.
    negative_share: float = 1.0


# --- distillation --------------------------------------------------------------------------------

# A branch is on where its weight is not 0; any of them go together. See docs/distillation.md.


@dataclass(frozen=True, kw_only=True)
class RegionsConfig:
    """The regions that CLIPSelf and DenseVLM teach: one set of each image, for both."""

    # patches: the cells of a random grid over the image, and the tiles of a mosaic; proposals: the
    # boxes of the data source.
    kind: Literal["patches", "proposals"] = "patches"
    # Which grids (arXiv 2310.01403 and 2412.06244, as their code draws them): 24 of up to 6 x 6
    # cells, or 17 of at least 2 rows. "whole", a control: the one cell of a 1 x 1 grid.
    grids: Literal["clipself", "densevlm", "whole"] = "clipself"
    max_regions: int = 20  # of one image; a random choice where there are more
    crop_scale: float = 1.0  # the teacher's crops are so much larger; 1.5 for proposals


@dataclass(frozen=True, kw_only=True)
class GridClipGridConfig:
    """GridCLIP, grid level: every token against the queries (arXiv 2303.09252)."""

    weight: float = 0.0  # 1 in the paper
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0


@dataclass(frozen=True, kw_only=True)
class GridClipImageConfig:
    """GridCLIP, image level: pooled tokens, through an adapter, against the image's embedding."""

    weight: float = 0.0  # 10 in the paper


@dataclass(frozen=True, kw_only=True)
class ClipSelfConfig:
    """CLIPSelf: pooled tokens of a region against its crop's embedding (arXiv 2310.01403)."""

    weight: float = 0.0  # 1 in the paper


@dataclass(frozen=True, kw_only=True)
class DenseVlmConfig:
    """DenseVLM: names that a frozen model retrieves for regions (arXiv 2412.06244)."""

    weight: float = 0.0  # 1 in the paper
    things: tuple[str, ...] = ()
    stuff: tuple[str, ...] = ()
    template: str = "a photo of a {}."  # of every name, for teacher and student
    threshold: float = 0.3  # regions whose best name is not more probable are left out
    temperature: float = 0.01
    # What a region is held against: see losses/densevlm.py.
    contrast: Literal["decoupled", "all", "separate"] = "decoupled"


@dataclass(frozen=True, kw_only=True)
class HierKdInstanceConfig:
    """HierKD, instance level: matched tokens against crops of objects (arXiv 2203.10593)."""

    weight: float = 0.0  # 1 in the paper
    norm: Literal["l1", "l2"] = "l1"
    boxes: Literal["truth", "predicted"] = "truth"  # what is cropped; only "truth" can be cached
    min_iou: float = 0.5  # of a matched token's box with the true one
    crop_scale: float = 1.0  # 1.5 shows more of the surroundings (table 2 of the paper)
    max_crops: int = 20  # of one image, chosen at random; every slot costs a pass of the teacher


@dataclass(frozen=True, kw_only=True)
class HierKdGlobalConfig:
    """HierKD, global level: cells of the image against its caption, over the global batch."""

    weight: float = 0.0  # 1 in the paper
    grid_side: int = 3
    pooling: Literal["max", "mean"] = "max"
    objective: Literal["contrastive", "positive"] = "contrastive"


@dataclass(frozen=True, kw_only=True)
class CustomBranchConfig:
    """A branch of your own: an importable module that defines `BRANCH` (docs/add_a_branch.md)."""

    module: str = ""
    weight: float = 0.0
    options: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation from frozen models."""

    teacher: str = ""  # checkpoint of towers or a ResNet: image and text vectors of the targets
    dense_teacher: str = ""  # towers whose tokens DenseVLM asks for names; empty = `teacher`
    dense_image_size: int = 0  # of the dense teacher's input, pixels; 0 = model.image_size
    # Of the dense teacher; see model.image.last_block. Where tokens are pooled by their mean,
    # "full" is what they were trained with.
    dense_last_block: Literal["full", "values"] = "values"
    cache: str = ""  # folder of `owl-det cache-teacher`: training runs no teacher
    # Branches that set tokens beside the teacher's vectors need a text tower that starts as the
    # teacher's; False = you know better.
    require_same_text: bool = True
    # Control: every image, or mosaic, gets what the teacher says of another one of the batch.
    shuffle_targets: bool = False
    regions: RegionsConfig = field(default_factory=RegionsConfig)
    gridclip_grid: GridClipGridConfig = field(default_factory=GridClipGridConfig)
    gridclip_image: GridClipImageConfig = field(default_factory=GridClipImageConfig)
    clipself: ClipSelfConfig = field(default_factory=ClipSelfConfig)
    densevlm: DenseVlmConfig = field(default_factory=DenseVlmConfig)
    hierkd_instance: HierKdInstanceConfig = field(default_factory=HierKdInstanceConfig)
    hierkd_global: HierKdGlobalConfig = field(default_factory=HierKdGlobalConfig)
    custom: dict[str, CustomBranchConfig] = field(default_factory=dict)

    def branches(self) -> dict[str, Any]:
        """The entry of every branch, by name."""
        named = {key.name: getattr(self, key.name) for key in dataclasses.fields(self)}
        known = {name: entry for name, entry in named.items() if hasattr(entry, "weight")}
        return {**known, **self.custom}

    def active(self) -> dict[str, Any]:
        """The entries whose weight is not 0."""
        return {name: entry for name, entry in self.branches().items() if entry.weight != 0}


# --- data ----------------------------------------------------------------------------------------


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


Source = (
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


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str = ""  # root of the data set, for every source that names none of its own
    tokenizer: str = ""  # tokenizer.json or spiece.model; empty = CLIP's vocabulary, built in
    train: dict[str, Source] = field(default_factory=dict)
    eval: dict[str, Source] = field(default_factory=dict)
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


# --- training ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Gradient clipping. Per-example scopes clip each example's gradient before the mean."""

    scope: Literal["none", "global", "shared_text", "exact"] = "shared_text"
    norm: float = 1.0
    microbatch: int = 1  # examples per data shard whose gradients are held at once (per example)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    kind: Literal["adam", "adafactor", "sgd"] = "adam"
    learning_rate: float = 5e-5  # image tower and heads
    image_learning_rate: float = 0.0  # of the image tower alone; 0 = learning_rate
    text_learning_rate: float = 2e-6
    frozen: tuple[str, ...] = ()  # path patterns (regex) of parameters that do not move
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8  # of adam
    # Decoupled, times the learning rate; of all parameters but gains, biases and the logit scale.
    weight_decay: float = 0.0
    clip: ClipConfig = field(default_factory=ClipConfig)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    kind: Literal["cosine", "inverse_sqrt", "constant"] = "cosine"
    warmup_steps: int = 1000
    timescale: int = 10_000  # of inverse_sqrt
    cooldown_steps: int = 0  # linear to 0 over the last steps


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Device mesh; one of the three may be -1 (all remaining devices)."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 1000
    keep: int = 2
    init_from: str = ""  # workdir or checkpoint whose parameters start the training
    # Architecture, preprocessing and tokeniser are those of `init_from`, not of config.model; what
    # concerns training only (noise, precision, memory) stays as config.model says.
    model_from_init: bool = False
    # Path patterns (regex) of parameters that start anew, not from `init_from`; of a tower that
    # does so as a whole, the architecture may differ too.
    fresh: tuple[str, ...] = ()
    image_size: int = 0  # with model_from_init: side of the padded square; 0 = as in `init_from`
    # With towers in `init_from`: the class head starts from their visual projection, so that class
    # embeddings start in the space of texts. See `checkpoint.adapt`.
    class_head_from_projection: bool = False


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    # Which detections count: "coco" 100 per image and category, "lvis" 300 per image, "fixed"
    # 10,000 per category over the data set and no limit per image.
    protocol: Protocol = "coco"
    every_steps: int = 0  # 0 = only after the last step
    before_training: bool = False  # also before the first step; a table compares first and last
    batch_size: int = 0  # 0 = batch_size of training
    top_k: int = 0  # query-box pairs kept per image; 0 = 300, of protocol "fixed" 3,000
    max_images: int = 0  # per data set; 0 = all
    num_pictures: int = 8
    region_accuracy: bool = False  # also name the true boxes by the tokens' embeddings in them


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    every_steps: int = 50
    profile_start: int = 0  # step at which a profile starts
    profile_steps: int = 0  # 0 = no profile


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str = "unnamed"
    # contrastive: pretraining of the two towers on images and captions (config.model.contrastive);
    # distill: fine-tuning of such towers by distillation branches alone
    task: Literal["detection", "contrastive", "distill"] = "detection"
    seed: int = 0
    batch_size: int = 256  # images (or mosaics) per step, over all devices
    num_steps: int = 1000
    model: ModelConfig = field(default_factory=ModelConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)


# --- written -------------------------------------------------------------------------------------


def to_json(config: Any) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2)


def digest(value: Any) -> str:
    """Twelve hex digits that change with any part of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
