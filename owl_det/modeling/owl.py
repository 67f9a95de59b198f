"""The OWL detector (OWL-ViT, OWLv2): towers, merged class token, per-token heads.

Three steps that callers combine: `encode_text` (once per distinct query), `encode_image` and
`predict` (which is cheap, so that new queries need no image tower).

The towers alone are a contrastive model (CLIP, SigLIP, LiT) if `config.contrastive` says so:
`embed_image`, `encode_text` and `similarity`.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from owl_det.config import ModelConfig, PreprocessConfig, SelectionConfig
from owl_det.modeling.heads import ClassHead, Mlp, box_bias
from owl_det.modeling.region_pool import roi_weights
from owl_det.modeling.text import TextTower
from owl_det.modeling.token_drop import gather_tokens
from owl_det.modeling.transformer import Norm
from owl_det.modeling.vit import ImageTower
from owl_det.scoring import unit_length
from owl_det.types import Features, Predictions, TokenEmbeddings


class OwlDetector(nn.Module):
    """Encoder-only open-vocabulary detector; the default of the `family.Detector` families.

    A class token is merged into every patch token: norm(patch token · class token), as in the
    authors' CLIP models. Towers with attention pooling have none: there the pooling head is left
    out and the heads read the tokens as they come from the tower's final norm (arXiv 2205.06230,
    section 3.1; the published code knows "drop" beside the product, and no LiT model is published
    that says more).
    """

    config: ModelConfig
    preprocess: PreprocessConfig

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.config.dtype)

    def setup(self) -> None:
        config = self.config
        self.image = ImageTower(config, self.preprocess)
        self.text = TextTower(config)
        if config.vit.pooling == "class_token":
            self.merge_norm = Norm(config.merge_norm_epsilon, self.dtype)
        self.class_head = ClassHead(
            config.embedding_dim, config.class_prior, config.class_initial_scale, self.dtype
        )
        self.box_head = Mlp(4, config.head_activation, self.dtype)
        if config.has_objectness_head:
            self.objectness_head = Mlp(1, config.head_activation, self.dtype)
        if config.contrastive != "none":
            initial = math.log(10.0 if config.contrastive == "sigmoid" else 1 / 0.07)
            self.logit_scale = self.param("logit_scale", nn.initializers.constant(initial), ())
        if config.contrastive == "sigmoid":
            self.logit_bias = self.param("logit_bias", nn.initializers.constant(-10.0), ())

    def __call__(
        self,
        image: UInt8[Array, "b H W 3"],
        query_tokens: Int[Array, "b q l"],
        is_query: Bool[Array, "b q"],
    ) -> Predictions:
        """Inference on images that each bring their own queries."""
        if self.is_initializing() and self.config.contrastive != "none":
            self.embed_image(image)  # makes the parameters that detection has no use for
        b, q, length = query_tokens.shape
        queries = self.encode_text(query_tokens.reshape(b * q, length)).reshape(b, q, -1)
        return self.predict(self.encode_image(image), queries, is_query)

    def encode_text(
        self, tokens: Int[Array, "u l"], row_keys: Key[Array, " u"] | None = None
    ) -> Float[Array, "u e"]:
        """Query embeddings; `row_keys` switch training noise on."""
        return self.text(tokens, row_keys)

    def encode_image(
        self,
        image: UInt8[Array, "b H W 3"],
        selection: SelectionConfig | None = None,
        row_keys: Key[Array, " b"] | None = None,
    ) -> Features:
        """Token features: norm(patch token · class token). Training passes the last two."""
        class_token, patches = self.image(image, selection, row_keys)
        if class_token is not None:
            merged = self.merge_norm(patches.tokens * class_token[:, None, :])
            patches = dataclasses.replace(patches, tokens=merged)
        return Features(levels=(patches,))

    def embed_image(
        self, image: UInt8[Array, "b H W 3"], row_keys: Key[Array, " b"] | None = None
    ) -> Float[Array, "b e"]:
        """Embeddings of whole images, in the space of `encode_text`; not of unit length.

        `row_keys` switch training noise on. Raises `ValueError` without contrastive parameters.
        """
        return self.image.embed(image, row_keys)

    def embed_tiles(
        self,
        image: UInt8[Array, "b H W 3"],
        tile_boxes: Float[Array, "b t 4"],
        selection: SelectionConfig | None = None,
        row_keys: Key[Array, " b"] | None = None,
    ) -> Float[Array, "b t e"]:
        """As `embed_image`, of every tile of mosaics: `tile_boxes` are cxcywh, relative.

        A tower that pools by the mean takes the mean over the tile, of the tokens that `selection`
        has kept (training on half of the patches: FLIP, arXiv 2212.00794). Raises `ValueError` for
        other towers, which pool whole images, and without contrastive parameters.
        """
        if self.config.vit.pooling != "mean" or self.config.contrastive == "none":
            raise ValueError(
                f"model.image.pooling is {self.config.vit.pooling}, model.contrastive "
                f"{self.config.contrastive}: no tiles"
            )
        _, patches = self.image(image, selection, row_keys)
        rows, columns = roi_weights(tile_boxes, patches.grid)
        weights = jnp.einsum("bth,btw->bthw", rows, columns).reshape(*rows.shape[:2], -1)
        weights = jnp.take_along_axis(weights, patches.token_index[:, None, :], axis=2)
        weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-6)
        return jnp.einsum("btn,bne->bte", weights, self.image.project(patches.tokens))

    def embed_patches(self, image: UInt8[Array, "b H W 3"]) -> Float[Array, "b n e"]:
        """Dense embeddings of a contrastive model: every token through the visual projection.

        Raises `ValueError` without contrastive parameters.
        """
        return self.patch_features(image).tokens

    def patch_features(
        self,
        image: UInt8[Array, "b H W 3"],
        selection: SelectionConfig | None = None,
        row_keys: Key[Array, " b"] | None = None,
    ) -> Features:
        """As `embed_patches`, with each token's place; training passes the last two."""
        if self.config.contrastive == "none":
            raise ValueError("model.contrastive is none: there is no visual projection")
        _, patches = self.image(image, selection, row_keys)
        projected = self.image.project(patches.tokens)
        return Features(levels=(dataclasses.replace(patches, tokens=projected),))

    def class_embeddings(self, features: Features) -> Features:
        """Unit-length class embeddings of all tokens, as `predict` compares them with queries."""
        embedded = [
            dataclasses.replace(level, tokens=self.class_head.embed(level.tokens)[0])
            for level in features.levels
        ]
        return Features(levels=tuple(embedded))

    def embed_image_and_patches(
        self, image: UInt8[Array, "b H W 3"]
    ) -> tuple[Float[Array, "b e"], Float[Array, "b n e"]]:
        """`embed_image` and `embed_patches` from one pass of the tower.

        Raises `ValueError` without contrastive parameters.
        """
        if self.config.contrastive == "none":
            raise ValueError("model.contrastive is none: there is no visual projection")
        return self.image.embed_all(image)

    def similarity(
        self, image_embeddings: Float[Array, "b e"], text_embeddings: Float[Array, "u e"]
    ) -> Float[Array, "b u"]:
        """Contrastive logits, float32: exp(scale) · cos + bias (no bias in CLIP and LiT).

        Raises `ValueError` without contrastive parameters.
        """
        if self.config.contrastive == "none":
            raise ValueError("model.contrastive is none: there is no logit scale")
        cosine = jnp.einsum(
            "be,ue->bu", unit_length(image_embeddings, 0.0), unit_length(text_embeddings, 0.0)
        )
        logits = jnp.exp(self.logit_scale) * cosine
        return logits + self.logit_bias if self.config.contrastive == "sigmoid" else logits

    def predict(
        self,
        features: Features,
        query_embeddings: Float[Array, "b q e"],
        is_query: Bool[Array, "b q"],
        *,
        instance_top_k: int = 0,
    ) -> Predictions:
        """Heads.

        With `instance_top_k` > 0 only that many tokens, those of highest objectness, get boxes
        and classes (OWLv2, section 3.2).
        """
        patches = features.only_level
        tokens, index = patches.tokens, patches.token_index
        objectness = self._objectness(tokens)
        if 0 < instance_top_k < tokens.shape[1]:
            objectness, chosen = jax.lax.top_k(objectness, instance_top_k)
            tokens = gather_tokens(tokens, chosen)
            index = jnp.take_along_axis(index, chosen, axis=1)
        class_logits, embeddings = self.class_head(tokens, query_embeddings, is_query)
        return Predictions(
            boxes=self._boxes(tokens, index, patches.grid),
            class_logits=class_logits,
            class_embeddings=embeddings,
            objectness_logits=objectness,
            token_index=index,
        )

    def embed_tokens(self, features: Features) -> TokenEmbeddings:
        """All that `scoring.class_logits` needs to score any query later."""
        patches = features.only_level
        embeddings, norm = self.class_head.embed(patches.tokens)
        shift, scale = self.class_head.calibrate(patches.tokens)
        return TokenEmbeddings(
            boxes=self._boxes(patches.tokens, patches.token_index, patches.grid),
            class_embeddings=embeddings,
            embedding_norm=norm,
            logit_shift=shift,
            logit_scale=scale,
            objectness_logits=self._objectness(patches.tokens),
        )

    def _objectness(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b n"]:
        if not self.config.has_objectness_head:
            return jnp.zeros(tokens.shape[:2], jnp.float32)
        return self.objectness_head(jax.lax.stop_gradient(tokens))[..., 0]

    def _boxes(
        self, tokens: Float[Array, "b n d"], index: Int[Array, "b n"], grid: tuple[int, int]
    ) -> Float[Array, "b n 4"]:
        """Boxes of the tokens at `index` of the patch grid, cxcywh in (0, 1)."""
        bias = box_bias(*grid, self.config.box_bias)
        return jax.nn.sigmoid(self.box_head(tokens) + bias[index])
