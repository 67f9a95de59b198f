"""OWL-ViT, CLIP ViT-L/14 at 840 px: detection training on human boxes.

Command:  python -m owl_det.main --config=configs/owlvit_l14.py --workdir=W \
              --config.data.path=LVIS --config.checkpoint.init_from=CLIP
Hardware: the paper trained on 64 TPU v2/v3 chips. Time: not measured here; never run at full size.
Expected: LVIS val AP 34.6, APr 31.2 with Objects365 + Visual Genome (arXiv 2205.06230, table 1).
"""

from typing import Any

from ml_collections import ConfigDict

from owl_det import presets
from owl_det.presets import detectors, towers


def get_config() -> ConfigDict:
    config: Any = presets.base()
    config.name = "owlvit_l14"
    detectors.use_lvis(config)
    detectors.use_owlvit_training(config)
    towers.use_clip_l14(config)
    config.model.image_size = 840
    config.num_steps = 70_000
    config.optimizer.learning_rate = 2e-5
    return config
