"""Embeddings of regions from those of tokens: averages over boxes and over masks.

Boxes are pooled as CLIPSelf does (arXiv 2310.01403, section 3.2), by RoIAlign (arXiv 1703.06870)
with one output cell: the mean of bilinear samples, as many along each axis as the box spans tokens.
The samples lie on a product grid and bilinear interpolation is a product too, so the mean is
Σ rows[y] columns[x] token[y, x] with weights that depend on the boxes alone.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from owl_det.boxes import cxcywh_to_xyxy
from owl_det.scoring import unit_length
from owl_det.types import FeatureLevel

# Tokens. A box of whole tokens takes one sample a token, however its corners were rounded.
_TOLERANCE = 1e-3


def roi_weights(
    boxes_cxcywh: Float[Array, "*b r 4"], size: tuple[int, int]
) -> tuple[Float[Array, "*b r h"], Float[Array, "*b r w"]]:
    """Weights of the rows and of the columns of a token grid for each box; both sum to 1.

    Boxes are relative to the grid, whose `size` is (rows, columns). The outer product of the two is
    torchvision's `roi_align(output_size=1, sampling_ratio=-1, aligned=True)` at the grid's scale.
    What of a box lies outside the grid is cut off first; a box without extent is sampled once, at
    its centre.
    """
    corners = jnp.clip(cxcywh_to_xyxy(boxes_cxcywh), 0.0, 1.0)
    rows = _axis_weights(corners[..., 1], corners[..., 3], size[0])
    columns = _axis_weights(corners[..., 0], corners[..., 2], size[1])
    return rows, columns


def region_embeddings(
    embeddings: Float[Array, "b n e"], boxes_cxcywh: Float[Array, "b r 4"], h: int, w: int
) -> Float[Array, "b r e"]:
    """The unit-length token embeddings of an h x w grid pooled over boxes, of unit length again."""
    b, _, e = embeddings.shape
    grid = unit_length(embeddings).reshape(b, h, w, e)
    rows, columns = roi_weights(boxes_cxcywh, (h, w))
    return unit_length(jnp.einsum("brh,brw,bhwe->bre", rows, columns, grid))


def kept_region_embeddings(
    level: FeatureLevel, boxes_cxcywh: Float[Array, "b r 4"]
) -> tuple[Float[Array, "b r e"], Bool[Array, "b r"]]:
    """As `region_embeddings`, of the tokens of the grid that were kept.

    Weights are renormalised over them. Also: the regions of which any token is there; others are 0.
    """
    rows, columns = roi_weights(boxes_cxcywh, level.grid)
    row, column = level.token_index // level.grid[1], level.token_index % level.grid[1]
    weights = jax.vmap(lambda x, i: x[:, i])(rows, row) * jax.vmap(lambda x, i: x[:, i])(
        columns, column
    )
    # The division by the sum of weights is that by the length.
    pooled = unit_length(jnp.einsum("brn,bne->bre", weights, unit_length(level.tokens)))
    return pooled, (weights > 0).any(-1)


def mask_embeddings(
    embeddings: Float[Array, "b n e"], is_inside: Bool[Array, "b r n"]
) -> Float[Array, "b r e"]:
    """Mean of the unit-length embeddings of each region's tokens, of unit length again.

    A region without tokens (a filler) is 0.
    """
    total = jnp.einsum("brn,bne->bre", is_inside.astype(jnp.float32), unit_length(embeddings))
    return unit_length(total)


def _axis_weights(
    low: Float[Array, "*r"], high: Float[Array, "*r"], size: int
) -> Float[Array, "*r n"]:
    """Mean of the hat functions max(0, 1 - |x - token|) over samples, one for each token spanned.

    `low` and `high` are in [0, 1]; token i has its centre at (i + 1/2) / `size`.
    """
    low, extent = low * size, (high - low) * size
    count = jnp.maximum(jnp.ceil(extent - _TOLERANCE), 1.0)
    sample = jnp.arange(size, dtype=jnp.float32).reshape((1,) * low.ndim + (size,))
    low, extent, count = (x[..., None] for x in (low, extent, count))
    # Beyond the outermost centres the outermost token goes on.
    place = jnp.clip(low + (sample + 0.5) * extent / count - 0.5, 0.0, size - 1.0)
    is_sample = (sample < count).astype(jnp.float32)
    token = jnp.arange(size, dtype=jnp.float32).reshape((1,) * place.ndim + (size,))
    hat = jnp.maximum(0.0, 1.0 - jnp.abs(place[..., None] - token))
    return jnp.einsum("...s,...sn->...n", is_sample / count, hat)
