"""Recipes for two CPU cores: tiny towers, on shapes world and on BCCD's blood cells."""

from typing import Any

from owl_det.config import ShapesWorldSource, VocSource
from owl_det.presets import add_source, use_no_names


def use_towers(config: Any) -> None:
    """Two small towers that train in minutes on two CPU cores."""
    model = config.model
    model.image_size = 64
    model.embedding_dim = 64
    model.image.patch_size = 8
    model.image.width = 128
    model.image.position_init = "sincos2d"
    model.image.num_layers = 4
    model.image.num_heads = 4
    model.image.mlp_width = 512
    model.image.droplayer_rate = 0.0
    model.text.num_positions = 8
    model.text.width = 64
    model.text.num_layers = 2
    model.text.num_heads = 2
    model.text.mlp_width = 256
    model.text.droplayer_rate = 0.0
    model.scan_unroll = 4


def use_matched_towers(config: Any) -> None:
    """The small towers with every token in the space of the texts, which hold captions.

    No class token stands between the tokens and the texts.
    """
    use_towers(config)
    config.model.image.pooling = "mean"
    config.model.text.num_positions = 24  # captions are longer than names


def use_training(config: Any) -> None:
    """Rates, optimiser and warm-up of every training of the tiny towers."""
    # Half of the patches, those of least variance, as OWLv2: twice the images per second.
    config.selection.token_drop_rate = 0.5
    config.optimizer.learning_rate = 1e-3
    config.optimizer.text_learning_rate = 1e-3
    # The 49,408 rows stay as drawn: the layers above tell a few dozen words apart without them.
    config.optimizer.frozen = ("^text/token_embedding$",)
    config.optimizer.clip.scope = "global"
    config.optimizer.b2 = 0.98
    config.schedule.warmup_steps = 100


def use_bare_names(config: Any) -> None:
    """Names are asked as they are, without prompts, and only those of the image."""
    config.data.min_queries = 0
    config.data.train_prompts = "none"
    config.data.eval_prompts = "none"


def use_shapes_detection(config: Any) -> None:
    """A small detector from scratch, on scenes of shapes world with boxes of their base names."""
    config.batch_size = 32
    use_towers(config)
    use_training(config)
    use_bare_names(config)
    data = config.data
    add_source(data.train, "shapes", ShapesWorldSource(split="train", num_images=16_384))
    add_source(data.eval, "shapes", ShapesWorldSource(split="test", num_images=1024))
    data.augment.flip = True
    data.max_instances = 6
    data.max_queries = 48
    data.max_distinct_queries = 48
    # Slow text keeps words apart and combinable: novel combinations gain.
    config.optimizer.text_learning_rate = 1e-4
    config.checkpoint.every_steps = 500
    config.evaluation.every_steps = 3500


def use_shapes_contrast(config: Any) -> None:
    """Contrastive training of the tiny towers on captions of shapes world."""
    config.task = "contrastive"
    config.batch_size = 32
    use_matched_towers(config)
    use_training(config)
    use_bare_names(config)
    config.model.contrastive = "softmax"
    data = config.data
    # Drawn at the size of a tile: shrunk from 64 pixels, fine stripes would be lost.
    source = ShapesWorldSource(split="image_text", num_images=16_384, image_size=32)
    add_source(data.train, "image_text", source)
    add_source(data.eval, "shapes", ShapesWorldSource(split="test", num_images=512))
    test = ShapesWorldSource(split="image_text_test", num_images=512)
    add_source(data.eval, "image_text", test)
    data.with_captions = True
    data.augment.flip = True
    data.max_instances = 1
    data.max_queries = 1


def start_from_shapes_towers(config: Any) -> None:
    """A detector that starts from the towers of configs/pretrain_shapes.py."""
    use_matched_towers(config)
    use_training(config)
    config.model.text.num_positions = 16  # of the towers' 24: names and N-grams are short
    config.checkpoint.init_from = "runs/pretrain_shapes"
    config.checkpoint.class_head_from_projection = True
    # The towers know words that have no boxes here: slow towers forget less of them.
    config.optimizer.image_learning_rate = 3e-4
    config.optimizer.text_learning_rate = 3e-5
    config.checkpoint.every_steps = 1000
    config.evaluation.region_accuracy = True


def use_shapes_annotator(config: Any) -> None:
    """Detection on human boxes of shapes world's base names, from pretrained towers."""
    use_shapes_detection(config)
    start_from_shapes_towers(config)
    config.data.train.shapes.num_images = 4096
    config.data.eval.shapes.num_images = 512


def use_shapes_token_distillation(config: Any) -> None:
    """Scenes without labels, for the blocks (and positions) of the tiny image tower."""
    use_matched_towers(config)
    config.task = "distill"
    config.model.contrastive = "softmax"
    config.batch_size = 32
    config.num_steps = 2000
    source = ShapesWorldSource(split="train", num_images=16_384)
    add_source(config.data.train, "shapes", source)
    use_no_names(config)
    config.data.eval_prompts = "none"
    config.data.augment.flip = True
    config.checkpoint.model_from_init = True
    # The towers pool the mean of all tokens, which attended in every block.
    config.distill.dense_last_block = "full"
    config.optimizer.learning_rate = 3e-4
    # As at full size, but for the positions: the teacher's grid is resized to the student's.
    rest = "patch_kernel|class_embedding|norm_pre|norm_post|visual_projection"
    config.optimizer.frozen = ("^text/", "^logit_scale$", f"^image/({rest})")
    config.optimizer.clip.scope = "global"
    config.schedule.warmup_steps = 100
    config.checkpoint.every_steps = 500


def use_shapes_names(config: Any) -> None:
    """DenseVLM asks for every object and every kind of stuff that is drawn, as captions do."""
    from data_pipelines import panoptic_world, shapes_names

    config.distill.regions.grids = "densevlm"
    config.distill.densevlm.weight = 1.0
    config.distill.densevlm.things = tuple(entry.name for entry in shapes_names.object_names())
    config.distill.densevlm.stuff = tuple(panoptic_world.STUFF)
    config.distill.densevlm.template = "a picture of {}"


def use_bccd(config: Any) -> None:
    """A small detector of the blood cells of BCCD, without its data."""
    config.batch_size = 8
    config.num_steps = 2500
    use_towers(config)
    use_training(config)
    use_bare_names(config)
    config.model.image_size = 160
    data = config.data
    data.augment.flip = True
    data.augment.crop_probability = 0.7
    data.augment.crop_min_area = 0.33
    data.augment.photometric = 0.2
    data.max_instances = 40
    data.max_queries = 3
    data.max_distinct_queries = 4
    config.evaluation.every_steps = 500


def bccd_source(split: str) -> VocSource:
    """BCCD's images of a split (train, val, trainval or test), relative to `config.data.path`."""
    return VocSource(
        split_list=f"ImageSets/Main/{split}.txt",
        names=("RBC", "WBC", "Platelets"),
        queries=("red blood cell", "white blood cell", "platelet"),
    )
