"""Fine-tuning of a self-trained detector on human boxes of shapes world's base names.

Command:  python -m owl_det.main --config=configs/finetune_shapes.py --workdir=W \
              --config.checkpoint.init_from=STUDENT   (default: runs/selftrain_shapes)
Hardware: two CPU cores.
"""

from typing import Any

from ml_collections import ConfigDict

from owl_det import presets
from owl_det.presets import small


def get_config() -> ConfigDict:
    config: Any = presets.base()
    config.name = "finetune_shapes"
    small.use_shapes_annotator(config)
    config.num_steps = 1500
    config.checkpoint.init_from = "runs/selftrain_shapes"
    config.checkpoint.class_head_from_projection = False
    # A tenth of the rates from scratch: what was self-trained shall stay.
    config.optimizer.learning_rate = 1e-4
    config.optimizer.image_learning_rate = 3e-5
    config.optimizer.text_learning_rate = 3e-6
    config.evaluation.before_training = True
    config.evaluation.every_steps = 500
    return config
