"""Contrastive pretraining on shapes world's captions: the words before any box.

Command:  python -m owl_det.main --config=configs/pretrain_shapes.py --workdir=W
Hardware: two CPU cores.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base, quickstart
from owl_det.config import ShapesWorldSource


def towers(config: ConfigDict) -> None:
    """The quickstart's towers, with the contrastive parameters; every token is in the text space."""
    quickstart.tiny_model(config)
    model: Any = config.model
    model.contrastive = "softmax"
    model.image.pooling = "mean"
    model.text.num_positions = 32  # captions are longer than names


def get_config() -> ConfigDict:
    config: Any = base.default()
    config.name = "pretrain_shapes"
    config.task = "contrastive"
    config.batch_size = 128
    config.num_steps = 4000
    towers(config)
    data = config.data
    source = ShapesWorldSource(split="image_text", num_images=16_384)
    base.add_source(data.train, "shapes", source)
    base.add_source(data.eval, "shapes", ShapesWorldSource(split="test", num_images=1024))
    data.with_captions = True
    data.augment.flip = True
    data.max_instances = 1
    data.max_queries = 1
    data.min_queries = 0
    data.train_prompts = "none"
    data.eval_prompts = "none"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.text_learning_rate = 1e-3
    config.optimizer.frozen = ("^text/token_embedding$",)
    config.optimizer.clip.scope = "global"
    config.optimizer.b2 = 0.98
    config.schedule.warmup_steps = 100
    config.checkpoint.every_steps = 500
    return config
