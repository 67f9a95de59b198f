"""HierKD: matched tokens learn crops, and the image's parts learn its caption.

Source: Ma et al. 2022 (arXiv 2203.10593, sections 3.2 to 3.4).
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from owl_det import boxes as box_lib
from owl_det.config import Config, HierKdGlobalConfig, HierKdInstanceConfig
from owl_det.distillation import crops
from owl_det.distillation.branch import Branch, BranchInputs, masked_mean, require
from owl_det.distillation.select import choose_instances, take_rows
from owl_det.errors import ConfigError
from owl_det.losses import contrastive
from owl_det.scoring import unit_length
from owl_det.types import Params

INITIAL_SCALE = 10.0  # τ of the contrast; section 4.2

_EXCLUDED = -1e9


def instance_loss(
    student: Float[Array, "*b m e"],
    teacher: Float[Array, "*b m e"],
    is_counted: Bool[Array, "*b m"],
    norm: Literal["l1", "l2"],
) -> Float[Array, "*b"]:
    """mean over an image's instances of ‖f/|f| − v/|v|‖ (equation 2); 0 without instances.

    `student` are the embeddings of matched tokens, `teacher` those of crops. "l1" is the paper's;
    its released config takes "l2", which is √(2e/π) times smaller for random vectors.
    """
    difference = unit_length(student, 0.0) - unit_length(teacher, 0.0)
    if norm == "l1":
        distance = jnp.abs(difference).sum(-1)
    else:
        # The square root has no gradient at zero, where student equals teacher.
        distance = jnp.sqrt(jnp.maximum(jnp.sum(difference**2, axis=-1), 1e-12))
    return masked_mean(distance, is_counted)


def pool_cells(
    tokens: Float[Array, "b n e"],
    centres: Float[Array, "b n 2"],
    area_cxcywh: Float[Array, "b 4"],
    side: int,
    pooling: Literal["max", "mean"],
) -> tuple[Float[Array, "b c e"], Bool[Array, "b c"]]:
    """Tokens pooled over the side × side cells of an area, of unit length, and which have any.

    A token belongs to the cell that its centre lies in (section 3.3: patch-level representations).
    """
    corner = area_cxcywh[:, None, :2] - area_cxcywh[:, None, 2:] / 2
    place = (centres - corner) / jnp.maximum(area_cxcywh[:, None, 2:], 1e-6)
    is_inside = ((place >= 0) & (place < 1)).all(-1)
    column, row = (jnp.floor(place[..., i] * side).astype(jnp.int32) for i in (0, 1))
    cell = jnp.where(is_inside, row * side + column, -1)
    is_member = cell[:, None, :] == jnp.arange(side * side)[None, :, None]
    has_any = is_member.any(-1)
    if pooling == "mean":
        pooled = jnp.einsum("bcn,bne->bce", is_member.astype(jnp.float32), tokens)
    else:
        # One cell at a time: all at once would hold [b, c, n, e].
        pooled = jnp.stack(
            [
                jnp.where(is_member[:, c, :, None], tokens, -jnp.inf).max(1)
                for c in range(side * side)
            ],
            axis=1,
        )
    return unit_length(jnp.where(has_any[..., None], pooled, 0.0)), has_any


def caption_scores(
    captions: Float[Array, "t e"], cells: Float[Array, "b c e"], is_cell: Bool[Array, "b c"]
) -> Float[Array, "t b"]:
    """⟨I, C⟩ of every caption and image: equations 3 and 4.

    Each caption attends to an image's cells by softmax(T · P), without a temperature, and is
    compared with what it gathers. Vectors have unit length. |Σ w P|² is computed as wᵀ (P Pᵀ) w, so
    that no vector of every pair is ever held.
    """
    response = jnp.einsum("te,bce->tbc", captions, cells)
    weights = jax.nn.softmax(jnp.where(is_cell[None], response, _EXCLUDED), axis=-1)
    gram = jnp.einsum("bce,bde->bcd", cells, cells)
    square = jnp.einsum("tbc,bcd,tbd->tb", weights, gram, weights)
    gathered = jnp.einsum("tbc,tbc->tb", weights, response)
    return gathered / jnp.sqrt(jnp.maximum(square, 1e-12))


def global_loss(
    scores: Float[Array, "b b"],
    is_same_text: Bool[Array, "b b"],
    is_counted: Bool[Array, " b"],
    log_scale: Float[Array, ""],
    objective: Literal["contrastive", "positive"],
) -> Float[Array, " b"]:
    """ "contrastive": L_I + L_C of equation 5, over all pairs of the global batch; per pair.

    `scores` are those of `caption_scores`: captions in rows, images in columns; τ is
    exp(log_scale). Pairs with the same words share the target. "positive": 1 − ⟨I, C⟩ (table 3,
    "PL").
    """
    if objective == "positive":
        return jnp.where(is_counted, 1.0 - jnp.diagonal(scores), 0.0)
    logits = jnp.exp(log_scale) * scores.T
    # Both directions, which `softmax_loss` averages, are summed here.
    return 2.0 * contrastive.softmax_loss(logits, is_same_text, is_counted)


def _instance(
    entry: HierKdInstanceConfig, params: Params, inputs: BranchInputs
) -> Float[Array, " b"]:
    assert inputs.targets is not None
    truth, is_instance = inputs.targets.boxes, inputs.targets.is_instance
    predicted = require(inputs.instance_boxes)
    iou, _ = box_lib.iou_paired(box_lib.cxcywh_to_xyxy(predicted), box_lib.cxcywh_to_xyxy(truth))
    chosen = choose_instances(truth, is_instance, entry.max_crops)
    is_counted = take_rows(require(inputs.is_matched) & (iou >= entry.min_iou), chosen)
    if entry.boxes == "truth":
        wanted = inputs.signals["instances"]
    else:
        assert inputs.embed_boxes is not None
        grown = crops.grow_in_tile(
            take_rows(predicted, chosen), inputs.tile_boxes, inputs.is_tile, entry.crop_scale
        )
        wanted = inputs.embed_boxes(grown)
    return instance_loss(
        take_rows(require(inputs.instance_tokens), chosen), wanted, is_counted, entry.norm
    )


def _instance_needs(entry: HierKdInstanceConfig) -> tuple[str, ...]:
    return ("instances",) if entry.boxes == "truth" else ("embed_boxes",)


def _global(entry: HierKdGlobalConfig, params: Params, inputs: BranchInputs) -> Float[Array, " b"]:
    is_caption, tokens = require(inputs.is_caption), require(inputs.caption_tokens)
    tile = _draw_tile(inputs.keys, is_caption)
    area, caption, words = (
        take_rows(x, tile[:, None])[:, 0]
        for x in (inputs.tile_boxes, inputs.signals["captions"], tokens)
    )
    cells, is_cell = pool_cells(inputs.tokens, inputs.centres, area, entry.grid_side, entry.pooling)
    is_counted = inputs.is_example & is_caption.any(-1) & is_cell.any(-1)
    is_same_text = (words[:, None] == words[None]).all(-1)
    scores = caption_scores(caption, cells, is_cell)
    return global_loss(scores, is_same_text, is_counted, params["log_scale"], entry.objective)


def _draw_tile(keys: Key[Array, " b"], is_caption: Bool[Array, "b t"]) -> Int[Array, " b"]:
    """One of each mosaic's tiles that have a caption, each equally likely."""
    noise = jax.vmap(lambda key: jax.random.uniform(key, is_caption.shape[1:]))(keys)
    return jnp.argmax(jnp.where(is_caption, noise, -1.0), axis=-1)


