"""Images as callers give them: one or many, files, bytes, Pillow images, arrays of any library.

What can only mean one thing is taken as meant; anything else is one `DataError` that says what is
there and what to give.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from data_pipelines import image_ops
from data_pipelines.image_ops import UnreadableImage
from owl_det import files
from owl_det.errors import DataError

# A file, its bytes, a Pillow image, or pixels: [h, w, 3], [h, w, 4] or [h, w], channels last or
# first, of any library whose arrays NumPy can read.
ImageLike: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
Images: TypeAlias = ImageLike | Iterable[ImageLike]  # one, many, or an array [b, h, w, 3]
Box: TypeAlias = Sequence[float] | Float32[np.ndarray, " 4"]  # x0, y0, x1, y1 in pixels

_EXPECTED = "give a path, bytes, a Pillow image or an array [h, w, 3], or a list of such"
_CHANNELS = (1, 3, 4)
_SLACK = 1e-3  # by which resampling leaves the range of pixels
_MAX_PATH = 1024  # characters; longer texts are no paths
_VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
_NO_IMAGES = {
    **dict.fromkeys(_VIDEOS, "is a video; give its frames as images"),
    ".pdf": "is a PDF; give its pages as images",
    ".svg": "is a drawing without pixels; give it as PNG",
    ".heic": "is HEIC, which is not read; give it as JPEG",
    ".npy": "is an array of NumPy; give np.load(…)",
}


def each(images: Any) -> Iterator[ImageLike]:
    """The images one by one; a single image is one of one. Iterators are read as they go.

    Raises `DataError`, at once, for what is neither an image nor a collection of images in order.
    """
    if _is_one(images):
        return iter([images])
    if isinstance(images, Mapping):
        raise DataError(f"images: a {_kind(images)}; give its images as a list, in order")
    if isinstance(images, Set):
        raise DataError(
            "images: a set has no order, and results come in that of the images; "
            "give sorted(…) of it"
        )
    if hasattr(images, "__array__"):
        return _each_of_array(_to_numpy(images, "images"))
    if images is None or not isinstance(images, Iterable) and not hasattr(images, "__getitem__"):
        raise DataError(f"images: got {_kind(images)}; {_EXPECTED}")
    return iter(images)


def read(image: Any, where: str = "image") -> Image.Image:
    """An upright RGB image of at least one pixel.

    Raises `UnreadableImage`, naming the file if it is one, where it is missing or damaged, and
    `DataError`, which begins with `where`, for what is no image at all.
    """
    if isinstance(image, (str, os.PathLike)):
        return _read_file(os.fspath(image))
    if isinstance(image, Image.Image):
        name = getattr(image, "filename", "") or where
        return _named(str(name), lambda: image_ops.upright_rgb(_not_empty(image)))
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _named(where, lambda: image_ops.decode_image(bytes(image)))
    if hasattr(image, "read"):
        return _named(str(getattr(image, "name", where)), lambda: _read_stream(image))
    if hasattr(image, "__array__"):
        return image_ops.upright_rgb(_from_array(_to_numpy(image, where), where))
    more = "; a list of rows? give np.array(…)" if isinstance(image, (list, tuple)) else ""
    raise DataError(f"{where}: got {_kind(image)}; {_EXPECTED}{more}")


def names(labels: Any, num_images: int, what: str) -> tuple[str, ...]:
    """What the caller calls the images; `image 0` … where there are no labels.

    Raises `DataError`, which begins with `what`, for a label that is no text.
    """
    if labels is None:
        return tuple(f"image {index}" for index in range(num_images))
    listed = list(labels) if hasattr(labels, "__iter__") else [labels]
    for index, name in enumerate(listed):
        if not isinstance(name, (str, os.PathLike)):
            raise DataError(f"{what}: names: {index}: {name!r} is no text")
    return tuple(str(name) for name in listed)


def _is_one(images: Any) -> bool:
    """True for what is one image and might be taken for a collection."""
    kinds = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)
    return isinstance(images, kinds) or hasattr(images, "read")


def _each_of_array(array: np.ndarray) -> Iterator[ImageLike]:
    if array.dtype.kind in "OUS" and array.ndim <= 1:  # of paths, or of images of many sizes
        return iter(array.reshape(-1).tolist())
    if array.ndim == 4:
        # Scaled together: one dark frame of a batch in [0, 255] may have no pixel above 1.
        return iter(list(_to_uint8(array, "images")))
    if array.ndim == 3 and not {array.shape[0], array.shape[2]} & {*_CHANNELS}:
        raise DataError(
            f"images: an array of {list(array.shape)} may be many grey images or none; "
            "give a batch as [b, h, w, 3], or a list"
        )
    return iter([array])


def _to_numpy(array: Any, where: str) -> np.ndarray:
    try:
        return np.asarray(array)
    except Exception as error:  # what a library says of tensors on a device or with a gradient
        reason = " ".join(str(error).split())
        raise DataError(f"{where}: {_kind(array)} gives no NumPy array ({reason})") from None


def _from_array(array: np.ndarray, where: str) -> Image.Image:
    if array.size == 0 and array.dtype.kind != "O":
        raise DataError(f"{where}: an array of {list(array.shape)} has no pixels")
    pixels = _channels_last(_to_uint8(array, where), where)
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    return Image.fromarray(np.ascontiguousarray(pixels))


def _channels_last(array: np.ndarray, where: str) -> np.ndarray:
    """[h, w, c] of an array [h, w], [h, w, c] or [c, h, w]."""
    if array.ndim == 2:
        return array[:, :, None]
    if array.ndim == 3:
        first, last = array.shape[0] in _CHANNELS, array.shape[2] in _CHANNELS
        if last and (array.shape[2] == 3 or not first):
            return array
        if first and not last:
            return np.moveaxis(array, 0, 2)
    raise DataError(
        f"{where}: an array of {list(array.shape)} is no image; give [h, w, 3], [3, h, w], "
        "[h, w, 4] or [h, w]"
    )


def _to_uint8(array: np.ndarray, where: str) -> UInt8[np.ndarray, "..."]:
    """Pixels of 8 bits; the range of the values says what they are."""
    kind = array.dtype.kind
    if array.dtype == np.uint8 or array.size == 0 and kind in "biuf":
        return array.astype(np.uint8)
    if kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if kind not in "iuf" and array.dtype.name != "bfloat16":
        raise DataError(f"{where}: an array of {array.dtype} holds no pixels; give uint8")
    values = array.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise DataError(f"{where}: holds NaN or infinite pixels")
    if low < -_SLACK or high > 65535:
        raise DataError(
            f"{where}: {array.dtype} values from {low:g} to {high:g} are no pixels; give values in "
            "[0, 255], or floats in [0, 1], before any normalisation"
        )
    if kind in "iu" and array.dtype.itemsize == 2 and high > 255:
        scale = 1 / 257  # 16 bits, as in a PNG
    elif kind not in "iu" and high <= 1 + _SLACK:
        scale = 255.0
    elif high <= 255 + _SLACK and not (array.dtype == np.uint16 and high > 0):
        scale = 1.0
    else:
        raise DataError(
            f"{where}: {array.dtype} values up to {high:g} may be pixels of 8 bits or of more; "
            "give uint8, uint16 with values above 255, or floats in [0, 1]"
        )
    return np.round(np.clip(values * scale, 0, 255)).astype(np.uint8)


def _read_file(text: str | bytes) -> Image.Image:
    path = text.decode(errors="surrogateescape") if isinstance(text, bytes) else text
    if not path.strip() or len(path) > _MAX_PATH or "\0" in path:
        shown = f"a text of {len(path)} characters" if len(path) > _MAX_PATH else repr(path)
        raise UnreadableImage(f"{shown} is no path; give a file, or an image's bytes")
    if files.is_address(path):
        raise UnreadableImage(f"{path}: is an address; download it and give the file")
    file = Path(path)
    if not file.exists() and path.startswith("~"):
        file = Path(os.path.expanduser(path))
    if file.is_dir():
        raise UnreadableImage(f"{file}: is a folder; give its files")
    return _named(str(file), lambda: _decode(file))


def _decode(file: Path) -> Image.Image:
    try:
        content = files.read_bytes(file)
    except FileNotFoundError:
        hint = files.did_you_mean(file)
        if not hint and set(file.name) & {*"*?["}:
            hint = "; a pattern? give sorted(glob.glob(…))"
        raise UnreadableImage(f"no such file{hint}") from None
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from None
    if not content:
        raise UnreadableImage("the file is empty")
    try:
        return image_ops.decode_image(content)
    except UnreadableImage:
        if kind := _NO_IMAGES.get(file.suffix.lower()):
            raise UnreadableImage(kind) from None
        raise


def _read_stream(stream: Any) -> Image.Image:
    content = stream.read()
    if not isinstance(content, bytes):
        raise UnreadableImage("the stream gives no bytes; open the file with mode 'rb'")
    return image_ops.decode_image(content)


def _not_empty(image: Image.Image) -> Image.Image:
    if not image.width * image.height:
        raise UnreadableImage(f"image of {image.width} x {image.height} pixels")
    return image


def _named(name: str, decode: Any) -> Image.Image:
    """Puts the image's name before the message of an error."""
    try:
        return decode()
    except (UnreadableImage, OSError) as error:
        raise UnreadableImage(f"{name}: {error}") from None


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__
