"""The teacher of the miniature distillation studies: small towers that know whole pictures well.

They see one picture at a time, at a quarter of the students' pixels, and no mosaics: like CLIP,
they name a crop far better than the tokens of a scene. Pictures are single objects, sharp and
blurred (crops of small objects are blurred too), objects on ground that has names, and scenes whose
captions name several objects, as those do that students learn from.

Command:  python -m owl_det.main --config=configs/teacher_shapes.py --workdir=W
Hardware: two CPU cores.
"""

from typing import Any

from ml_collections import ConfigDict

from owl_det import presets
from owl_det.config import ShapesWorldSource
from owl_det.presets import small

SIDE = 32  # of a crop, pixels


def get_config() -> ConfigDict:
    config: Any = presets.base()
    config.name = "teacher_shapes"
    small.use_shapes_contrast(config)
    config.batch_size = 128
    config.num_steps = 4000
    config.model.image_size = SIDE
    blurred = ShapesWorldSource(split="image_text", num_images=8192, image_size=SIDE // 2)
    grounds = ShapesWorldSource(split="panoptic_text", num_images=8192, image_size=SIDE)
    scenes = ShapesWorldSource(split="crowded", num_images=8192, image_size=SIDE)
    for name, source in (("blurred", blurred), ("panoptic_text", grounds), ("scenes", scenes)):
        presets.add_source(config.data.train, name, source)
    config.selection.token_drop_rate = 0.0
    config.checkpoint.every_steps = 1000
    config.evaluation.every_steps = 0
    config.evaluation.batch_size = 64
    return config
