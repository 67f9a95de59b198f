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

from owl_det import presets
from owl_det.presets import small


def get_config() -> ConfigDict:
    config: Any = presets.base()
    config.name = "bccd"
    small.use_bccd(config)
    for group, split in ((config.data.train, "trainval"), (config.data.eval, "test")):
        presets.add_source(group, "bccd", small.bccd_source(split))
    return config
