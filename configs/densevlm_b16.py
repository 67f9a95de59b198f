"""DenseVLM, CLIP ViT-B/16 at 512 px: tokens learn the names that a stronger model retrieves.

Command:  python -m owl_det.main --config=configs/densevlm_b16.py --workdir=W \
              --config.data.path=COCO --config.checkpoint.init_from=CLIP \
              --config.distill.dense_teacher=P
          P are towers whose tokens name regions, such as the result of configs/clipself_b16.py (of
          L/14 in the paper: patches of 14 pixels need --config.distill.dense_image_size=504); CLIP
          and COCO as there. Student and teacher may have text towers of their own.
Hardware: four A40s in the paper, 23 minutes an epoch. Time: not measured here; never run at full
          size.
Expected: with EVA-CLIP B/16, P of L/14 and 316 names: COCO boxes 73.4, things 71.0, stuff 45.6
          (arXiv 2412.06244). Here the names are the 133 of COCO's panoptic labels, in the order
          of speech: "brick wall", where `owl-det evaluate-regions` asks for "wall brick".
"""

from typing import Any

from ml_collections import ConfigDict

from owl_det import presets
from owl_det.presets import towers

# fmt: off
THINGS = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush",
)
STUFF = (
    "banner", "blanket", "bridge", "cardboard", "counter", "curtain", "door", "wood floor",
    "flower", "fruit", "gravel", "house", "light", "mirror", "net", "pillow", "platform",
    "playing field", "railroad", "river", "road", "roof", "sand", "sea", "shelf", "snow", "stairs",
    "tent", "towel", "brick wall", "stone wall", "tile wall", "wood wall", "water", "window blind",
    "window", "tree", "fence", "ceiling", "sky", "cabinet", "table", "floor", "pavement",
    "mountain", "grass", "dirt", "paper", "food", "building", "rock", "wall", "rug",
)
# fmt: on


def get_config() -> ConfigDict:
    config: Any = presets.base()
    config.name = "densevlm_b16"
    towers.use_token_distillation(config)
    config.model.image.patch_size = 16
    config.batch_size = 64
    config.num_steps = 11_089  # six epochs of COCO's 118,287 images
    config.checkpoint.image_size = 512
    config.distill.regions.grids = "densevlm"
    config.distill.regions.max_regions = 36
    config.distill.densevlm.weight = 1.0
    config.distill.densevlm.things = THINGS
    config.distill.densevlm.stuff = STUFF
    return config
