"""Pictures of token embeddings: their clusters, and heat maps of their likeness to a text."""

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw

from owl_det.viz import fonts
from owl_det.viz.pictures import titled

_SIDE = 384  # pixels; smaller images are enlarged to that, by a whole factor
_LARGEST = 784  # two of them fit into a sheet
_FAINT, _STRONG = 0.1, 0.9  # opacity of the lowest and of the highest value


def show(image: UInt8[np.ndarray, "h w 3"], title: str) -> UInt8[np.ndarray, "H W 3"]:
    """The image itself at the size of the other pictures, titled."""
    return titled(np.asarray(_sized(Image.fromarray(image))), title)


def draw_clusters(
    image: UInt8[np.ndarray, "h w 3"],
    labels: Int[np.ndarray, "r c"],
    extent: tuple[float, float],
    num_clusters: int,
) -> UInt8[np.ndarray, "H W 3"]:
    """An image under a token grid, each token in the colour of its cluster, of so many in all.

    `extent` is the height and width of the grid in pixels of `image`, which it may exceed.
    """
    import matplotlib

    hues = matplotlib.colormaps["hsv"](np.arange(num_clusters) / num_clusters)
    colours = np.round(hues[labels][..., :3] * 255).astype(np.uint8)
    opacity = np.full(labels.shape, 0.6)
    return _overlaid(image, colours, opacity, extent, Image.Resampling.NEAREST)


def draw_heat(
    image: UInt8[np.ndarray, "h w 3"],
    values: Float[np.ndarray, "r c"],
    extent: tuple[float, float],
    title: str,
) -> UInt8[np.ndarray, "H W 3"]:
    """An image under a heat map of a token grid, above a bar from the lowest value to the highest.

    Where values are low the image shows through. `extent` as in `draw_clusters`.
    """
    low, high = float(values.min()), float(values.max())
    share = (values - low) / max(high - low, 1e-12)
    opacity = _FAINT + (_STRONG - _FAINT) * share**2  # ordinary values leave the image clear
    picture = _overlaid(image, _heat(share), opacity, extent, Image.Resampling.BILINEAR)
    return np.concatenate([titled(picture, title), _bar(picture.shape[1], low, high)])


def _heat(share: Float[np.ndarray, "r c"]) -> UInt8[np.ndarray, "r c 3"]:
    import matplotlib

    # Without the darkest fifth, which makes an image muddy and says nothing.
    return np.round(matplotlib.colormaps["inferno"](0.2 + 0.8 * share)[..., :3] * 255).astype(
        np.uint8
    )


def _bar(width: int, low: float, high: float) -> UInt8[np.ndarray, "h w 3"]:
    size = 14
    canvas = Image.new("RGB", (width, 24), "white")
    draw, font = ImageDraw.Draw(canvas), fonts.plain(size)
    left, right = f"{low:.2f}", f"{high:.2f}"
    start = round(font.getlength(left)) + 8
    end = width - round(font.getlength(right)) - 8
    if end > start:
        ramp = np.broadcast_to(_heat(np.linspace(0, 1, end - start)[None]), (12, end - start, 3))
        canvas.paste(Image.fromarray(np.ascontiguousarray(ramp)), (start, 6))
    draw.text((0, 12), left, "black", font, anchor="lm")
    draw.text((width, 12), right, "black", font, anchor="rm")
    return np.array(canvas)


def _sized(image: Image.Image) -> Image.Image:
    longest = max(image.size)
    if longest > _LARGEST:
        factor = _LARGEST / longest
        kernel = Image.Resampling.LANCZOS
    else:
        factor = max(1, -(-_SIDE // longest))
        kernel = Image.Resampling.NEAREST
    width, height = (max(1, round(factor * x)) for x in image.size)
    return image.resize((width, height), kernel)


def _overlaid(
    image: UInt8[np.ndarray, "h w 3"],
    colours: UInt8[np.ndarray, "r c 3"],
    opacity: Float[np.ndarray, "r c"],
    extent: tuple[float, float],
    kernel: Image.Resampling,
) -> UInt8[np.ndarray, "H W 3"]:
    # In grey, so that every colour is the map's.
    below = _sized(Image.fromarray(image)).convert("L").convert("RGB")
    rows, columns = colours.shape[:2]
    # The part of the grid that the image covers: all of it, where sizes were rounded down.
    across, down = image.shape[1] / extent[1], image.shape[0] / extent[0]
    box = (0, 0, columns * min(1.0, across), rows * min(1.0, down))
    above = Image.fromarray(colours).resize(below.size, kernel, box=box)
    mask = Image.fromarray(np.round(255 * opacity).astype(np.uint8))
    mask = mask.resize(below.size, kernel, box=box)
    return np.asarray(Image.composite(above, below, mask))
