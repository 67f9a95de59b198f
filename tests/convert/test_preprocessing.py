"""Our preprocessing against the image processors of transformers, on awkward images.

Named deviations, where ours is meant to differ:
- 16-bit grey is scaled to 8 bits; Pillow's conversion, which theirs uses, cuts it off at 255.
- Pixels are rounded to 8 bits after resizing, theirs after OWLv2's are not: up to half of 1/255.
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipelines import image_ops
from owl_det.config import PreprocessConfig

transformers = pytest.importorskip("transformers", reason="parity needs the extra [parity]")
pytest.importorskip("torch", reason="parity needs the extra [parity]")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]

SIDE = 64


def _noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Noise over slow waves: edges and flat parts."""
    rng = np.random.default_rng(height * 1000 + width)
    waves = np.add.outer(np.sin(np.arange(height) / 9), np.cos(np.arange(width) / 7))
    values = 127 + 50 * waves[..., None] + rng.normal(0, 40, (height, width, channels))
    return np.clip(values, 0, 255).astype(np.uint8)


def _file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _exif_rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _file(Image.fromarray(_noise(70, 110)), "JPEG", exif=exif.tobytes(), quality=95)


def _palette(transparent: bool) -> bytes:
    image = Image.fromarray(_noise(90, 61)).quantize(32)
    return _file(image, **({"transparency": 3} if transparent else {}))


IMAGES: dict[str, Callable[[], bytes]] = {
    "one row": lambda: _file(Image.fromarray(_noise(1, 500))),
    "one column": lambda: _file(Image.fromarray(_noise(500, 1))),
    "one pixel": lambda: _file(Image.fromarray(_noise(1, 1))),
    "grey": lambda: _file(Image.fromarray(_noise(120, 75, 1)[..., 0])),
    "grey and alpha": lambda: _file(Image.fromarray(_noise(50, 33, 2), "LA")),
    "alpha": lambda: _file(Image.fromarray(_noise(77, 130, 4), "RGBA")),
    "palette": lambda: _palette(False),
    "palette, transparent": lambda: _palette(True),
    "black and white": lambda: _file(Image.fromarray(_noise(65, 64, 1)[..., 0]).convert("1")),
    "turned by EXIF": _exif_rotated,
    "CMYK": lambda: _file(Image.fromarray(_noise(40, 90)).convert("CMYK"), "JPEG", quality=95),
    "smaller": lambda: _file(Image.fromarray(_noise(20, 31))),
    "as large": lambda: _file(Image.fromarray(_noise(SIDE, SIDE))),
    "far larger": lambda: _file(Image.fromarray(_noise(700, 433))),
}
SETTINGS = {
    "Owlv2": PreprocessConfig(geometry="pad", resize="gaussian", pad_value=0.0),
    "OwlViT": PreprocessConfig(geometry="stretch", resize="bicubic", pad_value=0.0),
}


def _theirs(name: str, file: bytes) -> np.ndarray:
    processor = getattr(transformers, f"{name}ImageProcessorPil")(
        size={"height": SIDE, "width": SIDE}, do_normalize=False
    )
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))  # as their load_image does
    return processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("image", IMAGES)
def test_pixels_are_theirs(image: str, name: str) -> None:
    file = IMAGES[image]()
    ours = image_ops.to_square(image_ops.decode_image(file), SIDE, SETTINGS[name]) / 255
    theirs = _theirs(name, file)
    assert ours.shape == theirs.shape
    limit = 0.51 / 255 if name == "Owlv2" else 1e-6
    assert np.abs(ours - theirs).max() <= limit


def test_sixteen_bits_are_scaled_and_not_cut_off() -> None:
    grey = np.linspace(0, 65535, 40 * 50).reshape(40, 50).astype(np.uint16)
    file = _file(Image.fromarray(grey))
    ours = image_ops.to_square(image_ops.decode_image(file), SIDE, SETTINGS["OwlViT"]) / 255
    as_eight = _file(Image.fromarray(np.round(grey / 257).astype(np.uint8)))
    np.testing.assert_allclose(ours, _theirs("OwlViT", as_eight), atol=1e-6)
    # Theirs is white nearly everywhere.
    assert (_theirs("OwlViT", file) > 0.99).mean() > 0.9
