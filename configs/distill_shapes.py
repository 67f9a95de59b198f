"""Shapes world's detector with all four distillation branches, each switched by its weight.

Command:  python -m owl_det.main --config=configs/distill_shapes.py --workdir=W \
              --config.checkpoint.init_from=T --config.distill.teacher=T
          T is the workdir of configs/pretrain_shapes.py, trained on captions that name stuff
          (--config.data.train.image_text.split=panoptic_text): the student starts
          from the teacher (init_from by default: runs/pretrain_panoptic).
          --config.distill.clipself.weight=0 and the like leave a branch out; control: all 0.
          owl-det cache-teacher --config=configs/distill_shapes.py --config.distill.teacher=T \
              --config.checkpoint.init_from=T --out=CACHE
          computes the teacher once; then train with --config.distill.cache=CACHE.
Hardware: two CPU cores.
"""

from typing import Any

from ml_collections import ConfigDict

from owl_det import presets
from owl_det.presets import small


def get_config() -> ConfigDict:
    config: Any = presets.base()
    config.name = "distill_shapes"
    small.use_shapes_detection(config)
    small.use_matched_towers(config)
    config.num_steps = 7000
    config.checkpoint.init_from = "runs/pretrain_panoptic"
    config.checkpoint.model_from_init = True
    # Tokens start where their teacher's are: in the space of the texts.
    config.checkpoint.class_head_from_projection = True
    config.data.train.shapes.split = "panoptic"
    config.data.eval.shapes.split = "panoptic_test"
    config.data.with_captions = True
    config.data.augment.flip = False  # a cache knows images as they are
    distill = config.distill
    distill.dense_last_block = "full"  # the towers pool the mean of all tokens
    distill.regions.max_regions = 12
    distill.gridclip_grid.weight = 1.0
    distill.gridclip_image.weight = 10.0
    distill.clipself.weight = 1.0
    small.use_shapes_names(config)
    distill.hierkd_instance.weight = 1.0
    distill.hierkd_instance.max_crops = 6
    distill.hierkd_global.weight = 1.0
    config.loss.negative_share = 0.1
    return config
