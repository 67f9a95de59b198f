"""Contrastive pretraining on shapes world's captions: the words before any box.

Command:  python -m owl_det.main --config=configs/pretrain_shapes.py --workdir=W
Hardware: two CPU cores.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base, quickstart
from owl_det.config import ShapesWorldSource

NUM_POSITIONS = 24  # captions are longer than names


def match_towers(config: ConfigDict) -> None:
    """Every token is in the space of the texts: no class token stands between them."""
    config.model.image.pooling = "mean"
    config.model.text.num_positions = NUM_POSITIONS


def get_config() -> ConfigDict:
    config: Any = base.default()
    config.name = "pretrain_shapes"
    config.task = "contrastive"
    config.batch_size = 32
    config.num_steps = 9000
    quickstart.tiny_model(config)
    match_towers(config)
    config.model.contrastive = "softmax"
    data = config.data
    # Drawn at the size of a tile: shrunk from 64 pixels, fine stripes would be lost.
    source = ShapesWorldSource(split="image_text", num_images=16_384, image_size=32)
    base.add_source(data.train, "image_text", source)
    base.add_source(data.eval, "shapes", ShapesWorldSource(split="test", num_images=512))
    test = ShapesWorldSource(split="image_text_test", num_images=512)
    base.add_source(data.eval, "image_text", test)
    data.with_captions = True
    # Tiles of mosaics are images of their own: tokens learn to speak for what is near them.
    data.augment.mosaic_sizes = (1, 2)
    data.augment.mosaic_probabilities = (0.2, 0.8)
    data.augment.flip = True
    data.max_instances = 1
    data.max_queries = 1
    data.min_queries = 0
    data.train_prompts = "none"
    data.eval_prompts = "none"
    config.selection.token_drop_rate = 0.5
    config.optimizer.learning_rate = 1e-3
    config.optimizer.text_learning_rate = 1e-3
    config.optimizer.frozen = ("^text/token_embedding$",)
    config.optimizer.clip.scope = "global"
    config.optimizer.b2 = 0.98
    config.schedule.warmup_steps = 100
    config.checkpoint.every_steps = 1500
    config.evaluation.every_steps = 3000
    config.evaluation.batch_size = 64
    return config
