"""GridCLIP's two alignments in an OWL-ViT detector, CLIP ViT-B/16 at 768 px, on LVIS's base names.

Command:  python -m owl_det.main --config=configs/gridclip_b16.py --workdir=W \
              --config.data.path=LVIS
          The student starts from its teacher, towers in models/clip-b16 (owl-det convert --from
          clip; config.checkpoint.init_from and config.distill.teacher name others). LVIS as for
          configs/owlvit_b16.py. On NVIDIA GPUs add --config.model.attention=cudnn.
          owl-det cache-teacher needs images as they are: for a cache set
          config.data.augment.flip=False and config.data.augment.crop_probability=0.
Paper:    arXiv 2303.09252 aligns the grid of a ResNet-50 FCOS detector. Its losses are here: every
          token against the names (weight 1), and the image's embedding with the teacher's (L1,
          weight 10). Its head, optimiser and input are not; its 24 epochs are 9,400 batches of 256
          images, here of mosaics, of 4.3 images in the mean. The teacher is the CLIP that the
          student starts from (a ViT-B/32 in the paper).
Hardware: TPU or GPU with the memory of configs/owlvit_b16.py at this batch, and the teacher's.
          Time: not measured here; never run at full size.
"""

from typing import Any

from ml_collections import ConfigDict

from owl_det import presets
from owl_det.presets import detectors


def get_config() -> ConfigDict:
    config: Any = presets.base()
    config.name = "gridclip_b16"
    detectors.use_lvis(config)
    detectors.use_owlvit_training(config)
    detectors.start_from_clip_b16(config)
    config.num_steps = 9_400  # the paper's 24 epochs of 100,170 images, were they single
    config.distill.gridclip_grid.weight = 1.0
    config.distill.gridclip_image.weight = 10.0
    return config
