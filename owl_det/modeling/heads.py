"""Per-token heads of OWL-ViT: class embedding, box, objectness.

Source: Minderer et al. 2022 (arXiv 2205.06230), section 3, and the authors' published code.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from owl_det.modeling.transformer import ACTIVATIONS
from owl_det.scoring import class_logits, unit_length

# Far below any real logit, and finite in bfloat16.
MASKED_LOGIT = -1e4


class Mlp(nn.Module):
    """Two hidden layers of the input's width and a linear output."""

    num_outputs: int
    activation: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b o"]:
        for i in range(2):
            x = nn.Dense(x.shape[-1], dtype=self.dtype, name=f"dense_{i}")(x)
            x = ACTIVATIONS[self.activation](x)
        # The output feeds a sigmoid or a loss: float32 from here on.
        return nn.Dense(self.num_outputs, dtype=jnp.float32, name="dense_2")(x)


class ClassHead(nn.Module):
    """Scores of a token for queries: (cos + shift) · (elu(scale) + 1), both per token.

    `prior` is the initial score of every query, `initial_scale` that of elu(scale) + 1.
    """

    embedding_dim: int
    prior: float
    initial_scale: float
    dtype: Any

    def setup(self) -> None:
        shift = -math.log((1 - self.prior) / self.prior) / self.initial_scale
        self.embedding = nn.Dense(self.embedding_dim, dtype=self.dtype)
        self.logit_shift = nn.Dense(1, bias_init=nn.initializers.constant(shift), dtype=jnp.float32)
        self.logit_scale = nn.Dense(
            1, bias_init=nn.initializers.constant(self.initial_scale - 1), dtype=jnp.float32
        )

    def __call__(
        self,
        tokens: Float[Array, "b n d"],
        query_embeddings: Float[Array, "b q e"],
        is_query: Bool[Array, "b q"],
    ) -> tuple[Float[Array, "b n q"], Float[Array, "b n e"]]:
        """Returns float32 logits (`MASKED_LOGIT` for filler queries) and unit-length embeddings."""
        embeddings = unit_length(self.embedding(tokens))
        shift, scale = self.calibrate(tokens)
        logits = class_logits(embeddings, shift, scale, query_embeddings, self.dtype)
        return jnp.where(is_query[:, None, :], logits, MASKED_LOGIT), embeddings

    def calibrate(
        self, tokens: Float[Array, "b n d"]
    ) -> tuple[Float[Array, "b n"], Float[Array, "b n"]]:
        """Each token's shift, and its scale elu(·) + 1, in float32."""
        scale = jax.nn.elu(self.logit_scale(tokens)) + 1
        return self.logit_shift(tokens)[..., 0], scale[..., 0]

    def embed(
        self, tokens: Float[Array, "b n d"]
    ) -> tuple[Float[Array, "b n e"], Float[Array, "b n"]]:
        """Class embeddings, unit length, and the lengths they had."""
        embeddings = self.embedding(tokens).astype(jnp.float32)
        return unit_length(embeddings), jnp.linalg.norm(embeddings, axis=-1)


def box_bias(h: int, w: int, kind: str) -> Float[Array, "n 4"]:
    """Logits that put each token's initial box at its patch ("both": and at its size).

    The location is the patch's bottom-right corner, (i + 1)/w, as in the authors' code.
    """
    x = (jnp.arange(w, dtype=jnp.float32) + 1) / w
    y = (jnp.arange(h, dtype=jnp.float32) + 1) / h
    grid = jnp.stack(jnp.meshgrid(x, y, indexing="xy"), axis=-1).reshape(h * w, 2)
    size = jnp.broadcast_to(jnp.array([[1.0 / w, 1.0 / h]]), (h * w, 2))
    location_bias, size_bias = _logit(grid), _logit(size)
    if kind == "none":
        return jnp.zeros((h * w, 4))
    if kind == "location":
        return jnp.concatenate([location_bias, jnp.zeros_like(size_bias)], axis=-1)
    return jnp.concatenate([location_bias, size_bias], axis=-1)


def _logit(p: Float[Array, "*s"], epsilon: float = 1e-4) -> Float[Array, "*s"]:
    return jnp.log(p + epsilon) - jnp.log1p(-p + epsilon)
