"""From encoded images to the model's square, and boxes between the two. No JAX, no TensorFlow.

Training, evaluation and prediction all go through this file, so there is one place where pixels
and boxes can disagree. With the geometry "pad" an image of height h and width w is resized so that
its longer side is the side of the square and lies in the square's top left corner; a box in pixels
is divided by max(h, w) on both axes to become relative to the square. With "stretch" the image
fills the square, and boxes are divided by w and h.
"""

import io
import math
import struct
import zlib
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import numpy as np
from absl import logging
from jaxtyping import Float, Float32, Int32, UInt8
from PIL import ExifTags, Image, JpegImagePlugin, UnidentifiedImageError

from owl_det.config import PreprocessConfig
from owl_det.errors import one_line

Geometry: TypeAlias = Literal["pad", "stretch"]  # see `config.PreprocessConfig`

UNREADABLE_SHARE = 0.01  # of a data set; see `is_tolerable`
MAX_MISSING = 0.1  # of the rows of a JPEG that ends early; see `decode_image`
MAX_PIXELS = 200_000_000  # Pillow itself refuses a little earlier, at 179 million by default

_KERNELS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_TRANSPOSE = {  # EXIF orientation → what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = (5, 6, 7, 8)
_END_OF_JPEG = b"\xff\xd9"
_NO_COEFFICIENTS = (127, 128)  # what libjpeg shows where it has no data; 127: inverted inks
_EARLY = "ends early"  # key of Pillow's `info`
# Files come from anywhere: Pillow's other readers are rare, some fail in ways of their own, and
# that of EPS starts Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
Image.init()
_FORMATS = tuple(name for name in _FORMATS if name in Image.OPEN)  # older Pillows lack the last
# What Pillow's decoders raise on damaged files.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


# Files that end early and were read since `take_early_ends` was last called.
_early_ends: set[int] = set()


def is_tolerable(num_unreadable: int, num_images: int) -> bool:
    """One image, or 1 % of them, may be unreadable; more is an error."""
    return num_unreadable <= max(1, UNREADABLE_SHARE * num_images)


class UnreadableImage(ValueError):
    """An image that is missing, damaged, absurdly large or of a kind that has no 8-bit meaning."""

    def __str__(self) -> str:
        return one_line(super().__str__())


def open_image(image: bytes | np.ndarray) -> Image.Image:
    """The image, of which so far only a file's header is read; `image` is a file or its pixels.

    Raises as `decode_image`.
    """
    if isinstance(image, np.ndarray):
        _check_pixels(image)
        return Image.fromarray(image)
    try:
        opened = Image.open(io.BytesIO(image), formats=_FORMATS)
    except UnidentifiedImageError as error:  # its text names a memory address
        raise UnreadableImage("not an image of a known format") from error
    except _DAMAGED as error:
        raise UnreadableImage(f"damaged image: {error}") from error
    width, height = opened.size
    if width * height > MAX_PIXELS or width * height == 0:
        raise UnreadableImage(f"image of {width} x {height} pixels; the limit is {MAX_PIXELS}")
    # The file is in memory: decoded in one go instead of 64 KiB at a time, each copied.
    opened.decodermaxblock = max(opened.decodermaxblock, len(image))
    return opened


def upright_size(opened: Image.Image) -> tuple[int, int]:
    """Height and width in pixels, EXIF orientation applied; nothing is decoded."""
    width, height = opened.size
    return (width, height) if _orientation(opened) in _SWAPS_SIDES else (height, width)


def image_size(image: bytes | np.ndarray) -> tuple[int, int]:
    """`upright_size` of a file or array. Raises `UnreadableImage`."""
    return upright_size(open_image(image))


def decode_image(image: bytes | np.ndarray) -> Image.Image:
    """An upright RGB image.

    EXIF orientation is applied. Transparent pixels are laid over white; 16-bit grey is scaled to
    8 bits; of an animation the first frame is taken. A JPEG that lacks its last bytes is read as
    far as it goes, as browsers and OpenCV do; `ends_early` tells.

    Raises `UnreadableImage` if the file is damaged or truncated (a JPEG: by more than
    `MAX_MISSING` of its rows, or by a whole scan), has more than `MAX_PIXELS` pixels (found out
    before they are decoded), or has floating-point pixels; or if an array is not uint8 [h, w, 3].
    """
    return upright_rgb(open_image(image))


def ends_early(decoded: Image.Image) -> bool:
    """True for a decoded image whose file lacks its last bytes."""
    return bool(decoded.info.get(_EARLY))


def take_early_ends() -> int:
    """How many different files this process read that end early, since this was last called."""
    count = len(_early_ends)
    _early_ends.clear()
    return count


def decode_draft(opened: Image.Image, draft_size: tuple[int, int]) -> Image.Image:
    """As `decode_image`, of an image that `open_image` opened, perhaps smaller.

    libjpeg decodes a JPEG at 1/2, 1/4 or 1/8 of its size, but never below `draft_size` (width,
    height of the upright image); `draft_scale` tells which it was. Raises `UnreadableImage`.
    """
    width, height = draft_size
    is_sideways = _orientation(opened) in _SWAPS_SIDES
    try:
        opened.draft(None, (height, width) if is_sideways else (width, height))
    except _DAMAGED as error:
        raise UnreadableImage(f"damaged image: {error}") from error
    return upright_rgb(opened)


def upright_rgb(opened: Image.Image) -> Image.Image:
    """As `decode_image`, of an image that Pillow has opened already. Raises `UnreadableImage`."""
    orientation = _orientation(opened)
    try:
        is_early = _load(opened)
        decoded = _to_rgb(opened)
    except UnreadableImage:
        raise
    except _DAMAGED as error:
        raise UnreadableImage(f"damaged image: {error}") from error
    if orientation in _TRANSPOSE:
        decoded = decoded.transpose(_TRANSPOSE[orientation])
    if is_early:
        decoded.info[_EARLY] = True
    return decoded


def decode_segment_ids(image: bytes, size: tuple[int, int]) -> Int32[np.ndarray, "h w"]:
    """Segment ids of a panoptic PNG: R + 256 G + 256² B of each pixel; 0 is unlabelled.

    Raises `UnreadableImage` if it is damaged, anything but RGB of 8 bits, or not of `size` (height,
    width), which is found out before pixels are decoded.
    """
    opened = open_image(image)
    if opened.size != (size[1], size[0]):
        raise UnreadableImage(
            f"expected {size[1]} x {size[0]} pixels, as the image has; got {opened.size[0]} x "
            f"{opened.size[1]}"
        )
    if (opened.format, opened.mode) != ("PNG", "RGB"):
        raise UnreadableImage(
            f"expected a PNG of RGB pixels, got {opened.format} of {opened.mode} pixels"
        )
    try:
        rgb = np.asarray(opened, np.int32)
    except _DAMAGED as error:
        raise UnreadableImage(f"damaged image: {error}") from error
    return rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]


