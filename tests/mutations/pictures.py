"""Small image files for data sets that are mutated."""

import functools
import io

import numpy as np
from PIL import Image


@functools.cache
def jpeg(width: int, height: int) -> bytes:
    return _encoded("JPEG", width, height)


@functools.cache
def png(width: int, height: int) -> bytes:
    return _encoded("PNG", width, height)


def _encoded(kind: str, width: int, height: int) -> bytes:
    pixels = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()
