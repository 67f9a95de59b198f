"""OWL-ViT, CLIP ViT-L/14 at 840 px: detection training on human boxes.

Command:  python -m owl_det.main --config=configs/owlvit_l14.py --workdir=W \
              --config.data.path=LVIS --config.checkpoint.init_from=CLIP
Hardware: the paper trained on 64 TPU v2/v3 chips. Time: not measured here; never run at full size.
Expected: LVIS val AP 34.6, APr 31.2 with Objects365 + Visual Genome (arXiv 2205.06230, table 1).
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base, owlvit_b32


def get_config() -> ConfigDict:
    config: Any = base.default()
    config.name = "owlvit_l14"
    owlvit_b32.use_lvis(config)
    owlvit_b32.use_paper_training(config)
    use_l14(config)
    config.model.image_size = 840
    config.num_steps = 70_000
    config.optimizer.learning_rate = 2e-5
    return config


def use_l14(config: Any) -> None:
    """The towers of CLIP ViT-L/14."""
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
