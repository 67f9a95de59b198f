"""CLIPSelf on shapes world: the towers of configs/pretrain_shapes.py teach their own tokens.

Command:  python -m owl_det.main --config=configs/clipself_shapes.py --workdir=W \
              --config.checkpoint.init_from=T --config.distill.teacher=T
          T is the workdir of configs/pretrain_shapes.py. Afterwards owl-det evaluate-regions
          measures T and W, and owl-det ensemble averages them.
Hardware: two CPU cores.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base, clipself_b16, pretrain_shapes, quickstart
from owl_det.config import ShapesWorldSource


def get_config() -> ConfigDict:
    config: Any = base.default()
    config.name = "clipself_shapes"
    use_tower_distillation(config)
    config.distill.clipself.weight = 1.0
    return config


def use_tower_distillation(config: Any) -> None:
    """Scenes without labels, for the blocks (and positions) of the image tower."""
    quickstart.tiny_model(config)
    config.task = "distill"
    config.model.contrastive = "softmax"
    pretrain_shapes.match_towers(config)
    config.batch_size = 32
    config.num_steps = 2000
    source = ShapesWorldSource(split="train", num_images=16_384)
    base.add_source(config.data.train, "shapes", source)
    config.data.max_instances = 1
    config.data.max_queries = 1
    config.data.min_queries = 0
    config.data.train_prompts = "none"
    config.data.eval_prompts = "none"
    config.data.augment.flip = True
    config.checkpoint.model_from_init = True
    # The towers pool the mean of all tokens, which attended in every block.
    config.distill.dense_last_block = "full"
    config.optimizer.learning_rate = 3e-4
    # As at full size, but for the positions: the teacher's grid is resized to the student's.
    around_blocks = "^image/(patch_kernel|class_embedding|norm_pre|norm_post|visual_projection)"
    config.optimizer.frozen = (*clipself_b16.FROZEN[:2], around_blocks)
    config.optimizer.clip.scope = "global"
    config.schedule.warmup_steps = 100
    config.checkpoint.every_steps = 500
