"""Box formats, areas and overlaps, in float32, over any leading batch dimensions.

`cxcywh` is centre and size, `xyxy` is left, top, right, bottom; the unit is the caller's (relative
to the padded square, or pixels). An area below `MIN_AREA` counts as zero and a box whose corners
are swapped has no area: overlaps with such boxes are 0, and their gradients are finite.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

# Far below a millionth of a pixel in any unit in use, and far above where 1 / area² overflows.
MIN_AREA = 1e-12


def cxcywh_to_xyxy(boxes_cxcywh: Float[Array, "*b 4"]) -> Float[Array, "*b 4"]:
    """Centre and size to corners: `(cx - w/2, cy - h/2, cx + w/2, cy + h/2)`."""
    boxes = boxes_cxcywh.astype(jnp.float32)
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def xyxy_to_cxcywh(boxes_xyxy: Float[Array, "*b 4"]) -> Float[Array, "*b 4"]:
    """Corners to centre and size."""
    boxes = boxes_xyxy.astype(jnp.float32)
    low, high = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([(low + high) / 2, high - low], axis=-1)


def area(boxes_xyxy: Float[Array, "*b 4"]) -> Float[Array, "*b"]:
    """`max(w, 0) · max(h, 0)`, in the boxes' unit squared."""
    boxes = boxes_xyxy.astype(jnp.float32)
    return _extent(boxes[..., :2], boxes[..., 2:])


def pairwise_iou(
    a_xyxy: Float[Array, "*b n 4"], b_xyxy: Float[Array, "*b m 4"]
) -> tuple[Float[Array, "*b n m"], Float[Array, "*b n m"]]:
    """Intersection over union of every pair, in [0, 1], and the unions."""
    return _iou(*_pairs(a_xyxy, b_xyxy))


def iou_paired(
    a_xyxy: Float[Array, "*b 4"], b_xyxy: Float[Array, "*b 4"]
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """Intersection over union of the boxes at equal positions, in [0, 1], and the unions."""
    return _iou(a_xyxy.astype(jnp.float32), b_xyxy.astype(jnp.float32))


def pairwise_giou(
    a_xyxy: Float[Array, "*b n 4"], b_xyxy: Float[Array, "*b m 4"]
) -> Float[Array, "*b n m"]:
    """Generalised IoU of every pair: `IoU - (hull - union) / hull`, in [-1, 1].

    `hull` is the area of the smallest box around both (arXiv 1902.09630); the second term is 0
    where it has no area.
    """
    return _giou(*_pairs(a_xyxy, b_xyxy))


def giou_paired(a_xyxy: Float[Array, "*b 4"], b_xyxy: Float[Array, "*b 4"]) -> Float[Array, "*b"]:
    """Generalised IoU (see `pairwise_giou`) of the boxes at equal positions, in [-1, 1]."""
    return _giou(a_xyxy.astype(jnp.float32), b_xyxy.astype(jnp.float32))


def pairwise_ioa(
    a_xyxy: Float[Array, "*b n 4"], b_xyxy: Float[Array, "*b m 4"]
) -> Float[Array, "*b n m"]:
    """The share of each `a` that lies in each `b`: intersection over the area of `a`, in [0, 1]."""
    a, b = _pairs(a_xyxy, b_xyxy)
    return _safe_ratio(_intersection(a, b), area(a))


def _pairs(
    a: Float[Array, "*b n 4"], b: Float[Array, "*b m 4"]
) -> tuple[Float[Array, "*b n m 4"], Float[Array, "*b n m 4"]]:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    shape = jnp.broadcast_shapes(a[..., :, None, :].shape, b[..., None, :, :].shape)
    return (
        jnp.broadcast_to(a[..., :, None, :], shape),
        jnp.broadcast_to(b[..., None, :, :], shape),
    )


def _extent(low: Float[Array, "*b 2"], high: Float[Array, "*b 2"]) -> Float[Array, "*b"]:
    size = jnp.maximum(high - low, 0)
    return size[..., 0] * size[..., 1]


def _intersection(a: Float[Array, "*b 4"], b: Float[Array, "*b 4"]) -> Float[Array, "*b"]:
    return _extent(jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:]))


def _iou(
    a: Float[Array, "*b 4"], b: Float[Array, "*b 4"]
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    intersection = _intersection(a, b)
    union = area(a) + area(b) - intersection
    return _safe_ratio(intersection, union), union


def _giou(a: Float[Array, "*b 4"], b: Float[Array, "*b 4"]) -> Float[Array, "*b"]:
    iou, union = _iou(a, b)
    hull = _extent(jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:]))
    return iou - _safe_ratio(hull - union, hull)


def _safe_ratio(part: Float[Array, "*b"], whole: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """`part / whole`, and 0 where `whole` is no area.

    The denominator is replaced as well as the result: the gradient of the branch that `where`
    drops is multiplied by 0, and 0 · inf would be NaN.
    """
    is_area = whole > MIN_AREA
    return jnp.where(is_area, part / jnp.where(is_area, whole, 1), 0)
