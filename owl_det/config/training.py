"""Training: losses, optimiser, schedule, devices, checkpoints, evaluation and logs."""

from dataclasses import dataclass, field
from typing import Literal

from owl_det.config.checks import in_range, not_negative, patterns, positive, require

Protocol = Literal["coco", "lvis", "fixed"]


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """OWLv2's training efficiency. Off at inference."""

    token_drop_rate: float = 0.0  # share of patches dropped, least pixel variance first
    token_drop_noise: float = 0.01  # uniform noise added to the [0, 1] image before the variance
    instance_top_k: int = 0  # tokens kept by objectness for heads and losses; 0 = all

    def check(self, where: str) -> None:
        """Raises `ConfigError` for a value out of range."""
        in_range(self, where, "token_drop_rate", "token_drop_noise")
        require(
            self.instance_top_k >= 0,
            f"{where}.instance_top_k: must be 0 (all tokens) or positive",
        )


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

    def check(self, where: str) -> None:
        """Raises `ConfigError` for a value out of range."""
        require(0 < self.negative_share <= 1, f"{where}.negative_share: must be in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Gradient clipping. Per-example scopes clip each example's gradient before the mean."""

    scope: Literal["none", "global", "shared_text", "exact"] = "shared_text"
    norm: float = 1.0
    microbatch: int = 1  # examples per data shard whose gradients are held at once (per example)

    @property
    def is_per_example(self) -> bool:
        """Whether every example's gradient is clipped before the mean."""
        return self.scope in ("shared_text", "exact")

    def check(self, where: str) -> None:
        """Raises `ConfigError` for a value out of range."""
        for key in ("norm", "microbatch"):
            value = getattr(self, key)
            require(value > 0, f"{where}.{key}: must be positive, got {value}")


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

    def check(self, where: str) -> None:
        """Raises `ConfigError` for a value out of range or a pattern that is none."""
        not_negative(self, where, "learning_rate", "text_learning_rate", "image_learning_rate")
        patterns(self.frozen, f"{where}.frozen")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    kind: Literal["cosine", "inverse_sqrt", "constant"] = "cosine"
    warmup_steps: int = 1000
    timescale: int = 10_000  # of inverse_sqrt
    cooldown_steps: int = 0  # linear to 0 over the last steps

    def check(self, where: str) -> None:
        """Raises `ConfigError` for a value out of range."""
        not_negative(self, where, "warmup_steps", "cooldown_steps")
        positive(self, where, "timescale")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Device mesh; one of the three may be -1 (all remaining devices)."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def check(self, where: str) -> None:
        """Raises `ConfigError` for sizes that no mesh has."""
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for key, size in sizes.items():
            require(size == -1 or size > 0, f"{where}.{key}: must be positive or -1")
        require(list(sizes.values()).count(-1) <= 1, f"{where}: only one axis may be -1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 1000
    keep: int = 2
    init_from: str = ""  # workdir or checkpoint whose parameters start the training
    # Architecture, preprocessing and tokeniser are those of `init_from`; a key of config.model that
    # asks for another architecture is an error. What concerns training only (noise, precision,
    # memory) stays as config.model says.
    model_from_init: bool = False
    # Path patterns (regex) of parameters that start anew, not from `init_from`; of a tower that
    # does so as a whole, the architecture may differ too.
    fresh: tuple[str, ...] = ()
    image_size: int = 0  # with model_from_init: side of the padded square; 0 = as in `init_from`
    # With towers in `init_from`: the class head starts from their visual projection, so that class
    # embeddings start in the space of texts. See `checkpoints.adapt`.
    class_head_from_projection: bool = False

    def check(self, where: str) -> None:
        """Raises `ConfigError` for a value out of range, or a key that needs another one."""
        not_negative(self, where, "every_steps")
        positive(self, where, "keep")
        patterns(self.fresh, f"{where}.fresh")
        require(
            self.image_size == 0 or self.model_from_init,
            f"{where}.image_size: needs {where}.model_from_init; else set config.model.image_size",
        )
        require(
            bool(self.init_from) or not self.class_head_from_projection,
            f"{where}.class_head_from_projection: needs towers in {where}.init_from",
        )
        require(
            bool(self.init_from) or not self.fresh,
            f"{where}.fresh: needs {where}.init_from; without it all start anew",
        )


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

    def check(self, where: str) -> None:
        """Raises `ConfigError` for a value out of range."""
        not_negative(self, where, "every_steps", "top_k", "max_images", "num_pictures")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    every_steps: int = 50
    profile_start: int = 0  # step at which a profile starts
    profile_steps: int = 0  # 0 = no profile

    def check(self, where: str) -> None:
        """Raises `ConfigError` for a value out of range."""
        not_negative(self, where, "every_steps")
