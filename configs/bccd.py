"""BCCD: 364 real microscope images of blood cells, Pascal VOC XML.

Command:  python -m owl_det.main --config=configs/bccd.py --workdir=W --config.data.path=BCCD
          Trains on ImageSets/Main/trainval.txt, evaluates on test.txt. Add
          --config.checkpoint.init_from=RUN to start from the quickstart's towers and heads.
Hardware: two CPU cores.
Measured: from the quickstart's weights (then of 8,000 steps), AP50 on the 72 test images of seeds
          0, 1, 2: 0.726, 0.690, 0.628; seed 0 after 500 steps 0.402, 1,000 0.607, 1,500 0.669,
          2,000 0.725. Nine to eleven minutes while other work shared the cores. From a quickstart
          of 7,000 steps, seed 0: 0.421, 0.430, 0.583, 0.636, 0.602 every 500 steps.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base, quickstart
from owl_det.config import VocSource

NAMES = ("RBC", "WBC", "Platelets")
QUERIES = ("red blood cell", "white blood cell", "platelet")


def get_config() -> ConfigDict:
    config: Any = base.default()
    config.name = "bccd"
    quickstart.tiny_model(config)
    config.model.image_size = 160
    config.batch_size = 8
    config.num_steps = 2500
    data = config.data
    for group, split in ((data.train, "trainval"), (data.eval, "test")):
        source = VocSource(split_list=f"ImageSets/Main/{split}.txt", names=NAMES, queries=QUERIES)
        base.add_source(group, "bccd", source)
    data.augment.flip = True
    data.augment.crop_probability = 0.7
    data.augment.crop_min_area = 0.33
    data.augment.photometric = 0.2
    data.max_instances = 40
    data.max_queries = 3
    data.max_distinct_queries = 4
    data.min_queries = 0
    data.train_prompts = "none"
    data.eval_prompts = "none"
    # Half of the patches, those of least variance: most of a smear is empty.
    config.selection.token_drop_rate = 0.5
    config.optimizer.learning_rate = 1e-3
    config.optimizer.text_learning_rate = 1e-3
    config.optimizer.frozen = ("^text/token_embedding$",)
    config.optimizer.clip.scope = "global"
    config.optimizer.b2 = 0.98
    config.schedule.warmup_steps = 100
    config.evaluation.every_steps = 500
    return config
