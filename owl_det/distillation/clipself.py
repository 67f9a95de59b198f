"""CLIPSelf: tokens of a region learn what the image tower says of the region's crop.

Source: Wu et al. 2023 (arXiv 2310.01403, section 3.2). The teacher is the image tower as it was,
the student starts from it; regions are the cells of a random grid over the image ("patches"), or
given boxes ("proposals").
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from owl_det.config import ClipSelfConfig
from owl_det.distillation.branch import Branch, BranchInputs, masked_mean, require
from owl_det.modeling.region_pool import kept_region_embeddings
from owl_det.scoring import unit_length
from owl_det.types import Params


def region_loss(
    student: Float[Array, "*b r e"], teacher: Float[Array, "*b r e"], is_region: Bool[Array, "*b r"]
) -> Float[Array, "*b"]:
    """mean over an image's regions of 1 − cos(s, t), the paper's only equation; 0 without regions.

    `student` are pooled tokens, `teacher` embeddings of the regions' crops.
    """
    cosine = jnp.sum(unit_length(student, 0.0) * unit_length(teacher, 0.0), axis=-1)
    return masked_mean(1.0 - cosine, is_region)


def _loss(entry: ClipSelfConfig, params: Params, inputs: BranchInputs) -> Float[Array, " b"]:
    boxes, is_region = require(inputs.region_boxes), require(inputs.is_region)
    pooled, is_seen = kept_region_embeddings(inputs.features.only_level, boxes)
    return region_loss(pooled, inputs.signals["regions"], is_region & is_seen)


BRANCH = Branch(loss=_loss, needs=("regions",), shares_space=True)
