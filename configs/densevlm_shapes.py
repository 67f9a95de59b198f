"""DenseVLM on shapes world with stuff: tokens learn the names that frozen towers retrieve.

Command:  python -m owl_det.main --config=configs/densevlm_shapes.py --workdir=W \
              --config.checkpoint.init_from=T --config.distill.teacher=T
          T is the workdir of configs/pretrain_shapes.py trained on captions that name stuff
          (--config.data.train.image_text.split=panoptic_text). Another teacher, such as one that is
          biased towards things, goes into --config.distill.dense_teacher. Controls:
          --config.distill.densevlm.contrast=all and =separate.
Hardware: two CPU cores.
"""

from typing import Any

from ml_collections import ConfigDict

from owl_det import presets
from owl_det.presets import small


def get_config() -> ConfigDict:
    config: Any = presets.base()
    config.name = "densevlm_shapes"
    small.use_shapes_token_distillation(config)
    config.data.train.shapes.split = "panoptic"
    small.use_shapes_names(config)
    return config