def _init_global(
    entry: HierKdGlobalConfig, key: Key[Array, ""], student_dim: int, teacher_dim: int
) -> Params:
    return {"log_scale": jnp.asarray(math.log(INITIAL_SCALE))}


def _check_instance(entry: HierKdInstanceConfig, config: Config) -> None:
    if entry.boxes == "truth":
        return
    if config.distill.shuffle_targets:
        raise ConfigError(
            "config.distill.shuffle_targets: the crops of predicted boxes are made in the loss, "
            "from their own image; set distill.hierkd_instance.boxes to truth"
        )
    if config.distill.cache:
        raise ConfigError(
            "config.distill.hierkd_instance.boxes: predicted boxes cannot be cached; take truth"
        )


INSTANCE_BRANCH = Branch(
    loss=_instance,
    needs=_instance_needs,
    needs_heads=True,
    shares_space=True,
    check=_check_instance,
    instances=lambda entry, boxes, is_instance: choose_instances(
        boxes, is_instance, entry.max_crops
    ),
    crop_scale=lambda entry: entry.crop_scale,
    # A cache holds every object, whichever of them a training chooses.
    cached=lambda entry: dataclasses.replace(entry, max_crops=2**31),
)
GLOBAL_BRANCH = Branch(
    loss=_global,
    needs=("captions",),
    init=_init_global,
    couples_examples=lambda entry: entry.objective == "contrastive",
    shares_space=True,
)
