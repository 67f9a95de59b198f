"""CLIP's contrastive pretraining, ViT-B/16 at 224 px: stage 1 of docs/recipe.md at full size.

Command:  python -m owl_det.main --config=configs/pretrain_clip_b16.py --workdir=W \
              --config.data.path=DATA
          DATA holds pairs/ (image-text pairs in .tar or .tfrecord files, or a folder of images)
          and, to evaluate retrieval, COCO: annotations/captions_val2017.json and val2017/.
          On NVIDIA GPUs add --config.model.attention=cudnn.
Batch:    the paper's is 32,768 (--config.batch_size=32768), where 390,625 steps are 32 passes over
          400 million pairs. The default is for a pod of one host; every image is contrasted with
          all captions of the batch, whatever the number of devices.
Hardware: the paper trained ResNets and ViTs on up to 592 V100 GPUs. Time: not measured here; never
          run at full size.
Paper:    arXiv 2103.00020, tables 18 to 20. Its random square crop is a crop of 90 to 100 % of the
          area here, stretched to the square.
"""

from typing import Any

from ml_collections import ConfigDict

from owl_det import presets
from owl_det.presets import towers


def get_config() -> ConfigDict:
    config: Any = presets.base()
    config.name = "pretrain_clip_b16"
    towers.use_image_text(config)
    towers.use_clip_b16(config)
    config.num_steps = 390_625
    config.data.augment.crop_probability = 1.0
    config.data.augment.crop_min_area = 0.9
    config.optimizer.kind = "adam"
    config.optimizer.learning_rate = 5e-4
    config.optimizer.text_learning_rate = 5e-4
    config.optimizer.b2 = 0.98
    config.optimizer.epsilon = 1e-6
    config.optimizer.weight_decay = 0.2
    config.optimizer.clip.scope = "none"
    config.schedule.warmup_steps = 2000
    return config
