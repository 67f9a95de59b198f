"""CLIP's ResNet-50 and its text tower: a frozen teacher.

Source: Radford et al. 2021 (arXiv 2103.00020, section 2.4) and OpenAI's published code. Beside a
ResNet-50: a stem of three convolutions, average pooling in place of strides (so that nothing is
skipped), and attention pooling at the end. Batch norms use their stored statistics.
"""

import math
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from owl_det.config import ModelConfig, PreprocessConfig, ResNetConfig, SelectionConfig
from owl_det.modeling.attention import attend
from owl_det.modeling.text import TextTower
from owl_det.scoring import unit_length
from owl_det.types import FeatureLevel, Features

_EXPANSION = 4  # of a bottleneck's output over its width


def tower_of(model: ModelConfig) -> ResNetConfig:
    """The image tower's settings. Raises `ValueError` if it is not a ResNet."""
    if not isinstance(model.image, ResNetConfig):
        raise ValueError(f"model.image.kind is {model.image.kind}, where a resnet is needed")
    return model.image


class FrozenBatchNorm(nn.Module):
    """(x − mean) / √(variance + ε) · scale + bias, per channel, with stored statistics."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.param("mean", nn.initializers.zeros, shape)
        variance = self.param("variance", nn.initializers.ones, shape)
        factor = scale * jax.lax.rsqrt(variance + self.epsilon)
        shift = bias - mean * factor
        factor, shift = (y[None, None, None].astype(x.dtype) for y in (factor, shift))
        return x * factor + shift


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm and, where `has_relu`, a ReLU."""

    width: int
    size: int
    epsilon: float
    dtype: Any
    stride: int = 1
    has_relu: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W d"]:
        x = nn.Conv(
            self.width,
            (self.size, self.size),
            strides=self.stride,
            padding=self.size // 2,
            use_bias=False,
            dtype=self.dtype,
            name="conv",
        )(x)
        x = FrozenBatchNorm(self.epsilon, name="norm")(x)
        return nn.relu(x) if self.has_relu else x


def _average_pool(x: Float[Array, "b h w c"], stride: int) -> Float[Array, "b H W c"]:
    return nn.avg_pool(x, (stride, stride), (stride, stride)) if stride > 1 else x


class Bottleneck(nn.Module):
    """1×1, 3×3, average pooling where a stride would be, 1×1; and a shortcut pooled alike."""

    width: int
    stride: int
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W d"]:
        wide = self.width * _EXPANSION
        conv = partial(ConvNorm, epsilon=self.epsilon, dtype=self.dtype)
        y = conv(self.width, 1, name="conv_1")(x)
        y = conv(self.width, 3, name="conv_2")(y)
        y = _average_pool(y, self.stride)
        y = conv(wide, 1, has_relu=False, name="conv_3")(y)
        if self.stride > 1 or x.shape[-1] != wide:
            x = _average_pool(x, self.stride)
            x = conv(wide, 1, has_relu=False, name="shortcut")(x)
        return nn.relu(x + y)


