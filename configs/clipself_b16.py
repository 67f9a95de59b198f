"""CLIPSelf, CLIP ViT-B/16 at 1024 px: an image tower teaches its own tokens, from images alone.

Command:  python -m owl_det.main --config=configs/clipself_b16.py --workdir=W \
              --config.data.path=COCO --config.checkpoint.init_from=CLIP \
              --config.distill.teacher=CLIP
          CLIP is a checkpoint of towers (owl-det convert --from clip); COCO holds
          annotations/instances_train2017.json and train2017/. Then
          owl-det ensemble --self_trained CLIP --fine_tuned W --weight 0.7 --out S
          averages student and teacher, as the authors do (0.95 for L/14).
Hardware: eight A100s in the paper. Time: not measured here; never run at full size.
Expected: mean accuracy of COCO boxes 29.3 -> 67.4 for OpenAI's ViT-B/16 (arXiv 2310.01403).
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base
from owl_det.config import CocoSource

# The paper trains the blocks alone. The rest, and texts, stay CLIP's.
FROZEN = (
    "^text/",
    "^logit_scale$",
    "^image/(patch_kernel|class_embedding|position_embedding|norm_pre|norm_post|visual_projection)",
)


def get_config() -> ConfigDict:
    config: Any = base.default()
    config.name = "clipself_b16"
    use_tower_distillation(config)
    config.model.image.patch_size = 16
    config.batch_size = 16
    config.num_steps = 44_358  # six epochs of COCO's 118,287 images
    config.checkpoint.image_size = 1024
    config.distill.clipself.weight = 1.0
    return config


def use_tower_distillation(config: Any) -> None:
    """What CLIPSelf and DenseVLM share (section 4.1 of either paper)."""
    config.task = "distill"
    source = CocoSource(annotations="annotations/instances_train2017.json", images="train2017")
    base.add_source(config.data.train, "coco", source)
    # Only images are read; names are asked of nobody.
    config.data.max_instances = 1
    config.data.max_queries = 1
    config.data.min_queries = 0
    config.data.train_prompts = "none"
    config.checkpoint.model_from_init = True
    config.model.contrastive = "softmax"
    config.model.image.last_block = "values"
    config.model.image.droplayer_rate = 0.0
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.optimizer.kind = "adam"
    config.optimizer.learning_rate = 1e-5
    config.optimizer.weight_decay = 0.1
    config.optimizer.b2 = 0.999
    config.optimizer.frozen = FROZEN
    config.optimizer.clip.scope = "none"
    config.schedule.kind = "cosine"
    config.schedule.warmup_steps = 1000
    config.checkpoint.every_steps = 2000
