"""Arithmetic of a training step: a formula, and XLA's own count to hold it against."""

import dataclasses
from typing import Any

import jax

from data_pipelines import batch_spec
from owl_det import sharding
from owl_det.config import Config, MeshConfig, TextTowerConfig, VitConfig
from owl_det.modeling.token_drop import num_kept
from owl_det.training import step_shapes


def flops_per_image(config: Config, texts_per_image: float) -> float:
    """Floating point operations that training needs for one image: 3 x `forward_flops`.

    A matrix product costs twice as much backward as forward: one product for the gradient of each
    factor. Recomputation (`config.model.remat`) is not counted, as it is not needed work.
    """
    return 3.0 * sum(forward_flops(config, texts_per_image).values())


def forward_flops(config: Config, texts_per_image: float) -> dict[str, float]:
    """Floating point operations of one image's forward pass, by part; matrix products only.

    A product of [a, b] and [b, c] counts 2abc. With n tokens of width d (the class token among
    them), L layers and MLPs of width f:

        tower(n, d, f, L) = L (8 n d² + 4 n d f + 4 n² d)      q, k, v, out; MLP; attention
        image tower       = 2 n p d + tower                    p = 3 · patch_size² values a patch
        text tower        = texts · (tower(l, …) + 2 d e)      all l positions, one projection
        heads             = n (4 d² + 2 d)                     objectness, of every token
                          + k (4 d² + 8 d + 2 d e + 4 d + 2 e q)    box; class, of the k selected

    n is what token dropping leaves, q is `max_queries`, e `embedding_dim`; `texts_per_image` is the
    number of distinct texts of a batch over its number of images. Norms, softmax, losses, matching
    and the optimiser are left out: a few percent even of the tiny model, at its batch of 16.

    Without a class token the towers' n + 1 is n; without an objectness head its term is 0.
    A contrastive step has no heads. In their place it pools each image (a map head: q, k, v of all
    tokens, one query, one MLP), projects it (a mean: all tokens) and compares its up to t tiles
    with all t B texts of the batch:

        contrastive       = 6 (n + 1) d² + 4 n d + 2 d² + 4 d f (map head) + 2 d e + 2 e t² B
    """
    model, selection = config.model, config.selection
    image, text, e = model.vit, model.text, model.embedding_dim
    num_patches = model.grid_side**2
    n = num_kept(num_patches, selection.token_drop_rate)
    k = min(selection.instance_top_k or n, n)
    d, p, q = image.width, 3 * image.patch_size**2, config.data.max_queries
    has_class_token = image.pooling == "class_token"
    image_tower = 2 * n * p * d + _tower_flops(n + has_class_token, image)
    one_text = _tower_flops(text.num_positions, text) + 2 * text.width * e
    parts = {
        "image_tower": float(image_tower),
        "text_tower": float(texts_per_image * one_text),
    }
    if config.task == "contrastive":
        pooling = 6 * (n + 1) * d * d + 4 * n * d + 2 * d * d + 4 * d * image.mlp_width
        pooled = pooling if image.pooling == "map" else 0
        t = max(config.data.augment.mosaic_sizes) ** 2
        projected = n if image.pooling == "mean" else 1
        comparison = 2 * t * e * t * config.batch_size
        return parts | {"contrastive": float(pooled + projected * 2 * d * e + comparison)}
    mlp = 4 * d * d
    objectness = n * (mlp + 2 * d) if model.has_objectness_head else 0
    heads = objectness + k * (mlp + 8 * d + 2 * d * e + 4 * d + 2 * e * q)
    return parts | {"heads": float(heads)}


def _tower_flops(n: int, tower: VitConfig | TextTowerConfig) -> int:
    d, f = tower.width, tower.mlp_width
    return tower.num_layers * (8 * n * d * d + 4 * n * d * f + 4 * n * n * d)


def texts_per_image(config: Config, num_data_shards: int = 1) -> float:
    """Texts that a step encodes over its images: rows of the query tables, or captions."""
    if config.task == "contrastive":
        return float(max(config.data.augment.mosaic_sizes) ** 2)  # each tile has its caption
    return batch_spec.num_table_rows(config, num_data_shards) / config.batch_size


def xla_flops_per_image(config: Config, num_data_shards: int = 1) -> float:
    """What XLA counts for one image of a training step.

    Counted before XLA's own passes, because those hand matrix products to libraries of the backend
    whose work XLA does not count. Elementwise work and the optimiser are in this count.
    """
    counted = countable(config, num_data_shards)
    return xla_flops(counted) / counted.batch_size


def xla_flops(config: Config) -> float:
    """XLA's count for a whole step as it stands: the body of a loop is counted once."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    cost: Any = step_shapes.lower(config, mesh).cost_analysis()
    return float(cost["flops"])


def countable(config: Config, num_data_shards: int = 1) -> Config:
    """The same step in a form whose every operation XLA counts, and counts once, on one device.

    Layers are unrolled, a step that clips per example gets a single microbatch, nothing is
    recomputed, and attention is neither a loop nor a library call. An image brings as many texts as
    before.
    """
    size = config.batch_size
    if config.optimizer.clip.scope in ("shared_text", "exact"):
        size = min(size, config.optimizer.clip.microbatch)
    model = config.model
    layers = max(model.vit.num_layers, model.text.num_layers)
    num_texts = max(1, round(size * texts_per_image(config, num_data_shards)))
    return dataclasses.replace(
        config,
        batch_size=size,
        model=dataclasses.replace(model, remat="none", scan_unroll=layers, attention="plain"),
        data=dataclasses.replace(config.data, max_distinct_queries=num_texts),
    )
