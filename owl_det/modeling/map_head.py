"""Attention pooling of SigLIP and LiT: one learned query looks at all tokens.

Source: Zhai et al. 2022 (arXiv 2106.04560, section 3.1) and the published code of big_vision.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from owl_det.modeling.attention import attend
from owl_det.modeling.transformer import ACTIVATIONS, Norm


class MapHead(nn.Module):
    """a = attention(probe, tokens); the result is a + MLP(norm(a)). All layers have biases."""

    num_heads: int
    mlp_width: int
    activation: str
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        b, _, d = tokens.shape
        xavier = nn.initializers.xavier_uniform()
        probe = self.param("probe", nn.initializers.normal(d**-0.5), (1, 1, d)).astype(self.dtype)
        probe = jnp.broadcast_to(probe, (b, 1, d))
        x = jnp.concatenate([probe, tokens.astype(self.dtype)], axis=1)
        shape = (3, self.num_heads, d // self.num_heads)
        qkv = nn.DenseGeneral(shape, kernel_init=xavier, dtype=self.dtype, name="qkv")(x)
        mixed = attend(
            qkv[:, :1, 0],
            qkv[:, 1:, 1],
            qkv[:, 1:, 2],
            is_causal=False,
            # One query a head: fused kernels gain nothing.
            implementation="xla",
        )
        out = nn.DenseGeneral(d, axis=(-2, -1), kernel_init=xavier, dtype=self.dtype, name="out")
        pooled = out(mixed)[:, 0]
        y = Norm(self.epsilon, self.dtype, name="norm")(pooled)
        y = nn.Dense(self.mlp_width, kernel_init=xavier, dtype=self.dtype, name="mlp_in")(y)
        y = ACTIVATIONS[self.activation](y)
        y = nn.Dense(d, kernel_init=xavier, dtype=self.dtype, name="mlp_out")(y)
        return pooled + y
