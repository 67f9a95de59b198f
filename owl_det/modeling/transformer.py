"""The pre-norm transformer that both towers are made of; layers are stored stacked."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from owl_det.modeling.attention import ATTENTION, Implementation, attend


def quick_gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """x σ(1.702 x), the GELU of CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}

REMAT_POLICIES: dict[str, Any] = {
    "full": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENTION),
    ),
}


class Norm(nn.Module):
    """Layer norm in float32, result in `dtype`."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return nn.LayerNorm(epsilon=self.epsilon, dtype=jnp.float32, name="norm")(x).astype(
            self.dtype
        )


class Block(nn.Module):
    """Attention and MLP, each behind a norm, with stochastic depth and dropout per row.

    Noise is drawn from a key of each row (image or query), so that it does not depend on how rows
    are laid out over batches and devices. A dropped sublayer adds nothing and a kept one is not
    rescaled, as in the authors' code.

    Unless `num_last_queries` is None, only so many tokens, the first ones, attend in the last layer
    (`layer` = `num_layers` - 1). Every other token takes its own value in place of a mixture:
    y = x + Wo (Wv · norm_1(x)), z = y + MLP(norm_2(y)); MaskCLIP, arXiv 2112.01071, section 3.2.
    """

    width: int
    num_heads: int
    mlp_width: int
    num_layers: int
    is_causal: bool
    activation: str
    epsilon: float
    dropout_rate: float
    attention: Implementation
    dtype: Any
    num_last_queries: int | None

    def setup(self) -> None:
        out_scale = self.width**-0.5 * (2 * self.num_layers) ** -0.5
        normal = nn.initializers.normal
        self.norm_1 = Norm(self.epsilon, self.dtype)
        self.qkv = nn.DenseGeneral(
            (3, self.num_heads, self.width // self.num_heads),
            kernel_init=normal(self.width**-0.5),
            dtype=self.dtype,
        )
        self.out = nn.DenseGeneral(
            self.width, axis=(-2, -1), kernel_init=normal(out_scale), dtype=self.dtype
        )
        self.norm_2 = Norm(self.epsilon, self.dtype)
        self.mlp_in = nn.Dense(
            self.mlp_width, kernel_init=normal((2 * self.width) ** -0.5), dtype=self.dtype
        )
        self.mlp_out = nn.Dense(self.width, kernel_init=normal(out_scale), dtype=self.dtype)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        layer: Int[Array, ""],
        droplayer_rate: Float[Array, ""],
        row_keys: Key[Array, " b"] | None,
    ) -> tuple[Float[Array, "b n d"], None]:
        keys = None
        if row_keys is not None:
            keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, layer)))(row_keys)
        x = x + self._noisy(self._attention(self.norm_1(x), layer), droplayer_rate, keys, 0)
        x = x + self._noisy(self._mlp(self.norm_2(x)), droplayer_rate, keys, 1)
        return x, None

    def _attention(self, x: Float[Array, "b n d"], layer: Int[Array, ""]) -> Float[Array, "b n d"]:
        qkv = self.qkv(x)
        query, key, value = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
        attend_to = partial(attend, is_causal=self.is_causal, implementation=self.attention)
        num_queries = self.num_last_queries
        if num_queries is None:
            return self.out(attend_to(query, key, value))

        def pass_values(query: Array, key: Array, value: Array) -> Array:
            if num_queries == 0:
                return value
            # Fused kernels have nothing to gain from a single query, and want multiples of 64.
            mixed = attend(
                query[:, :num_queries], key, value, is_causal=self.is_causal, implementation="xla"
            )
            return jnp.concatenate([mixed, value[:, num_queries:]], axis=1)

        # The layers are one scanned program; this runs one branch in each.
        is_last = layer == self.num_layers - 1
        return self.out(jax.lax.cond(is_last, pass_values, attend_to, query, key, value))

    def _mlp(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.mlp_out(ACTIVATIONS[self.activation](self.mlp_in(x)))

    def _noisy(
        self,
        update: Float[Array, "b n d"],
        droplayer_rate: Float[Array, ""],
        keys: Key[Array, "b 2"] | None,
        sublayer: int,
    ) -> Float[Array, "b n d"]:
        if keys is None:
            return update
        if self.dropout_rate > 0:
            keep = jax.vmap(
                lambda key, row: jax.random.bernoulli(
                    jax.random.fold_in(key, 1), 1 - self.dropout_rate, row.shape
                )
            )(keys[:, sublayer], update)
            update = jnp.where(keep, update / (1 - self.dropout_rate), 0)
        is_kept: Bool[Array, " b"] = jax.vmap(
            lambda key: jax.random.bernoulli(key, 1 - droplayer_rate)
        )(keys[:, sublayer])
        return jnp.where(is_kept[:, None, None], update, 0)


class Transformer(nn.Module):
    """`num_layers` blocks; parameters of `blocks` carry a leading layer axis.

    `num_last_queries`: in the last block, tokens that attend (see `Block`); None = all do.
    """

    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    is_causal: bool
    activation: str
    epsilon: float
    droplayer_rate: float
    dropout_rate: float
    attention: Implementation
    remat: str
    unroll: int
    dtype: Any
    num_last_queries: int | None = None

    def setup(self) -> None:
        block: Any = Block
        if self.remat != "none":
            block = nn.remat(block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=cast(Any, (0, 0, nn.broadcast)),
            length=self.num_layers,
            unroll=self.unroll,
        )(
            width=self.width,
            num_heads=self.num_heads,
            mlp_width=self.mlp_width,
            num_layers=self.num_layers,
            is_causal=self.is_causal,
            activation=self.activation,
            epsilon=self.epsilon,
            dropout_rate=self.dropout_rate,
            attention=self.attention,
            dtype=self.dtype,
            num_last_queries=self.num_last_queries,
        )

    def __call__(
        self, x: Float[Array, "b n d"], row_keys: Key[Array, " b"] | None
    ) -> Float[Array, "b n d"]:
        """Runs all blocks; `row_keys` None switches stochastic depth and dropout off."""
        # The rate rises linearly from 0 in the first layer to `droplayer_rate` in the last.
        rates = self.droplayer_rate * jnp.linspace(0.0, 1.0, self.num_layers)
        x, _ = self.blocks(x, jnp.arange(self.num_layers), rates, row_keys)
        return x
