"""Detection on human boxes of shapes world's base names, from the towers of pretrain_shapes.py.

Command:  python -m owl_det.main --config=configs/annotator_shapes.py --workdir=W \
              --config.checkpoint.init_from=TOWERS   (default: runs/pretrain_shapes)
Hardware: two CPU cores.
"""

from typing import Any

from ml_collections import ConfigDict

from owl_det import presets
from owl_det.presets import small


def get_config() -> ConfigDict:
    config: Any = presets.base()
    config.name = "annotator_shapes"
    small.use_shapes_annotator(config)
    config.num_steps = 4000
    config.evaluation.every_steps = 700
    return config
