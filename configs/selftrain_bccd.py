"""BCCD without human boxes: a student trains on what `owl-det annotate` boxed by captions.

Command:  owl-det annotate --checkpoint=A --input=IMAGES --output=R --labels=noun_phrases
          python -m owl_det.main --config=configs/selftrain_bccd.py --workdir=W \
              --config.data.train.pseudo_boxes.path=R --config.data.path=BCCD \
              --config.checkpoint.init_from=runs/quickstart
          A is trained by configs/bccd.py with
          --config.data.train.bccd.split_list=ImageSets/Main/train.txt; IMAGES holds the pictures of
          val.txt and captions.jsonl. docs/annotate.md has all commands and what came out.
Hardware: two CPU cores.
"""

from typing import Any

from ml_collections import ConfigDict

from owl_det import presets
from owl_det.config import PseudoBoxesSource
from owl_det.presets import small


def get_config() -> ConfigDict:
    config: Any = presets.base()
    config.name = "selftrain_bccd"
    small.use_bccd(config)
    # Of the annotator's boxes 40 % lie on a cell at 0.1, 53 % at 0.3; many cells have several.
    pseudo_boxes = PseudoBoxesSource(min_box_score=0.3)
    presets.add_source(config.data.train, "pseudo_boxes", pseudo_boxes)
    presets.add_source(config.data.eval, "bccd", small.bccd_source("test"))
    config.data.augment.merge_iou = 0.6
    return config
