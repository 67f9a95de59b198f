"""Contrastive pretraining on shapes world's captions: the words before any box.

Command:  python -m owl_det.main --config=configs/pretrain_shapes.py --workdir=W
Hardware: two CPU cores.
"""

from typing import Any

from ml_collections import ConfigDict

from owl_det import presets
from owl_det.presets import small


def get_config() -> ConfigDict:
    config: Any = presets.base()
    config.name = "pretrain_shapes"
    small.use_shapes_contrast(config)
    config.num_steps = 9000
    # Tiles of mosaics are images of their own: tokens learn to speak for what is near them.
    config.data.augment.mosaic_sizes = (1, 2)
    config.data.augment.mosaic_probabilities = (0.2, 0.8)
    config.checkpoint.every_steps = 1500
    config.evaluation.every_steps = 3000
    config.evaluation.batch_size = 64
    return config