def draft_scale(full_size: tuple[int, int], decoded: Image.Image) -> int:
    """By how much `decode_draft` shrank an image of `full_size` (height, width): 1, 2, 4 or 8.

    A pixel of the decoded image spans exactly so many pixels of the file; its size is rounded up.
    Raises `ValueError` if `decoded` cannot come from an image of that size.
    """
    for scale in (1, 2, 4, 8):
        if decoded.size == (math.ceil(full_size[1] / scale), math.ceil(full_size[0] / scale)):
            return scale
    raise ValueError(f"{decoded.size} is no draft of an image of (height, width) {full_size}")


def fit_size(height: float, width: float, side: int, geometry: Geometry) -> tuple[int, int]:
    """Height and width of an image once it lies in a square of `side`; each at least 1 pixel.

    "pad": the longer side becomes `side`. "stretch": both do.
    """
    if geometry == "stretch":
        return side, side
    scale = side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def extent(height: int, width: int, geometry: Geometry) -> tuple[int, int]:
    """Width and height, in pixels of the image, of what the square shows."""
    longer = max(height, width)
    return (width, height) if geometry == "stretch" else (longer, longer)


def resize_crop(
    image: Image.Image,
    size: tuple[int, int],
    *,
    resize: Literal["bilinear", "bicubic"],
    crop: tuple[float, float, float, float] | None = None,
    flip: bool = False,
) -> UInt8[np.ndarray, "h w 3"]:
    """Resizes `crop` (xyxy in pixels, fractions allowed; None = all) to `size` (height, width).

    Crop and resize are one antialiased resampling. `flip` mirrors the result left to right.
    """
    height, width = size
    resized = np.asarray(image.resize((width, height), _KERNELS[resize], box=crop))
    return resized[:, ::-1] if flip else resized


