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

from configs import base, clipself_shapes
from data_pipelines import panoptic_world, shapes_world


def get_config() -> ConfigDict:
    config: Any = base.default()
    config.name = "densevlm_shapes"
    clipself_shapes.use_tower_distillation(config)
    config.data.train.shapes.split = "panoptic"
    use_names(config)
    return config


def use_names(config: Any) -> None:
    """Every object and every kind of stuff that is drawn, in words of the captions."""
    config.distill.regions.grids = "densevlm"
    config.distill.densevlm.weight = 1.0
    config.distill.densevlm.things = tuple(entry.name for entry in shapes_world.object_names())
    config.distill.densevlm.stuff = tuple(panoptic_world.STUFF)
    config.distill.densevlm.template = "a picture of {}"
