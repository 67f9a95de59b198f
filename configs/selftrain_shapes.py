"""Self-training on pseudo-boxes of shapes world: OWL-ST's recipe (arXiv 2306.09683) in miniature.

Command:  owl-det annotate --checkpoint=A --input=shapes_world:crowded:8192 --output=R \
              --vocabulary=shapes_world
          python -m owl_det.main --config=configs/selftrain_shapes.py --workdir=W \
              --config.data.path=R --config.checkpoint.init_from=TOWERS
          A is the workdir of an annotator (configs/annotator_shapes.py), TOWERS one of
          configs/pretrain_shapes.py: the paper starts the student from contrastive weights.
Cooldown: from any checkpoint at step s: copy the workdir and run the command there with
          --config.num_steps=S --config.schedule.cooldown_steps=S-s.
Hardware: two CPU cores.
"""

from typing import Any

from ml_collections import ConfigDict

from owl_det import presets
from owl_det.config import PseudoBoxesSource, ShapesWorldSource
from owl_det.presets import small


def get_config() -> ConfigDict:
    config: Any = presets.base()
    config.name = "selftrain_shapes"
    config.batch_size = 32
    config.num_steps = 4000
    small.start_from_shapes_towers(config)
    data = config.data
    presets.add_source(
        data.train, "pseudo_boxes", PseudoBoxesSource(min_box_score=0.1, min_image_score=0.3)
    )
    presets.add_source(data.eval, "shapes", ShapesWorldSource(split="test", num_images=1024))
    # The paper takes 1, 2, 3, 4 and 6 equally. In 64 pixels no object is left of a 3 x 3 mosaic.
    data.augment.mosaic_sizes = (1, 2)
    data.augment.mosaic_probabilities = (0.85, 0.15)
    data.augment.tile_scale_min = 0.8  # the paper's 0.5 would leave small objects three pixels
    # The annotator boxes an object more than once, by several phrases: one instance of all of them.
    data.augment.merge_iou = 0.6
    data.augment.flip = True
    data.max_instances = 24
    data.max_queries = 64
    # Positives of the batch; what is left goes to pseudo-negatives, which are often shared.
    data.max_distinct_queries = 384
    data.min_queries = 50
    data.train_prompts = "none"
    data.eval_prompts = "none"
    config.selection.instance_top_k = 24  # of the 32 that are left; as many as instances
    config.schedule.kind = "inverse_sqrt"
    config.schedule.timescale = 1000
    config.schedule.cooldown_steps = 1000
    config.evaluation.every_steps = 1000
    return config