def gaussian_zoom(pixels: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "s s 3"]:
    """Resizes both sides to `side`: a Gaussian filter of σ = (factor - 1) / 2 pixels on each axis
    that shrinks by `factor`, then linear interpolation between pixel centres; edges are mirrored.

    What scikit-image's `resize` does with antialiasing, and the authors' notebook with it.
    """
    # A second of import that no other kernel needs.
    from scipy import ndimage

    factors = np.array([pixels.shape[0] / side, pixels.shape[1] / side, 1.0])
    sigma = np.maximum(0, (factors - 1) / 2)
    smooth = ndimage.gaussian_filter(pixels.astype(np.float32), sigma, mode="mirror")
    zoomed: Any = ndimage.zoom(smooth, 1 / factors, order=1, mode="mirror", grid_mode=True)
    return np.round(np.clip(zoomed, 0, 255)).astype(np.uint8)


def place(
    image: Image.Image,
    side: int,
    preprocess: PreprocessConfig,
    *,
    crop: tuple[float, float, float, float] | None = None,
    flip: bool = False,
) -> UInt8[np.ndarray, "h w 3"]:
    """The top left part of a square of `side` pixels that shows an image, or a crop of it.

    It has the size that `fit_size` gives, or is the whole square where padding comes before
    resizing ("gaussian"). `crop` and `flip` as in `resize_crop`, but "gaussian" takes whole pixels.
    Raises `UnreadableImage` if the padding itself would exceed `MAX_PIXELS`.
    """
    x0, y0, x1, y1 = crop if crop is not None else (0, 0, *image.size)
    if preprocess.resize != "gaussian":
        # Of fractions: a crop of a shrunken JPEG need not lie on its pixels.
        size = fit_size(y1 - y0, x1 - x0, side, preprocess.geometry)
        return resize_crop(image, size, resize=preprocess.resize, crop=crop, flip=flip)
    pixels = np.asarray(image)[round(y0) : round(y1), round(x0) : round(x1)]
    pixels = pixels[:, ::-1] if flip else pixels
    if preprocess.geometry == "pad":
        pixels = _padded(pixels, preprocess.pad_value)
    return gaussian_zoom(pixels, side)


def to_square(
    image: Image.Image, side: int, preprocess: PreprocessConfig
) -> UInt8[np.ndarray, "side side 3"]:
    """An image as the model takes it: see `place`; the rest of the square is padding.

    Raises `UnreadableImage` as `place` does.
    """
    square = padding(side, preprocess.pad_value)
    placed = place(image, side, preprocess)
    square[: placed.shape[0], : placed.shape[1]] = placed
    return square


def padding(side: int, pad_value: float) -> UInt8[np.ndarray, "side side 3"]:
    """A square of padding only; `pad_value` is of the [0, 1] image."""
    return np.full((side, side, 3), round(pad_value * 255), np.uint8)


def boxes_to_padded(
    boxes_xyxy: Float[np.ndarray, "*b 4"], height: int, width: int, geometry: Geometry
) -> Float32[np.ndarray, "*b 4"]:
    """Pixel corners in an image of `height` and `width` → cxcywh relative to its square."""
    corners = np.asarray(boxes_xyxy, np.float64) / (extent(height, width, geometry) * 2)
    low, high = corners[..., :2], corners[..., 2:]
    return np.concatenate([(low + high) / 2, high - low], axis=-1).astype(np.float32)


def boxes_from_padded(
    boxes_cxcywh: Float[np.ndarray, "*b 4"], height: int, width: int, geometry: Geometry
) -> Float32[np.ndarray, "*b 4"]:
    """Inverse of `boxes_to_padded`: pixel corners, clipped to the image."""
    boxes = np.asarray(boxes_cxcywh, np.float64) * (extent(height, width, geometry) * 2)
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    corners = np.concatenate([centre - half, centre + half], axis=-1)
    return np.clip(corners, 0, [width, height, width, height]).astype(np.float32)


def _padded(pixels: UInt8[np.ndarray, "h w 3"], pad_value: float) -> UInt8[np.ndarray, "s s 3"]:
    height, width = pixels.shape[:2]
    longer = max(height, width)
    if longer**2 > MAX_PIXELS:
        raise UnreadableImage(
            f"image of {width} x {height} pixels: padded to a square it exceeds {MAX_PIXELS} pixels"
        )
    square = padding(longer, pad_value)
    square[:height, :width] = pixels
    return square


