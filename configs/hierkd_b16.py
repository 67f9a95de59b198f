"""HierKD in an OWL-ViT detector, CLIP ViT-B/16 at 768 px: COCO's 48 base names, and captions.

Command:  python -m owl_det.main --config=configs/hierkd_b16.py --workdir=W \
              --config.data.path=COCO
          The student starts from its teacher, towers in models/clip-b16 (owl-det convert --from
          clip; config.checkpoint.init_from and config.distill.teacher name others). COCO holds
          annotations/{instances_train2017,captions_train2017,instances_val2017}.json, train2017/
          and val2017/. On NVIDIA GPUs add --config.model.attention=cudnn.
Paper:    arXiv 2203.10593 distils a ResNet-50 ATSS detector. Its losses are here: instance level
          (L1, weight 1), global level (weight 1), a tenth of the negatives. Its head, optimiser and
          input are not; its 12 epochs are 10,000 batches of 128 images, here of mosaics, of 4.3
          images in the mean. Crops are those of the true boxes, which a cache can know; of
          predicted ones, as in the paper: --config.distill.hierkd_instance.boxes=predicted.
          Teacher and student are one CLIP, whose texts stay as they are: queries lie in the space
          of the teacher's vectors.
Hardware: TPU or GPU with the memory of configs/owlvit_b16.py at this batch, and the teacher's.
          Time: not measured here; never run at full size.
"""

from typing import Any

from ml_collections import ConfigDict

from owl_det import presets
from owl_det.config import CocoSource
from owl_det.presets import detectors


def get_config() -> ConfigDict:
    config: Any = presets.base()
    config.name = "hierkd_b16"
    detectors.use_owlvit_training(config)
    detectors.start_from_clip_b16(config)
    data = config.data
    boxes = "annotations/instances_{}2017.json"
    train = CocoSource(
        annotations=boxes.format("train"),
        images="train2017",
        subset="ov_coco_base",
        captions="annotations/captions_train2017.json",
    )
    val = CocoSource(annotations=boxes.format("val"), images="val2017", subset="ov_coco")
    presets.add_source(data.train, "coco", train)
    presets.add_source(data.eval, "ov_coco", val)
    data.with_captions = True
    config.model.text.num_positions = 77  # captions are longer than names
    config.batch_size = 128
    # The paper's 12 epochs of the 107,761 images that show a base name, were they single.
    config.num_steps = 10_000
    config.optimizer.clip.scope = "global"  # the contrast couples the images of a batch
    config.distill.hierkd_instance.weight = 1.0
    config.distill.hierkd_instance.max_crops = 8
    config.distill.hierkd_global.weight = 1.0
    config.loss.negative_share = 0.1
    config.evaluation.every_steps = 2000
    return config
