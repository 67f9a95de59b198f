"""Fine-tuning from any checkpoint on a data set in COCO format: one command, one folder.

Command:  python -m owl_det.main --config=configs/finetune.py --workdir=W \
              --config.data.path=DATA --config.checkpoint.init_from=CKPT
          DATA holds train.json, val.json (COCO or LVIS JSON) and images/. For LVIS add
          --config.evaluation.protocol=lvis; its rare names are held out with
          --config.data.train.train.subset=lvis_base.
          CKPT is a workdir or a converted checkpoint: a detector, or towers (CLIP, SigLIP, LiT),
          whose heads then start from random numbers. Architecture, preprocessing and tokeniser come
          from it; an architecture in config.model that is not the checkpoint's is refused. Prompts
          do not: for a model of bare names (the quickstart's) add
          --config.data.train_prompts=none --config.data.eval_prompts=none.
          Towers are made for 224 px or so: for them add --config.checkpoint.image_size=768 (a
          multiple of the patch size). Smaller sizes train faster on any checkpoint.
Hardware: one GPU for the B models at their own size (--dry_run prints the memory), with
          --config.model.dtype=bfloat16 --config.model.attention=cudnn; tiny models on a CPU.
Time:     not measured here; never run at full size.
Result:   eval/before_after.json and the log compare AP before the first step (zero-shot, for a
          detector) and after the last. eval/summary.json has all numbers.
"""

from typing import Any

from ml_collections import ConfigDict

from owl_det import presets
from owl_det.config import CocoSource
from owl_det.presets import detectors


def get_config() -> ConfigDict:
    config: Any = presets.base()
    config.name = "finetune"
    detectors.use_finetuning(config)
    presets.add_source(config.data.train, "train", CocoSource(annotations="train.json"))
    presets.add_source(config.data.eval, "val", CocoSource(annotations="val.json"))
    return config
