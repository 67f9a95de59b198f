"""What a model is, and how pixels become its input: the sections that travel with checkpoints."""

from dataclasses import dataclass, field
from typing import Literal

from owl_det.config.checks import in_range, positive, require
from owl_det.config.roles import architecture, execution, training


@dataclass(frozen=True, kw_only=True)
class VitConfig:
    """A vision transformer; the defaults are CLIP's (SigLIP and LiT: see docs/towers.md)."""

    kind: Literal["vit"] = architecture("vit")
    patch_size: int = architecture(32)
    width: int = architecture(768)
    num_layers: int = architecture(12)
    num_heads: int = architecture(12)
    mlp_width: int = architecture(3072)
    # "sincos2d" starts the (learned) positions from a 2-D sine-cosine grid: from scratch, patches
    # find their neighbours far sooner than from CLIP's small random numbers.
    position_init: Literal["normal", "sincos2d"] = training("normal")
    # How a whole image is pooled; map (attention pooling) and mean have no class token.
    pooling: Literal["class_token", "map", "mean"] = architecture("class_token", is_compared=True)
    pre_norm: bool = architecture(True, is_compared=True)  # a norm before the first layer
    patch_bias: bool = architecture(False)
    # From the pooled token to the shared space: nothing, a matrix, a matrix and a bias.
    projection: Literal["none", "linear", "affine"] = architecture("linear")
    # "values": patch tokens do not attend in the last block, each passes on its own value. Dense
    # features keep to their place (MaskCLIP, CLIPSelf); the class token attends as ever.
    last_block: Literal["full", "values"] = architecture("full")
    droplayer_rate: float = training(0.2)  # of the last layer; ramps linearly from 0 (first layer)
    dropout_rate: float = training(0.0)

    @property
    def stride(self) -> int:
        """Pixels from one place of the features to the next."""
        return self.patch_size

    def check(self, where: str) -> None:
        """Raises `ConfigError` for a value out of range."""
        check_transformer(self, where)
        positive(self, where, "patch_size")
        require(
            self.position_init != "sincos2d" or self.width % 4 == 0,
            f"{where}.width: sincos2d positions need a multiple of 4",
        )


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """A text transformer; the defaults are CLIP's: causal, pooled at the end token."""

    # Whose rules turn text to ids; "siglip" and "siglip2" need a file (config.data.tokenizer).
    tokenizer: Literal["clip", "siglip", "siglip2"] = architecture("clip", is_compared=True)
    vocabulary_size: int = architecture(49408)
    num_positions: int = architecture(16)
    width: int = architecture(512)
    num_layers: int = architecture(12)
    num_heads: int = architecture(8)
    mlp_width: int = architecture(2048)
    is_causal: bool = architecture(True, is_compared=True)
    # Last: at the last position, even padding.
    pooling: Literal["end_token", "last"] = architecture("end_token", is_compared=True)
    projection_bias: bool = architecture(False)
    droplayer_rate: float = training(0.1)
    dropout_rate: float = training(0.0)

    def check(self, where: str) -> None:
        """Raises `ConfigError` for a value out of range."""
        check_transformer(self, where)
        positive(self, where, "vocabulary_size", "num_positions")


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """CLIP's ResNet-50 (image side): a teacher, nothing of it is trained."""

    kind: Literal["resnet"] = architecture("resnet")
    width: int = architecture(64)  # of the first stage; the last has 32 times as much
    num_blocks: tuple[int, ...] = architecture((3, 4, 6, 3))  # of each stage
    num_heads: int = architecture(32)  # of the attention pool
    norm_epsilon: float = architecture(1e-5)  # of the batch norms

    @property
    def stride(self) -> int:
        """Pixels from one place of the features to the next."""
        return 32

    def check(self, where: str) -> None:
        """Raises `ConfigError` for a value out of range."""
        positive(self, where, "width", "num_heads")


