"""Shapes world on two CPU cores: a small detector from scratch, no data and no accelerator.

Command:  python -m owl_det.main --config=configs/quickstart.py --workdir=W
Hardware: two CPU cores.
Measured: 8.2 minutes of training on two cores (7,000 steps of batch 32, one seed), AP50 over all
          113 names on 1,024 held-out images: base 0.855, novel_combination 0.659, novel_word 0.040.
          Half way: 0.733, 0.568, 0.043. With --config.data.shuffle_labels=True: 0.017, 0.009,
          0.004. GLIBC_TUNABLES=glibc.malloc.hugetlb=1 was set, as quickstart.sh does.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base
from owl_det.config import ShapesWorldSource


def tiny_model(config: ConfigDict) -> None:
    """Two small towers that train in minutes on two CPU cores."""
    model: Any = config.model
    model.image_size = 64
    model.embedding_dim = 64
    model.image.patch_size = 8
    model.image.width = 128
    model.image.position_init = "sincos2d"
    model.image.num_layers = 4
    model.image.num_heads = 4
    model.image.mlp_width = 512
    model.image.droplayer_rate = 0.0
    model.text.num_positions = 8
    model.text.width = 64
    model.text.num_layers = 2
    model.text.num_heads = 2
    model.text.mlp_width = 256
    model.text.droplayer_rate = 0.0
    model.scan_unroll = 4


def get_config() -> ConfigDict:
    config: Any = base.default()
    config.name = "quickstart"
    config.batch_size = 32
    config.num_steps = 7000
    tiny_model(config)
    data = config.data
    base.add_source(data.train, "shapes", ShapesWorldSource(split="train", num_images=16_384))
    base.add_source(data.eval, "shapes", ShapesWorldSource(split="test", num_images=1024))
    data.augment.flip = True
    data.max_instances = 6
    data.max_queries = 48
    data.max_distinct_queries = 48
    data.min_queries = 0
    data.train_prompts = "none"
    data.eval_prompts = "none"
    # Half of the patches, those of least variance, as OWLv2: twice the images per second.
    config.selection.token_drop_rate = 0.5
    config.optimizer.learning_rate = 1e-3
    # Slow text keeps words apart and combinable: novel combinations gain.
    config.optimizer.text_learning_rate = 1e-4
    # The 49,408 rows stay as drawn: the layers above tell a few dozen words apart without them.
    config.optimizer.frozen = ("^text/token_embedding$",)
    config.optimizer.clip.scope = "global"
    config.optimizer.b2 = 0.98
    config.schedule.warmup_steps = 100
    config.checkpoint.every_steps = 500
    config.evaluation.every_steps = 3500
    return config