class AttentionPool(nn.Module):
    """The mean of all positions attends to itself and to them; learned absolute positions."""

    model: ModelConfig

    def setup(self) -> None:
        model, dtype = self.model, jnp.dtype(self.model.dtype)
        tower = tower_of(model)
        width = 32 * tower.width
        heads = (tower.num_heads, width // tower.num_heads)
        side = model.grid_side
        self.position_embedding = self.param(
            "position_embedding", nn.initializers.normal(width**-0.5), (1 + side * side, width)
        )
        self.query = nn.DenseGeneral(heads, dtype=dtype)
        self.key = nn.DenseGeneral(heads, dtype=dtype)
        self.value = nn.DenseGeneral(heads, dtype=dtype)
        self.out = nn.DenseGeneral(model.embedding_dim, axis=(-2, -1), dtype=dtype)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b e"]:
        """Raises `ValueError` if the map is not of the size that the positions are for."""
        b, h, w, c = x.shape
        side = self.model.grid_side
        if (h, w) != (side, side):
            raise ValueError(f"feature map of {h}x{w}; the attention pool knows {side}x{side}")
        x = x.reshape(b, h * w, c)
        x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1)
        x = x + self.position_embedding[None].astype(x.dtype)
        mixed = attend(
            self.query(x[:, :1]), self.key(x), self.value(x), is_causal=False, implementation="xla"
        )
        return self.out(mixed)[:, 0]

    def each(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w e"]:
        """Every position through the value and output projections alone: no mixing.

        As CLIPSelf's code extracts them (arXiv 2310.01403); the learned positions are resized
        bilinearly to the map, which may have any size.
        """
        side = self.model.grid_side
        grid = self.position_embedding[1:].reshape(side, side, -1)
        shape = (*x.shape[1:3], grid.shape[-1])
        positions = jax.image.resize(grid, shape, "bilinear", antialias=False)
        return self.out(self.value(x + positions[None].astype(x.dtype)))


class ResNetTower(nn.Module):
    """Pixels to the last feature map and to the shared space."""

    model: ModelConfig
    preprocess: PreprocessConfig

    def setup(self) -> None:
        config, dtype = tower_of(self.model), jnp.dtype(self.model.dtype)
        conv = partial(ConvNorm, size=3, epsilon=config.norm_epsilon, dtype=dtype)
        block = partial(Bottleneck, epsilon=config.norm_epsilon, dtype=dtype)
        half = config.width // 2
        self.stem = [conv(half, stride=2), conv(half), conv(config.width)]
        self.blocks = [
            [
                block(config.width * 2**stage, 2 if stage and not number else 1)
                for number in range(num_blocks)
            ]
            for stage, num_blocks in enumerate(config.num_blocks)
        ]
        self.pool = AttentionPool(self.model)

    def __call__(self, image: UInt8[Array, "b H W 3"]) -> Float[Array, "b e"]:
        return self.pool(self.feature_map(image))

    def patches(self, image: UInt8[Array, "b H W 3"]) -> Float[Array, "b h w e"]:
        return self.pool.each(self.feature_map(image))

    def whole_and_patches(
        self, image: UInt8[Array, "b H W 3"]
    ) -> tuple[Float[Array, "b e"], Float[Array, "b h w e"]]:
        features = self.feature_map(image)
        return self.pool(features), self.pool.each(features)

    def feature_map(self, image: UInt8[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        """The last stage's output, one position for 32 × 32 pixels."""
        x = _normalised(image, self.preprocess).astype(jnp.dtype(self.model.dtype))
        for layer in self.stem:
            x = layer(x)
        x = _average_pool(x, 2)
        for stage in self.blocks:
            for block in stage:
                x = block(x)
        return x


def _normalised(
    image: UInt8[Array, "b H W 3"], preprocess: PreprocessConfig
) -> Float[Array, "b H W 3"]:
    mean = jnp.asarray(preprocess.mean, jnp.float32)[None, None, None]
    std = jnp.asarray(preprocess.std, jnp.float32)[None, None, None]
    return (image.astype(jnp.float32) / 255.0 - mean) / std


def _require_no_noise(*training: object) -> None:
    if any(value is not None for value in training):
        raise ValueError("a ResNet is a frozen teacher: it has no training noise and drops nothing")


class ClipResNet(nn.Module):
    """CLIP with a ResNet: a `family.ContrastiveModel` without training noise."""

    config: ModelConfig
    preprocess: PreprocessConfig

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.config.dtype)

    def setup(self) -> None:
        self.image = ResNetTower(self.config, self.preprocess)
        self.text = TextTower(self.config)
        initial = nn.initializers.constant(math.log(1 / 0.07))
        self.logit_scale = self.param("logit_scale", initial, ())

    def __call__(
        self, image: UInt8[Array, "b H W 3"], tokens: Int[Array, "u l"]
    ) -> Float[Array, "b u"]:
        return self.similarity(self.embed_image(image), self.encode_text(tokens))

    def embed_image(
        self, image: UInt8[Array, "b H W 3"], row_keys: Key[Array, " b"] | None = None
    ) -> Float[Array, "b e"]:
        """Embeddings of images of `model.image_size`, not of unit length."""
        _require_no_noise(row_keys)
        return self.image(image)

    def patch_features(
        self,
        image: UInt8[Array, "b H W 3"],
        selection: SelectionConfig | None = None,
        row_keys: Key[Array, " b"] | None = None,
    ) -> Features:
        """An embedding for every 32 × 32 pixels, in the space of `encode_text`; any image size."""
        _require_no_noise(selection, row_keys)
        grid = self.image.patches(image)
        b, h, w, e = grid.shape
        index = jnp.broadcast_to(jnp.arange(h * w)[None], (b, h * w))
        tokens = grid.reshape(b, h * w, e)
        level = FeatureLevel(
            tokens=tokens, token_index=index, grid=(h, w), stride=self.config.image.stride
        )
        return Features(levels=(level,))

    def embed_image_and_patches(
        self, image: UInt8[Array, "b H W 3"]
    ) -> tuple[Float[Array, "b e"], Float[Array, "b n e"]]:
        """`embed_image` and the tokens of `patch_features`, from one pass of the tower."""
        whole, grid = self.image.whole_and_patches(image)
        return whole, grid.reshape(grid.shape[0], -1, grid.shape[-1])

    def encode_text(
        self, tokens: Int[Array, "u l"], row_keys: Key[Array, " u"] | None = None
    ) -> Float[Array, "u e"]:
        _require_no_noise(row_keys)
        return self.text(tokens)

    def similarity(
        self, image_embeddings: Float[Array, "b e"], text_embeddings: Float[Array, "u e"]
    ) -> Float[Array, "b u"]:
        """exp(scale) · cos, float32."""
        cosine = jnp.einsum(
            "be,ue->bu", unit_length(image_embeddings, 0.0), unit_length(text_embeddings, 0.0)
        )
        return jnp.exp(self.logit_scale) * cosine


def parameter_shapes(model: ModelConfig, preprocess: PreprocessConfig) -> PyTree:
    """Shapes of a `ClipResNet`'s parameters."""
    side, length = model.image_size, model.text.num_positions
    variables = jax.eval_shape(
        lambda: ClipResNet(model, preprocess).init(
            jax.random.key(0),
            jnp.zeros((1, side, side, 3), jnp.uint8),
            jnp.zeros((1, length), jnp.int32),
        )
    )
    return cast(PyTree, variables)["params"]
