"""CLIPSelf on shapes world: the towers of configs/pretrain_shapes.py teach their own tokens.

Command:  python -m owl_det.main --config=configs/clipself_shapes.py --workdir=W \
              --config.checkpoint.init_from=T --config.distill.teacher=T
          T is the workdir of configs/pretrain_shapes.py. Afterwards owl-det evaluate-regions
          measures T and W, and owl-det ensemble averages them.
Hardware: two CPU cores.
"""

from typing import Any

from ml_collections import ConfigDict

from owl_det import presets
from owl_det.presets import small


def get_config() -> ConfigDict:
    config: Any = presets.base()
    config.name = "clipself_shapes"
    small.use_shapes_token_distillation(config)
    config.distill.clipself.weight = 1.0
    return config
