"""What configs share: the schema's defaults, towers, and recipes of training.

A config starts from `base()`, takes the recipes that it follows, and sets what is its own:

    config = presets.base()
    presets.use_lvis(config)
    config.num_steps = 1000

Every assignment is checked: an unknown key or a wrong type raises in the line that has it.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from owl_det.config import (
    CocoSource,
    Config,
    ImageTextSource,
    PseudoBoxesSource,
    ShapesWorldSource,
    SourceConfig,
    VocSource,
)


def base() -> ConfigDict:
    """All keys with their defaults. Unknown keys and wrong types raise where they are assigned."""
    return ConfigDict(dataclasses.asdict(Config())).lock()


def add_source(group: ConfigDict, name: str, source: SourceConfig) -> None:
    """Adds a data source to `config.data.train` or `config.data.eval`."""
    with group.unlocked():
        group[name] = ConfigDict(dataclasses.asdict(source)).lock()


# --- towers --------------------------------------------------------------------------------------
# The schema's defaults are those of CLIP ViT-B/32.


def use_clip_b16(config: Any) -> None:
    """The two towers of CLIP ViT-B/16 at 224 px, without noise in training."""
    config.model.image_size = 224
    config.model.image.patch_size = 16
    config.model.image.droplayer_rate = 0.0
    config.model.text.droplayer_rate = 0.0
    config.model.text.num_positions = 77
    config.model.contrastive = "softmax"
    config.preprocess.resize = "bicubic"


def use_clip_l14(config: Any) -> None:
    """The two towers of CLIP ViT-L/14."""
    model = config.model
    model.embedding_dim = 768
    model.image.patch_size = 14
    model.image.width = 1024
    model.image.num_layers = 24
    model.image.num_heads = 16
    model.image.mlp_width = 4096
    model.text.width = 768
    model.text.num_heads = 12
    model.text.mlp_width = 3072


def use_tiny_towers(config: Any) -> None:
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


def use_tiny_matched_towers(config: Any) -> None:
    """The small towers with every token in the space of the texts, which hold captions.

    No class token stands between the tokens and the texts.
    """
    use_tiny_towers(config)
    config.model.image.pooling = "mean"
    config.model.text.num_positions = 24  # captions are longer than names


def start_from_clip_b16(config: Any) -> None:
    """A student that starts in the space of its teacher, CLIP ViT-B/16; its texts stay there."""
    config.model.image.patch_size = 16
    config.checkpoint.init_from = config.distill.teacher = "models/clip-b16"
    config.checkpoint.class_head_from_projection = True
    config.optimizer.frozen = ("^text/",)


# --- detection at full size ----------------------------------------------------------------------


def use_lvis(config: Any) -> None:
    """LVIS JSON for training and evaluation, relative to `config.data.path`."""
    data = config.data
    for group, split in ((data.train, "train"), (data.eval, "val")):
        annotations = f"annotations/lvis_v1_{split}.json"
        # Rare categories are novel: their boxes are not trained on.
        subset = "lvis_base" if split == "train" else "all"
        source = CocoSource(annotations=annotations, images="images", subset=subset)
        add_source(group, "lvis", source)
    config.evaluation.protocol = "lvis"


def use_owlvit_training(config: Any) -> None:
    """What B/32, B/16 and L/14 of OWL-ViT share (arXiv 2205.06230, A1.3 and table A3)."""
    config.batch_size = 256
    config.num_steps = 140_000
    config.model.has_objectness_head = False  # OWLv2's
    config.loss.objectness_weight = 0.0
    _use_owl_rates(config)
    config.optimizer.kind = "adam"
    config.schedule.kind = "cosine"
    augment = config.data.augment
    augment.merge_iou = 0.9
    augment.crop_probability = 1.0
    augment.crop_min_area = 0.33
    augment.flip = True
    augment.mosaic_sizes = (1, 2, 3)
    augment.mosaic_probabilities = (0.4, 0.3, 0.3)
    config.evaluation.every_steps = 10_000
    config.checkpoint.every_steps = 2000


def use_owlv2_self_training(config: Any) -> None:
    """What the OWL-ST runs share (arXiv 2306.09683, table A2 and appendices A.4 to A.7)."""
    data = config.data
    add_source(data.train, "pseudo_boxes", PseudoBoxesSource(records="pseudo_boxes"))
    lvis = CocoSource(annotations="annotations/lvis_v1_val.json", images="images")
    add_source(data.eval, "lvis", lvis)
    config.batch_size = 256
    _use_owl_rates(config)
    config.optimizer.kind = "adafactor"
    config.schedule.kind = "inverse_sqrt"
    config.schedule.timescale = 10_000
    config.selection.token_drop_rate = 0.5
    data.train_prompts = "none"
    data.augment.mosaic_sizes = (1, 2, 3, 4, 6)
    data.augment.mosaic_probabilities = (0.2, 0.2, 0.2, 0.2, 0.2)
    data.augment.tile_scale_min = 0.5
    # 36 tiles of about ten boxes each. Of more boxes or names than fit, a random choice is taken.
    data.max_instances = 400
    data.max_queries = 300
    config.evaluation.every_steps = 50_000
    config.evaluation.protocol = "lvis"
    config.checkpoint.every_steps = 5000


def _use_owl_rates(config: Any) -> None:
    config.optimizer.learning_rate = 5e-5
    config.optimizer.text_learning_rate = 2e-6
    config.optimizer.clip.scope = "shared_text"
    config.schedule.warmup_steps = 1000
    _use_little_memory(config)


def _use_little_memory(config: Any) -> None:
    config.model.dtype = "bfloat16"
    config.model.remat = "full"


def use_finetuning(config: Any) -> None:
    """Fine-tuning of any checkpoint's detector or towers, whose architecture is taken over."""
    config.batch_size = 16
    config.num_steps = 5000
    config.checkpoint.model_from_init = True
    config.data.augment.flip = True
    config.data.augment.crop_probability = 0.5
    config.data.augment.photometric = 0.2
    config.data.max_distinct_queries = 1024
    config.optimizer.learning_rate = 2e-5
    config.optimizer.text_learning_rate = 2e-6
    config.schedule.warmup_steps = 200
    config.model.remat = "dots"
    config.evaluation.before_training = True
    config.evaluation.every_steps = 1000


