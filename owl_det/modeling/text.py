"""The text transformer of CLIP, LiT and SigLIP."""

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
            is_causal=tower.is_causal,
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
            use_bias=tower.projection_bias,
            kernel_init=nn.initializers.normal(tower.width**-0.5),
            dtype=self.dtype,
        )

    def __call__(
        self, tokens: Int[Array, "u l"], row_keys: Key[Array, " u"] | None = None
    ) -> Float[Array, "u d"]:
        """Embeds texts, pooled as the config says: at the end token or at the last position.

        The end token is that of the highest id (CLIP). Towers that pool at the last position
        (SigLIP, LiT) read the padding too: they need rows of full length.
        """
        length = tokens.shape[1]
        x = self.token_embedding[tokens] + self.position_embedding[None, :length]
        x = self.transformer(x.astype(self.dtype), row_keys)
        return self.projection(self.norm_final(self._pool(x, tokens)))

    def _pool(self, x: Float[Array, "u l d"], tokens: Int[Array, "u l"]) -> Float[Array, "u d"]:
        if self.model.text.pooling == "last":
            return x[:, -1]
        end = jnp.argmax(tokens, axis=-1)
        return jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
