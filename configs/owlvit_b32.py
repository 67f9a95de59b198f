"""OWL-ViT, CLIP ViT-B/32 at 768 px: detection training on human boxes.

Command:  python -m owl_det.main --config=configs/owlvit_b32.py --workdir=W \
              --config.data.path=LVIS --config.checkpoint.init_from=CLIP
          LVIS holds annotations/lvis_v1_{train,val}.json and the COCO images in images/.
Hardware: the paper trained on 64 TPU v2/v3 chips. Time: not measured here; never run at full size.
Expected: LVIS val AP 22.1, APr 18.9 with Objects365 + Visual Genome (arXiv 2205.06230, table 1);
          training on LVIS alone, as the authors' published configs do, gives other numbers.
"""

from typing import Any

from ml_collections import ConfigDict

from owl_det import presets
from owl_det.presets import detectors


def get_config() -> ConfigDict:
    config: Any = presets.base()
    config.name = "owlvit_b32"
    detectors.use_lvis(config)
    detectors.use_owlvit_training(config)
    return config
