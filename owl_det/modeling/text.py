"""CLIP's text transformer: causal, pooled at the end token."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from owl_det.config import ModelConfig
from owl_det.modeling.transformer import Norm, Transformer


class TextTower(nn.Module):
    """Token and position embeddings, transformer, final norm, projection."""

    model: ModelConfig

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.model.dtype)

    def setup(self) -> None:
        tower, model = self.model.text, self.model
        self.token_embedding = self.param(
            "token_embedding", nn.initializers.normal(0.02), (tower.vocabulary_size, tower.width)
        )
        self.position_embedding = self.param(
            "position_embedding", nn.initializers.normal(0.01), (tower.num_positions, tower.width)
        )
        self.transformer = Transformer(
            width=tower.width,
            num_layers=tower.num_layers,
            num_heads=tower.num_heads,
            mlp_width=tower.mlp_width,
            is_causal=True,
            activation=model.activation,
            epsilon=model.norm_epsilon,
            droplayer_rate=tower.droplayer_rate,
            dropout_rate=tower.dropout_rate,
            # Texts are short: fused attention kernels gain nothing and want multiples of 64.
            attention="xla",
            remat=model.remat,
            unroll=min(model.scan_unroll, tower.num_layers),
            dtype=self.dtype,
        )
        self.norm_final = Norm(model.norm_epsilon, self.dtype)
        self.projection = nn.Dense(
            model.embedding_dim,
            use_bias=False,
            kernel_init=nn.initializers.normal(tower.width**-0.5),
            dtype=self.dtype,
        )

    def __call__(
        self, tokens: Int[Array, "u l"], row_keys: Key[Array, " u"] | None = None
    ) -> Float[Array, "u d"]:
        """Embeds texts; the end token has the highest id and marks where to pool."""
        length = tokens.shape[1]
        x = self.token_embedding[tokens] + self.position_embedding[None, :length]
        x = self.transformer(x.astype(self.dtype), row_keys)
        end = jnp.argmax(tokens, axis=-1)
        pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        return self.projection(self.norm_final(pooled))
