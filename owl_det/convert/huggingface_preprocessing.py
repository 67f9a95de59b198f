"""preprocessor_config.json of transformers' OWL classes, and the section `preprocess` of ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from owl_det.config import PreprocessConfig
from owl_det.convert import settings
from owl_det.convert.huggingface_config import DEFAULTS
from owl_det.convert.weights import read_json
from owl_det.errors import CheckpointError
from owl_det.types import LoadedModel

_RESAMPLING = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_CLIP_MEAN, _CLIP_STD = PreprocessConfig().mean, PreprocessConfig().std


def preprocess_section(file: Path, kind: str) -> dict[str, Any]:
    """The `preprocess` section. The processor's class decides between padding and stretching."""
    values, where = read_json(file), f"{file}: "
    is_stretched = _processor_of(values, kind, where) == "owlvit"
    for key in ("do_resize", "do_rescale", "do_normalize", *(() if is_stretched else ("do_pad",))):
        if not settings.switch(where, values, key, True):
            raise CheckpointError(f"{file}: {key} must be true")
    factor = settings.setting(where, values, "rescale_factor", 1 / 255)
    if abs(factor * 255 - 1) > 1e-6:
        raise CheckpointError(f"{file}: rescale_factor {factor!r} is not 1/255")
    resize = settings.choice(where, values, "resample", _RESAMPLING, "bicubic")
    return {
        "geometry": "stretch" if is_stretched else "pad",
        # Owlv2's processor filters and interpolates with SciPy, whatever `resample` says.
        "resize": resize if is_stretched else "gaussian",
        "pad_value": 0.0,
        "mean": settings.three_numbers(where, values, "image_mean", _CLIP_MEAN),
        "std": settings.three_numbers(where, values, "image_std", _CLIP_STD),
    }


def _processor_of(values: Mapping[str, Any], kind: str, where: str) -> str:
    """ "owlvit" or "owlv2" by the class of the image processor; `kind` where none is named."""
    for key in ("image_processor_type", "feature_extractor_type"):
        name = settings.setting(where, values, key, "") if values.get(key) is not None else ""
        for known in DEFAULTS:
            if known in name.lower():
                return known
        if name:
            raise CheckpointError(f"{where}{key}: {name!r} is not of {' or '.join(DEFAULTS)}")
    return kind


def check_size(file: Path, image_size: int) -> None:
    """Images must be prepared at the model's size; a crop to that size takes nothing away."""
    values = read_json(file)
    is_cropped = settings.switch(f"{file}: ", values, "do_center_crop", False)
    for key in ("size", "crop_size") if is_cropped else ("size",):
        size = values.get(key)
        if isinstance(size, dict):
            sides = [size.get("height"), size.get("width")]
        else:
            sides = size if isinstance(size, list) and size else [size]
        if size is not None and sides != [image_size] * len(sides):
            shown = str(size)[:60]
            raise CheckpointError(f"{file}: {key} {shown} is not the model's {image_size} pixels")


def preprocessor_json(kind: str, model: LoadedModel) -> dict[str, Any]:
    """The content of preprocessor_config.json."""
    preprocess, side = model.preprocess, model.config.image_size
    is_stretched = preprocess.geometry == "stretch"
    name = "OwlViT" if is_stretched else "Owlv2"
    return {
        "image_processor_type": f"{name}ImageProcessor",
        "processor_class": "Owlv2Processor" if kind == "owlv2" else "OwlViTProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": {"bilinear": 2, "bicubic": 3, "gaussian": 2}[preprocess.resize],
        **({"do_center_crop": False} if is_stretched else {"do_pad": True}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
