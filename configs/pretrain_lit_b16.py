"""LiT: a text tower learns to read a locked image tower, CLIP's ViT-B/16 at 224 px.

Command:  owl-det convert openai/clip-vit-base-patch16 models/clip-b16 --from clip
          python -m owl_det.main --config=configs/pretrain_lit_b16.py --workdir=W \
              --config.data.path=DATA --config.checkpoint.init_from=models/clip-b16
          DATA as in configs/pretrain_clip_b16.py. For another image tower config.model.image must
          describe it; one with attention pooling or without a projection locks just the same.
Batch:    16,384 in the paper.
Hardware: not measured here; never run at full size.
Paper:    arXiv 2111.07991: image tower locked, with its projection; text tower and scale from
          scratch. Learning rate 1e-3, clipping at 1, cosine and a warm-up of 3 % are those of the
          authors' code (big_vision, lit_coco.py), decay and second moments those of
          configs/pretrain_siglip_b16.py. The length is ours.
"""

from typing import Any

from ml_collections import ConfigDict

from owl_det import presets
from owl_det.presets import towers


def get_config() -> ConfigDict:
    config: Any = presets.base()
    config.name = "pretrain_lit_b16"
    towers.use_image_text(config)
    towers.use_clip_b16(config)
    towers.use_big_vision_training(config)
    config.num_steps = 60_000
    config.schedule.warmup_steps = 1800
    config.checkpoint.init_from = "models/clip-b16"
    config.checkpoint.fresh = ("^text/", "^logit_scale$")
    config.optimizer.frozen = ("^image/",)
    return config
