"""Recipes of towers at full size: their sizes, contrastive pretraining, distillation of tokens.

The schema's defaults are the towers of CLIP ViT-B/32.
"""

from typing import Any

from owl_det.config import CocoSource, ImageTextSource
from owl_det.presets import add_source, use_little_memory, use_no_names


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


def use_image_text(config: Any) -> None:
    """Data, batch and schedule of every contrastive pretraining at full size."""
    config.task = "contrastive"
    config.batch_size = 4096
    data = config.data
    add_source(data.train, "pairs", ImageTextSource(images="pairs"))
    captions = ImageTextSource(images="val2017", captions="annotations/captions_val2017.json")
    add_source(data.eval, "coco_captions", captions)
    data.with_captions = True
    use_no_names(config)
    # As the published towers saw images; a detector that starts from these may pad.
    config.preprocess.geometry = "stretch"
    use_little_memory(config)
    config.schedule.kind = "cosine"
    config.evaluation.every_steps = 10_000
    config.evaluation.batch_size = 1024
    config.checkpoint.every_steps = 2000


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


def use_token_distillation(config: Any) -> None:
    """What CLIPSelf and DenseVLM share at full size (section 4.1 of either paper)."""
    config.task = "distill"
    source = CocoSource(annotations="annotations/instances_train2017.json", images="train2017")
    add_source(config.data.train, "coco", source)
    use_no_names(config)  # only images are read
    config.checkpoint.model_from_init = True
    config.model.contrastive = "softmax"
    config.model.image.last_block = "values"
    config.model.image.droplayer_rate = 0.0
    use_little_memory(config)
    config.optimizer.kind = "adam"
    config.optimizer.learning_rate = 1e-5
    config.optimizer.weight_decay = 0.1
    config.optimizer.b2 = 0.999
    # The papers train the blocks alone. The rest, and texts, stay CLIP's.
    rest = "patch_kernel|class_embedding|position_embedding|norm_pre|norm_post|visual_projection"
    config.optimizer.frozen = ("^text/", "^logit_scale$", f"^image/({rest})")
    config.optimizer.clip.scope = "none"
    config.schedule.kind = "cosine"
    config.schedule.warmup_steps = 1000
    config.checkpoint.every_steps = 2000
