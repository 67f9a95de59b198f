"""Self-training on pseudo-boxes of shapes world: OWL-ST's recipe (arXiv 2306.09683) in miniature.

Command:  owl-det annotate --checkpoint=A --input=shapes_world:train:8000 --output=R \
              --vocabulary=shapes_world
          python -m owl_det.main --config=configs/selftrain_shapes.py --workdir=W \
              --config.data.path=R --config.checkpoint.init_from=A
          A is the workdir of an annotator, such as one of configs/quickstart.py. Without init_from
          the student starts from nothing; the paper starts it from contrastive weights.
Cooldown: the schedule is open-ended until then. From any checkpoint at step s: copy the workdir and
          run the command there with --config.num_steps=S --config.schedule.cooldown_steps=S-s.
Hardware: CPU. Time: not measured to the end.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base, quickstart
from owl_det.config import PseudoBoxesSource, ShapesWorldSource


def get_config() -> ConfigDict:
    config: Any = base.default()
    config.name = "selftrain_shapes"
    config.batch_size = 32
    config.num_steps = 4000
    quickstart.tiny_model(config)
    # Twice the side of an image: of a 6 x 6 mosaic, each tile still has 21 pixels.
    config.model.image_size = 128
    data = config.data
    base.add_source(data.train, "pseudo_boxes", PseudoBoxesSource())
    base.add_source(data.eval, "shapes", ShapesWorldSource(split="test", num_images=1024))
    data.augment.mosaic_sizes = (1, 2, 3, 4, 6)
    # The paper takes all equally; here objects in large mosaics have few pixels left.
    data.augment.mosaic_probabilities = (0.35, 0.35, 0.2, 0.05, 0.05)
    data.augment.tile_scale_min = 0.5
    data.max_instances = 64
    data.max_queries = 96
    # Positives of 32 mosaics; what is left goes to pseudo-negatives, which are often shared.
    data.max_distinct_queries = 768
    data.min_queries = 50
    data.train_prompts = "none"
    data.eval_prompts = "none"
    config.selection.token_drop_rate = 0.5
    config.selection.instance_top_k = 64  # of the 128 that are left; as many as instances
    config.optimizer.learning_rate = 1e-3
    config.optimizer.text_learning_rate = 1e-4
    config.optimizer.frozen = ("^text/token_embedding$",)
    config.optimizer.clip.scope = "global"
    config.optimizer.b2 = 0.98
    config.schedule.kind = "inverse_sqrt"
    config.schedule.warmup_steps = 100
    config.schedule.timescale = 1000
    config.checkpoint.every_steps = 500
    config.evaluation.every_steps = 2000
    return config
