"""The vision transformer of CLIP, LiT and SigLIP, with token dropping in front."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from owl_det.config import ModelConfig, PreprocessConfig, SelectionConfig, VitConfig
from owl_det.modeling import token_drop
from owl_det.modeling.map_head import MapHead
from owl_det.modeling.random_streams import RandomStream, stream_keys
from owl_det.modeling.transformer import Norm, Transformer
from owl_det.types import FeatureLevel


def patchify(image: Float[Array, "b H W c"], patch_size: int) -> Float[Array, "b n p"]:
    """Cuts images into patches, row by row; each is flattened as (row, column, channel)."""
    b, height, width, c = image.shape
    h, w = height // patch_size, width // patch_size
    grid = image.reshape(b, h, patch_size, w, patch_size, c)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * w, patch_size * patch_size * c)


def _sincos_2d(key: Key[Array, ""], shape: tuple[int, int]) -> Float[Array, "n d"]:
    """Sines and cosines of row and column, a quarter of the width each.

    Where there is one more position than the grid has, the first is the class token's: zeros.

    Wavelengths are geometric from 2π to 2π · 100 patches, as in MoCo v3 (arXiv 2104.02057) but
    shorter, for small grids.
    """
    side = math.isqrt(shape[0])
    frequencies = 100.0 ** -jnp.linspace(0, 1, shape[1] // 4)
    angles = jnp.arange(side)[:, None] * frequencies[None]
    axis = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    rows = jnp.repeat(axis, side, axis=0)
    columns = jnp.tile(axis, (side, 1))
    grid = jnp.concatenate([rows, columns], axis=-1)
    return jnp.concatenate([jnp.zeros((shape[0] - side * side, shape[1])), grid])


class ImageTower(nn.Module):
    """Patches, class token, positions, transformer, final norm; pooling for contrastive models.

    The class token, the norm before the first layer and the bias of the patches are there if the
    config says so. With attention pooling (SigLIP) there is no class token. The pooling head and
    the projection to the shared space exist only in a contrastive model: a detector reads tokens.

    Images smaller than `model.image_size` use the top-left part of the position grid, as the
    authors do at lower inference resolutions.
    """

    model: ModelConfig
    preprocess: PreprocessConfig

    @property
    def tower(self) -> VitConfig:
        return self.model.vit

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.model.dtype)

    @property
    def has_class_token(self) -> bool:
        return self.tower.pooling == "class_token"

    def setup(self) -> None:
        tower, model = self.tower, self.model
        side = model.grid_side
        normal = nn.initializers.normal(tower.width**-0.5)
        fan_in = 3 * tower.patch_size**2
        self.patch_kernel = self.param(
            "patch_kernel",
            nn.initializers.normal(fan_in**-0.5),
            (tower.patch_size, tower.patch_size, 3, tower.width),
        )
        if tower.patch_bias:
            self.patch_bias = self.param("patch_bias", nn.initializers.zeros, (tower.width,))
        if self.has_class_token:
            self.class_embedding = self.param("class_embedding", normal, (tower.width,))
        self.position_embedding = self.param(
            "position_embedding",
            normal if tower.position_init == "normal" else _sincos_2d,
            (self.has_class_token + side * side, tower.width),
        )
        if tower.pre_norm:
            self.norm_pre = Norm(model.norm_epsilon, self.dtype)
        self.transformer = Transformer(
            width=tower.width,
            num_layers=tower.num_layers,
            num_heads=tower.num_heads,
            mlp_width=tower.mlp_width,
            is_causal=False,
            activation=model.activation,
            epsilon=model.norm_epsilon,
            droplayer_rate=tower.droplayer_rate,
            dropout_rate=tower.dropout_rate,
            attention=model.attention,
            remat=model.remat,
            unroll=min(model.scan_unroll, tower.num_layers),
            dtype=self.dtype,
            # The class token goes on attending: a whole image's embedding stays what it was.
            num_last_queries=None if tower.last_block == "full" else int(self.has_class_token),
        )
        self.norm_post = Norm(model.norm_epsilon, self.dtype)
        if model.contrastive == "none":
            return
        if tower.pooling == "map":
            self.map_head = MapHead(
                tower.num_heads,
                tower.mlp_width,
                model.activation,
                model.norm_epsilon,
                self.dtype,
            )
        if tower.projection != "none":
            self.visual_projection = nn.Dense(
                model.embedding_dim,
                use_bias=tower.projection == "affine",
                kernel_init=normal,
                dtype=self.dtype,
            )

    def __call__(
        self,
        image: UInt8[Array, "b H W 3"],
        selection: SelectionConfig | None = None,
        row_keys: Key[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b d"] | None, FeatureLevel]:
        """Returns the class token and the patch tokens, both after the final norm.

        The class token is None in a tower with attention pooling. With `selection` and `row_keys`
        (training), patches are dropped and the blocks are noisy.
        """
        b, height, width = image.shape[:3]
        p = self.tower.patch_size
        patches = patchify(image.astype(jnp.float32) / 255.0, p)
        index = jnp.broadcast_to(jnp.arange(patches.shape[1])[None], patches.shape[:2])
        tower_keys = None
        if row_keys is not None:
            tower_keys = stream_keys(row_keys, RandomStream.BLOCKS)
        if selection is not None and selection.token_drop_rate > 0:
            if row_keys is None:
                raise ValueError("token dropping needs row_keys: it is for training only")
            index = token_drop.choose_patches(
                patches,
                stream_keys(row_keys, RandomStream.TOKEN_DROP),
                rate=selection.token_drop_rate,
                noise=selection.token_drop_noise,
            )
            patches = token_drop.gather_tokens(patches, index)
        x = self._embed(patches) + self._positions(height // p, width // p)[index]
        if self.has_class_token:
            class_token = self.class_embedding + self.position_embedding[0]
            class_token = jnp.broadcast_to(class_token[None, None], (b, 1, x.shape[-1]))
            x = jnp.concatenate([class_token.astype(x.dtype), x], axis=1)
        if self.tower.pre_norm:
            x = self.norm_pre(x)
        x = self.norm_post(self.transformer(x, tower_keys))
        class_token, tokens = (x[:, 0], x[:, 1:]) if self.has_class_token else (None, x)
        grid = (height // p, width // p)
        return class_token, FeatureLevel(tokens=tokens, token_index=index, grid=grid, stride=p)

    def embed(
        self, image: UInt8[Array, "b H W 3"], row_keys: Key[Array, " b"] | None = None
    ) -> Float[Array, "b e"]:
        """The image's embedding in the shared space, not of unit length.

        Raises `ValueError` if the model has no contrastive parameters.
        """
        if self.model.contrastive == "none":
            raise ValueError("model.contrastive is none: the image tower has no pooling")
        class_token, patches = self(image, row_keys=row_keys)
        return self.project(self._pool(class_token, patches.tokens))

    def embed_all(
        self, image: UInt8[Array, "b H W 3"]
    ) -> tuple[Float[Array, "b e"], Float[Array, "b n e"]]:
        """The image's embedding and those of all tokens, from one pass; as `embed`, `project`."""
        class_token, patches = self(image)
        whole = self._pool(class_token, patches.tokens)
        return self.project(whole), self.project(patches.tokens)

    def project(self, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
        """From the tower's width to the space shared with texts."""
        return x if self.tower.projection == "none" else self.visual_projection(x)

    def _pool(
        self, class_token: Float[Array, "b d"] | None, tokens: Float[Array, "b n d"]
    ) -> Float[Array, "b d"]:
        if class_token is not None:
            return class_token
        return self.map_head(tokens) if self.tower.pooling == "map" else tokens.mean(axis=1)

    def _embed(self, patches: Float[Array, "b n p"]) -> Float[Array, "b n d"]:
        mean, std = (
            jnp.tile(jnp.asarray(values, jnp.float32), self.tower.patch_size**2)[None, None]
            for values in (self.preprocess.mean, self.preprocess.std)
        )
        kernel = self.patch_kernel.reshape(patches.shape[-1], -1).astype(self.dtype)
        x = jnp.einsum("bnp,pd->bnd", ((patches - mean) / std).astype(self.dtype), kernel)
        return x + self.patch_bias.astype(self.dtype)[None, None] if self.tower.patch_bias else x

    def _positions(self, h: int, w: int) -> Float[Array, "n d"]:
        side = self.model.grid_side
        if h > side or w > side:
            raise ValueError(
                f"image of {h}x{w} patches is larger than the position grid {side}x{side}"
            )
        grid = self.position_embedding[self.has_class_token :].reshape(side, side, -1)
        return grid[:h, :w].reshape(h * w, -1).astype(self.dtype)
