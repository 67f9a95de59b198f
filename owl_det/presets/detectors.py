"""Recipes of detectors at full size: OWL-ViT, OWLv2, fine-tuning of any checkpoint."""

from typing import Any

from owl_det.config import CocoSource, PseudoBoxesSource
from owl_det.presets import add_source, use_little_memory


def start_from_clip_b16(config: Any) -> None:
    """A student that starts in the space of its teacher, CLIP ViT-B/16; its texts stay there."""
    config.model.image.patch_size = 16
    config.checkpoint.init_from = config.distill.teacher = "models/clip-b16"
    config.checkpoint.class_head_from_projection = True
    config.optimizer.frozen = ("^text/",)


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
    use_little_memory(config)


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
