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

from configs import base, owlv2_b16, owlvit_l14


def get_config() -> ConfigDict:
    config: Any = base.default()
    config.name = "owlv2_l14"
    owlvit_l14.use_l14(config)
    config.model.image_size = 1008
    owlv2_b16.use_self_training(config)
    config.optimizer.learning_rate = 2e-5
    config.num_steps = 900_000
    config.selection.instance_top_k = 512
    return config