# --- towers at full size -------------------------------------------------------------------------


def use_image_text(config: Any) -> None:
    """Data, batch and schedule of every contrastive pretraining at full size."""
    config.task = "contrastive"
    config.batch_size = 4096
    data = config.data
    add_source(data.train, "pairs", ImageTextSource(images="pairs"))
    captions = ImageTextSource(images="val2017", captions="annotations/captions_val2017.json")
    add_source(data.eval, "coco_captions", captions)
    data.with_captions = True
    _use_no_names(config)
    # As the published towers saw images; a detector that starts from these may pad.
    config.preprocess.geometry = "stretch"
    _use_little_memory(config)
    config.schedule.kind = "cosine"
    config.evaluation.every_steps = 10_000
    config.evaluation.batch_size = 1024
    config.checkpoint.every_steps = 2000


def _use_no_names(config: Any) -> None:
    """The training asks for no names of objects."""
    config.data.max_instances = 1
    config.data.max_queries = 1
    config.data.min_queries = 0
    config.data.train_prompts = "none"


def use_big_vision_training(config: Any) -> None:
    """What the authors of LiT and SigLIP train with.

    The decay differs: theirs is of kernels alone, here of embeddings, positions and the pooling
    probe too.
    """
    config.optimizer.kind = "adafactor"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.text_learning_rate = 1e-3
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip.scope = "global"
    config.optimizer.clip.norm = 1.0


_FROZEN_TEXT = ("^text/", "^logit_scale$")


def use_token_distillation(config: Any) -> None:
    """What CLIPSelf and DenseVLM share at full size (section 4.1 of either paper)."""
    config.task = "distill"
    source = CocoSource(annotations="annotations/instances_train2017.json", images="train2017")
    add_source(config.data.train, "coco", source)
    _use_no_names(config)  # only images are read
    config.checkpoint.model_from_init = True
    config.model.contrastive = "softmax"
    config.model.image.last_block = "values"
    config.model.image.droplayer_rate = 0.0
    _use_little_memory(config)
    config.optimizer.kind = "adam"
    config.optimizer.learning_rate = 1e-5
    config.optimizer.weight_decay = 0.1
    config.optimizer.b2 = 0.999
    # The papers train the blocks alone. The rest, and texts, stay CLIP's.
    rest = "patch_kernel|class_embedding|position_embedding|norm_pre|norm_post|visual_projection"
    config.optimizer.frozen = (*_FROZEN_TEXT, f"^image/({rest})")
    config.optimizer.clip.scope = "none"
    config.schedule.kind = "cosine"
    config.schedule.warmup_steps = 1000
    config.checkpoint.every_steps = 2000


# --- small data on two CPU cores -----------------------------------------------------------------


def use_small_training(config: Any) -> None:
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
    use_tiny_towers(config)
    use_small_training(config)
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
    use_tiny_matched_towers(config)
    use_small_training(config)
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
    use_tiny_matched_towers(config)
    use_small_training(config)
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
    use_tiny_matched_towers(config)
    config.task = "distill"
    config.model.contrastive = "softmax"
    config.batch_size = 32
    config.num_steps = 2000
    source = ShapesWorldSource(split="train", num_images=16_384)
    add_source(config.data.train, "shapes", source)
    _use_no_names(config)
    config.data.eval_prompts = "none"
    config.data.augment.flip = True
    config.checkpoint.model_from_init = True
    # The towers pool the mean of all tokens, which attended in every block.
    config.distill.dense_last_block = "full"
    config.optimizer.learning_rate = 3e-4
    # As at full size, but for the positions: the teacher's grid is resized to the student's.
    rest = "patch_kernel|class_embedding|norm_pre|norm_post|visual_projection"
    config.optimizer.frozen = (*_FROZEN_TEXT, f"^image/({rest})")
    config.optimizer.clip.scope = "global"
    config.schedule.warmup_steps = 100
    config.checkpoint.every_steps = 500


def use_shapes_names(config: Any) -> None:
    """DenseVLM asks for every object and every kind of stuff that is drawn, as captions do."""
    from data_pipelines import panoptic_world, shapes_world

    config.distill.regions.grids = "densevlm"
    config.distill.densevlm.weight = 1.0
    config.distill.densevlm.things = tuple(entry.name for entry in shapes_world.object_names())
    config.distill.densevlm.stuff = tuple(panoptic_world.STUFF)
    config.distill.densevlm.template = "a picture of {}"


def use_bccd(config: Any) -> None:
    """A small detector of the blood cells of BCCD, without its data."""
    config.batch_size = 8
    config.num_steps = 2500
    use_tiny_towers(config)
    use_small_training(config)
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
