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

from configs import base
from owl_det.config import ImageTextSource


def get_config() -> ConfigDict:
    config: Any = base.default()
    config.name = "pretrain_clip_b16"
    use_image_text(config)
    use_clip_b16(config)
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


def use_clip_b16(config: Any) -> None:
    """CLIP's two towers, without noise; the rest are the schema's defaults."""
    config.model.image_size = 224
    config.model.image.patch_size = 16
    config.model.image.droplayer_rate = 0.0
    config.model.text.droplayer_rate = 0.0
    config.model.text.num_positions = 77
    config.model.contrastive = "softmax"
    config.preprocess.resize = "bicubic"


def use_image_text(config: Any) -> None:
    """Data, batch and schedule of every contrastive pretraining at full size."""
    config.task = "contrastive"
    config.batch_size = 4096
    data = config.data
    base.add_source(data.train, "pairs", ImageTextSource(images="pairs"))
    captions = ImageTextSource(images="val2017", captions="annotations/captions_val2017.json")
    base.add_source(data.eval, "coco_captions", captions)
    data.with_captions = True
    data.max_instances = 1
    data.max_queries = 1
    data.min_queries = 0
    data.train_prompts = "none"
    # As the published towers saw images; a detector that starts from these may pad.
    config.preprocess.geometry = "stretch"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.schedule.kind = "cosine"
    config.evaluation.every_steps = 10_000
    config.evaluation.batch_size = 1024
    config.checkpoint.every_steps = 2000
