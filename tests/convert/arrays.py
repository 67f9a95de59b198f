"""Weights that lie in memory, and reference models of PyTorch with nothing left at its default."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from owl_det.convert.weights import Weights

TOLERANCE = 2e-4  # of every comparison between frameworks


def weights(tensors: Mapping[str, np.ndarray], source: str = "test") -> Weights:
    return Weights(
        source=source,
        shapes={name: tuple(value.shape) for name, value in tensors.items()},
        dtypes=dict.fromkeys(tensors, "float32"),
        read=lambda name: np.asarray(tensors[name], np.float32),
    )


def randomised(module: Any) -> dict[str, np.ndarray]:
    """Gives every tensor of a PyTorch module random values, norms and biases too; returns them."""
    import torch

    generator = torch.Generator().manual_seed(0)
    module.eval()
    for name, value in module.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            value.copy_(0.5 + noise.abs())
        elif value.ndim < 2:  # norms, biases, scales
            mean = 0.7 if name.endswith("weight") or name == "logit_scale" else 0.0
            value.copy_(mean + 0.3 * noise)
        else:
            fan_in = value[0].numel() if "embedding" not in name else value.shape[-1]
            value.copy_(noise * fan_in**-0.5)
    return {name: value.numpy() for name, value in module.state_dict().items()}


def image(side: int, number: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (number, side, side, 3)).astype(np.uint8)


def normalised(pixels: np.ndarray, preprocess: Any) -> np.ndarray:
    """What the other program's processor makes of the pixels: float32, channels first."""
    values = (pixels / 255.0 - np.array(preprocess.mean)) / np.array(preprocess.std)
    return values.transpose(0, 3, 1, 2).astype(np.float32)


def difference(ours: Any, theirs: Any) -> float:
    return float(np.abs(np.asarray(ours) - np.asarray(theirs)).max())
