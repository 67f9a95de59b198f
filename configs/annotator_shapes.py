"""Detection on human boxes of shapes world's base names, from the towers of pretrain_shapes.py.

Command:  python -m owl_det.main --config=configs/annotator_shapes.py --workdir=W \
              --config.checkpoint.init_from=TOWERS   (default: runs/pretrain_shapes)
Hardware: two CPU cores.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import pretrain_shapes, quickstart


def detector(config: ConfigDict) -> None:
    """What every detector of the recipe shares: model, start from towers, learning rates."""
    quickstart.tiny_model(config)
    pretrain_shapes.match_towers(config)
    config.model.text.num_positions = 16  # of the towers' 24: names and N-grams are short
    config.checkpoint.init_from = "runs/pretrain_shapes"
    config.checkpoint.class_head_from_projection = True
    config.selection.token_drop_rate = 0.5
    config.optimizer.learning_rate = 1e-3
    # The towers know words that have no boxes here: slow towers forget less of them.
    config.optimizer.image_learning_rate = 3e-4
    config.optimizer.text_learning_rate = 3e-5
    config.optimizer.frozen = ("^text/token_embedding$",)
    config.optimizer.clip.scope = "global"
    config.optimizer.b2 = 0.98
    config.schedule.warmup_steps = 100
    config.checkpoint.every_steps = 1000
    config.evaluation.region_accuracy = True


def get_config() -> ConfigDict:
    config: Any = quickstart.get_config()
    config.name = "annotator_shapes"
    config.num_steps = 4000
    detector(config)
    config.data.train.shapes.num_images = 4096
    config.data.eval.shapes.num_images = 512
    config.evaluation.every_steps = 700
    return config
