"""OWLv2 (OWL-ST), CLIP ViT-L/14 at 1008 px: the training recipe of self-training.

Command:  python -m owl_det.main --config=configs/owlv2_l14.py --workdir=W \
              --config.data.path=DATA --config.checkpoint.init_from=CLIP
          Data and flags as in configs/owlv2_b16.py.
Hardware: TPU pods in the paper, which gives 2.3e8 mosaics for L/14 (about 0.9 M steps of 256).
          Time: not measured here; never run at full size.
Expected: LVIS val AP 33.5, APr 34.9 after self-training (arXiv 2306.09683, table 1).
"""

from typing import Any

from ml_collections import ConfigDict

from owl_det import presets
from owl_det.presets import detectors, towers


def get_config() -> ConfigDict:
    config: Any = presets.base()
    config.name = "owlv2_l14"
    detectors.use_owlv2_self_training(config)
    towers.use_clip_l14(config)
    config.model.image_size = 1008
    config.optimizer.learning_rate = 2e-5
    config.num_steps = 900_000
    config.selection.instance_top_k = 512
    return config
