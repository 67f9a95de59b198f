"""OWLv2 (OWL-ST), CLIP ViT-B/16 at 960 px: the training recipe of self-training.

Command:  python -m owl_det.main --config=configs/owlv2_b16.py --workdir=W \
              --config.data.path=DATA --config.checkpoint.init_from=CLIP
          DATA holds pseudo_boxes/ (the output of owl-det annotate) and, to evaluate,
          annotations/lvis_v1_val.json with images/.
          On NVIDIA GPUs add --config.model.attention=cudnn.
Hardware: TPU pods in the paper, which gives 3.7e8 mosaics for B/16 (about 1.4 M steps of 256).
          Time: not measured here; never run at full size.
Expected: LVIS val AP 27.0, APr 29.6 after self-training (arXiv 2306.09683, table 1).
"""

from typing import Any

from ml_collections import ConfigDict

from owl_det import presets
from owl_det.presets import detectors


def get_config() -> ConfigDict:
    config: Any = presets.base()
    config.name = "owlv2_b16"
    detectors.use_owlv2_self_training(config)
    config.model.image_size = 960
    config.model.image.patch_size = 16
    config.num_steps = 1_400_000
    config.selection.instance_top_k = 256
    return config
