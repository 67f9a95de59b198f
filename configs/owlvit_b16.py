"""OWL-ViT, CLIP ViT-B/16 at 768 px: detection training on human boxes.

Command:  python -m owl_det.main --config=configs/owlvit_b16.py --workdir=W \
              --config.data.path=LVIS --config.checkpoint.init_from=CLIP
Hardware: the paper trained on 64 TPU v2/v3 chips. Time: not measured here; never run at full size.
Expected: LVIS val AP 27.2, APr 20.6 with Objects365 + Visual Genome (arXiv 2205.06230, table 1).
"""

from typing import Any

from ml_collections import ConfigDict

from owl_det import presets
from owl_det.presets import detectors


def get_config() -> ConfigDict:
    config: Any = presets.base()
    config.name = "owlvit_b16"
    detectors.use_lvis(config)
    detectors.use_owlvit_training(config)
    config.model.image.patch_size = 16
    return config
