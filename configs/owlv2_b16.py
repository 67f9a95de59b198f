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

from configs import base
from owl_det.config import CocoSource, PseudoBoxesSource


def get_config() -> ConfigDict:
    config: Any = base.default()
    config.name = "owlv2_b16"
    config.model.image_size = 960
    config.model.image.patch_size = 16
    use_self_training(config)
    config.num_steps = 1_400_000
    config.selection.instance_top_k = 256
    return config


def use_self_training(config: Any) -> None:
    """What the OWL-ST runs share (table A2 and appendices A.4 to A.7)."""
    data = config.data
    base.add_source(data.train, "pseudo_boxes", PseudoBoxesSource(records="pseudo_boxes"))
    lvis = CocoSource(annotations="annotations/lvis_v1_val.json", images="images")
    base.add_source(data.eval, "lvis", lvis)
    config.batch_size = 256
    config.optimizer.kind = "adafactor"
    config.optimizer.learning_rate = 5e-5
    config.optimizer.text_learning_rate = 2e-6
    config.optimizer.clip.scope = "shared_text"
    config.schedule.kind = "inverse_sqrt"
    config.schedule.warmup_steps = 1000
    config.schedule.timescale = 10_000
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.selection.token_drop_rate = 0.5
    data.train_prompts = "none"
    data.augment.mosaic_sizes = (1, 2, 3, 4, 6)
    data.augment.mosaic_probabilities = (0.2, 0.2, 0.2, 0.2, 0.2)
    data.augment.tile_scale_min = 0.5
    # 36 tiles of about ten boxes each. Of more boxes or names than fit, a random choice is taken.
    data.max_instances = 400
    data.max_queries = 300
    config.evaluation.every_steps = 50_000
    config.evaluation.protocol = "lvis"
    config.checkpoint.every_steps = 5000
