"""CLIP's ResNet: shapes and sizes (its numbers are compared with PyTorch in tests/convert)."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from owl_det.config import ModelConfig, PreprocessConfig
from owl_det.config.resolve import resolve_model
from owl_det.modeling import resnet
from owl_det.modeling.resnet import ClipResNet


def _model(**resnet_settings: Any) -> tuple[ModelConfig, PreprocessConfig]:
    text = {"num_positions": 77, "width": 512, "num_heads": 8}
    settings = {"image_size": 224, "embedding_dim": 1024, "text": text}
    return resolve_model(settings | {"image": {"kind": "resnet", **resnet_settings}}, {})


def test_resnet_50_has_the_parameters_of_clip() -> None:
    """102,007,137 with OpenAI's own count: what is learned, without the stored statistics."""
    shapes = resnet.parameter_shapes(*_model())
    learned = [
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
        if path[-1].key not in ("mean", "variance")
    ]
    assert sum(learned) == 102_007_137


def test_dense_features_work_at_any_size_and_pooling_only_at_its_own() -> None:
    model, preprocess = _model(width=4, num_blocks=(1, 1, 1, 1), num_heads=2)
    module = ClipResNet(model, preprocess)
    variables = {"params": resnet.parameter_shapes(model, preprocess)}

    def shape(method: str, side: int) -> tuple[int, ...]:
        image = jax.ShapeDtypeStruct((2, side, side, 3), jnp.uint8)
        found = jax.eval_shape(lambda v, x: module.apply(v, x, method=method), variables, image)
        return found.only_level.grid if method == "patch_features" else found.shape

    assert shape("patch_features", 160) == (5, 5)
    assert shape("embed_image", 224) == (2, 1024)
    with pytest.raises(ValueError, match="feature map of 5x5; the attention pool knows 7x7"):
        shape("embed_image", 160)
