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

from owl_det import presets
from owl_det.presets import towers


def get_config() -> ConfigDict:
    config: Any = presets.base()
    config.name = "clipself_b16"
    towers.use_token_distillation(config)
    config.model.image.patch_size = 16
    config.batch_size = 16
    config.num_steps = 44_358  # six epochs of COCO's 118,287 images
    config.checkpoint.image_size = 1024
    config.distill.clipself.weight = 1.0
    return config