def _check_pixels(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise UnreadableImage(
            f"image array: expected uint8 [h, w, 3], got {image.dtype} {list(image.shape)}"
        )


def _orientation(opened: Image.Image) -> int:
    if opened.format == "TIFF":
        return 1  # Pillow turns these itself
    try:
        return opened.getexif().get(ExifTags.Base.Orientation, 1)
    except _DAMAGED:
        # A broken EXIF block is common on the web and says nothing about the pixels; viewers
        # show such images as they are stored.
        return 1


def _load(opened: Image.Image) -> bool:
    """Decodes the pixels. True if it is a JPEG that ends early, read as far as it goes."""
    try:
        opened.load()
    except OSError as error:
        is_jpeg = isinstance(opened, JpegImagePlugin.JpegImageFile)
        if not is_jpeg or opened.fp is None or "truncated" not in str(error):
            raise
    else:
        return False
    opened.fp.seek(0)
    content = opened.fp.read()
    if not _has_all_scans(content):
        raise UnreadableImage("damaged image: the file ends before its last scan")
    # libjpeg then fills what is missing. Pillow's own switch for this is one of the whole process.
    whole = io.BytesIO(content + _END_OF_JPEG)
    opened.fp = opened._fp = whole  # pyright: ignore[reportAttributeAccessIssue]  # of MPO: _fp
    opened.load()
    missing = _missing_rows(opened) / opened.height
    if missing > MAX_MISSING:
        raise UnreadableImage(f"damaged image: the file ends early, {missing:.0%} of it is missing")
    logging.log_first_n(logging.INFO, "An image ends early and is read as far as it goes", 5)
    _early_ends.add(hash(content))
    return True


def _missing_rows(opened: Image.Image) -> int:
    """Rows at the bottom that libjpeg had no data for: each of its pixels is medium grey."""
    is_grey = np.isin(np.asarray(opened), _NO_COEFFICIENTS)
    shown = np.flatnonzero(~is_grey.reshape(opened.height, -1).all(axis=1))
    return opened.height - 1 - int(shown[-1]) if len(shown) else opened.height


def _has_all_scans(content: bytes) -> bool:
    """True if each coefficient of a JPEG's components is in a scan, to its last bit.

    A progressive file that ends before its last scan shows the whole picture, but blurred.
    """
    missing: dict[int, set[int]] = {}  # coefficients of each component
    for marker, segment in _jpeg_segments(content):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # the frame
            missing = {component: set(range(64)) for component in segment[6::3]}
        count = segment[0] if segment else 0
        # Only a scan that gives the last bits completes anything.
        if marker == 0xDA and len(segment) == 4 + 2 * count and not segment[-1] & 0x0F:
            coefficients = range(segment[-3], segment[-2] + 1)
            for component in segment[1 : 1 + 2 * count : 2]:
                missing.get(component, set()).difference_update(coefficients)
    return bool(missing) and not any(missing.values())


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, bytes]]:
    """The markers of a JPEG that have a length, each with what follows it."""
    place = 2
    while (place := content.find(b"\xff", place)) >= 0:
        marker = content[place + 1] if place + 1 < len(content) else 0
        if marker == 0xFF:
            place += 1
        elif marker in (0x00, 0x01, *range(0xD0, 0xDA)):  # data, or without a length
            place += 2
        else:
            size = int.from_bytes(content[place + 2 : place + 4], "big")
            yield marker, content[place + 4 : place + 2 + size]
            place += 2 + max(size, 2)


def _to_rgb(opened: Image.Image) -> Image.Image:
    if opened.mode == "F":
        raise UnreadableImage("floating-point pixels have no defined range; store 8 or 16 bits")
    if opened.mode.startswith("I"):  # 16-bit grey, which older files and TIFF widen to 32
        grey = np.clip(np.asarray(opened, np.float64), 0, 65535) / 257
        return Image.fromarray(np.round(grey).astype(np.uint8)).convert("RGB")
    if opened.has_transparency_data:
        over = opened.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    if opened.mode == "RGB":
        opened.load()  # Pillow's convert would copy the pixels
        return opened
    return opened.convert("RGB")