ImageTowerConfig = VitConfig | ResNetConfig  # by `kind`


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The detector: two towers and heads."""

    family: Literal["owl"] = architecture("owl")  # a row of `modeling.build.FAMILIES`
    image_size: int = architecture(768)  # side of the padded square, pixels
    embedding_dim: int = architecture(512)  # of class embeddings and query embeddings
    image: ImageTowerConfig = field(default_factory=VitConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    # Which contrastive parameters there are beside the detector's: image pooling and projection and
    # a scale of the cosine, for "sigmoid" (SigLIP) also a bias.
    contrastive: Literal["none", "softmax", "sigmoid"] = training("none")
    activation: Literal["quick_gelu", "gelu", "gelu_tanh"] = architecture(
        "quick_gelu", is_compared=True
    )
    head_activation: Literal["quick_gelu", "gelu", "gelu_tanh"] = architecture(
        "gelu_tanh", is_compared=True, part="head"
    )
    norm_epsilon: float = architecture(1e-5, is_compared=True)
    # Of the norm after the class token is merged in.
    merge_norm_epsilon: float = architecture(1e-6, is_compared=True, part="head")
    box_bias: Literal["both", "location", "none"] = architecture(
        "both", is_compared=True, part="head"
    )
    # OWL-ViT has none: objectness is 0 for every token.
    has_objectness_head: bool = architecture(True, part="head")
    # Initial score of every query, sets the bias of the logit shift.
    class_prior: float = training(0.01)
    class_initial_scale: float = training(1.0)  # of the cosine, sets the bias of the logit scale
    # Of matrix work; parameters stay float32.
    dtype: Literal["float32", "bfloat16"] = execution("float32")
    # xla: on a CPU a part of the scores at a time; plain: all of them at once; portable: as xla,
    # but chosen where the program runs (exports); cudnn: fused, on NVIDIA GPUs.
    attention: Literal["xla", "cudnn", "plain", "portable"] = execution("xla")
    # What the backward pass computes again per layer: nothing; all of it; all but products with
    # weights (and, where attention goes by chunks, its result): little time for much memory.
    remat: Literal["none", "full", "dots"] = execution("none")
    # Layers unrolled per scan step; more compiles longer, runs faster.
    scan_unroll: int = execution(1)

    @property
    def vit(self) -> VitConfig:
        """The image tower, where only a vision transformer will do."""
        if not isinstance(self.image, VitConfig):
            raise ValueError(f"model.image.kind is {self.image.kind}, where a vit is needed")
        return self.image

    @property
    def grid_side(self) -> int:
        """Places of the features along each axis of the whole square."""
        return self.image_size // self.image.stride

    def check(self, where: str) -> None:
        """Raises `ConfigError` for a value out of range."""
        positive(self, where, "embedding_dim", "class_initial_scale", "scan_unroll")
        require(
            self.image_size > 0 and self.image_size % self.image.stride == 0,
            f"{where}.image_size: not a multiple of the patch size {self.image.stride}",
        )
        require(0 < self.class_prior < 1, f"{where}.class_prior: must be in (0, 1)")
        for key in ("norm_epsilon", "merge_norm_epsilon"):
            require(0 <= getattr(self, key) < 1, f"{where}.{key}: must be in [0, 1)")
        require(
            self.contrastive == "none"
            or isinstance(self.image, ResNetConfig)
            or self.image.projection != "none"
            or self.embedding_dim == self.image.width,
            f"{where}.embedding_dim: {self.embedding_dim} is not the image tower's width "
            f"{self.image.width}, and {where}.image.projection is none",
        )


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

    def check(self, where: str) -> None:
        """Raises `ConfigError` for a value out of range."""
        for key in ("mean", "std"):
            value = getattr(self, key)
            require(len(value) == 3, f"{where}.{key}: three numbers, got {list(value)}")
        require(all(x > 0 for x in self.std), f"{where}.std: must be positive")
        require(0 <= self.pad_value <= 1, f"{where}.pad_value: in [0, 1]")


def check_transformer(tower: VitConfig | TextTowerConfig, where: str) -> None:
    """Raises `ConfigError` for a value out of range that both towers have."""
    positive(tower, where, "width", "num_layers", "num_heads", "mlp_width")
    require(
        tower.width % tower.num_heads == 0,
        f"{where}.num_heads: {tower.num_heads} does not divide width {tower.width}",
    )
    in_range(tower, where, "dropout_rate", "droplayer_rate")
