"""SigLIP's contrastive pretraining, ViT-B/16 at 224 px: the sigmoid loss, attention pooling.

Command:  python -m owl_det.main --config=configs/pretrain_siglip_b16.py --workdir=W \
              --config.data.path=DATA --config.data.tokenizer=spiece.model
          DATA as in configs/pretrain_clip_b16.py. The tokeniser is the file beside any SigLIP of
          Hugging Face's (pip install -e '.[siglip]').
Batch:    the paper recommends 32,768 and goes from 512 to a million.
Hardware: 16 TPU v4 chips for three days in the paper. Time: not measured here; never run at full
          size.
Paper:    arXiv 2303.15343: bias -10 and scale 10 at the start, second moments' decay 0.95 for large
          batches, learning rate 1e-3. Its weight decay of 1e-4 a step, not multiplied by the
          learning rate, is 0.1 here. Length and warm-up are those of SigLIP 2 (arXiv 2502.14786):
          40 billion pairs at 32,768, 20,000 steps.
"""

from typing import Any

from ml_collections import ConfigDict

from owl_det import presets
from owl_det.presets import towers


def get_config() -> ConfigDict:
    config: Any = presets.base()
    config.name = "pretrain_siglip_b16"
    towers.use_image_text(config)
    use_siglip_b16(config)
    config.num_steps = 1_220_703
    towers.use_big_vision_training(config)
    config.schedule.warmup_steps = 20_000
    return config


def use_siglip_b16(config: Any) -> None:
    """The two towers of google/siglip-base-patch16-224."""
    model = config.model
    model.image_size = 224
    model.embedding_dim = 768
    model.contrastive = "sigmoid"
    model.activation = "gelu_tanh"
    model.norm_epsilon = 1e-6
    model.image.patch_size = 16
    model.image.pooling = "map"
    model.image.pre_norm = False
    model.image.patch_bias = True
    model.image.projection = "none"
    model.image.droplayer_rate = 0.0
    model.text.tokenizer = "siglip"
    model.text.vocabulary_size = 32_000
    model.text.num_positions = 64
    model.text.width = 768
    model.text.num_heads = 12
    model.text.mlp_width = 3072
    model.text.is_causal = False
    model.text.pooling = "last"
    model.text.projection_bias = True
    model.text.droplayer_rate = 0.0
    config.preprocess.mean = (0.5, 0.5, 0.5)
    config.preprocess.std = (0.5, 0.5, 0.5)
