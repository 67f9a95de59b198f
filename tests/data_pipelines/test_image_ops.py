import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines import image_ops
from data_pipelines.image_ops import UnreadableImage
from owl_det.config import PreprocessConfig


def encode(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def forged_png(width: int, height: int) -> bytes:
    """A header that promises more pixels than the file has."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(header))
    start_of_data = struct.pack(">I", 100) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + checksum + start_of_data


# --- decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    upright = Image.fromarray(noise(4, 7))
    undo = image_ops._TRANSPOSE.get(orientation)
    quarter = {Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270}
    redo = (quarter - {undo}).pop() if undo in quarter else undo
    stored = upright if redo is None else upright.transpose(redo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encode(stored, exif=exif)
    assert image_ops.image_size(file) == (4, 7)
    np.testing.assert_array_equal(np.asarray(image_ops.decode_image(file)), np.asarray(upright))


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_tiff_is_turned_once(orientation):
    upright = Image.fromarray(noise(4, 7))
    undo = image_ops._TRANSPOSE.get(orientation)
    redo = {Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90}.get(undo, undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encode(upright if redo is None else upright.transpose(redo), "TIFF", exif=exif)
    assert image_ops.image_size(file) == (4, 7)
    np.testing.assert_array_equal(np.asarray(image_ops.decode_image(file)), np.asarray(upright))


def test_a_broken_exif_block_does_not_cost_the_image():
    file = encode(Image.fromarray(noise(4, 7)), exif=b"Exif\0\0XX*\0garbage")
    np.testing.assert_array_equal(np.asarray(image_ops.decode_image(file)), noise(4, 7))


@pytest.mark.parametrize(
    ("image", "pixel"),
    [
        (Image.new("L", (2, 2), 77), (77, 77, 77)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.fromarray(np.full((2, 2), 65535, np.uint16)), (255, 255, 255)),
        (Image.fromarray(np.full((2, 2), 257 * 9 + 100, np.uint16)), (9, 9, 9)),
        (Image.new("RGBA", (2, 2), (9, 8, 7, 255)), (9, 8, 7)),
        (Image.new("RGBA", (2, 2), (9, 8, 7, 0)), (255, 255, 255)),
        (Image.new("LA", (2, 2), (50, 255)), (50, 50, 50)),
        (Image.new("RGB", (2, 2), (1, 2, 3)).quantize(4), (1, 2, 3)),
    ],
    ids=["grey", "bilevel", "white16", "grey16", "opaque", "transparent", "grey_alpha", "palette"],
)
def test_every_mode_becomes_rgb(image, pixel):
    decoded = image_ops.decode_image(encode(image))
    assert decoded.mode == "RGB"
    assert decoded.getpixel((1, 1)) == pixel


def test_transparent_palette_is_laid_over_white():
    image = Image.new("P", (2, 2), 0)
    image.putpalette([10, 20, 30])
    file = encode(image, transparency=0)
    assert image_ops.decode_image(file).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_tiff_in_either_byte_order():
    grey = np.array([[0, 257 * 40]], np.uint16)
    for order in ("<u2", ">u2"):
        file = encode(Image.fromarray(grey.astype(order)), "TIFF")
        assert image_ops.decode_image(file).getpixel((1, 0)) == (40, 40, 40)


def test_arrays_pass_through():
    np.testing.assert_array_equal(np.asarray(image_ops.decode_image(noise(3, 5))), noise(3, 5))
    assert image_ops.image_size(noise(3, 5)) == (3, 5)


@pytest.mark.parametrize(
    "image",
    [
        b"",
        b"no image at all",
        encode(Image.fromarray(noise(40, 40)), "JPEG")[:-400],
        encode(Image.fromarray(noise(40, 40)))[:2000],
        encode(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"),
        forged_png(30_000, 30_000),
        encode(Image.fromarray(noise(4, 4)), "EPS"),
        encode(Image.fromarray(noise(4, 4)), "DDS"),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids="empty text cut_jpeg cut_png float huge eps dds grey dtype no_pixels".split(),
)
def test_unreadable(image):
    with pytest.raises(UnreadableImage):
        image_ops.decode_image(image)


def test_a_message_is_one_line():
    assert str(UnreadableImage("a\nb.png: gone")) == "a b.png: gone"


def test_size_is_checked_before_decoding():
    with pytest.raises(UnreadableImage, match="exceeds limit"):
        image_ops.image_size(forged_png(30_000, 30_000))


def test_size_limit_holds_where_pillow_has_none(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(UnreadableImage, match="20000 x 10001"):
        image_ops.image_size(forged_png(20_000, 10_001))
    assert image_ops.image_size(forged_png(20_000, 10_000)) == (10_000, 20_000)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of some of the damage
@settings(max_examples=150, deadline=None)
@given(
    file_format=st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"]),
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damaged_files_raise_nothing_else(file_format, damage):
    file = bytearray(encode(Image.fromarray(noise(9, 11)), file_format))
    for place, value in damage:
        file[int(place * (len(file) - 1))] = value
    try:
        assert image_ops.decode_image(bytes(file)).mode == "RGB"
    except UnreadableImage as error:
        assert str(error)


@pytest.mark.parametrize(
    ("draft_size", "scale"), [((800, 600), 1), ((402, 300), 1), ((400, 300), 2), ((100, 70), 8)]
)
def test_draft_is_never_smaller_than_asked(draft_size, scale):
    file = encode(Image.fromarray(noise(601, 803)), "JPEG")
    decoded = image_ops.decode_draft(image_ops.open_image(file), draft_size)
    assert decoded.width >= draft_size[0] and decoded.height >= draft_size[1]
    assert image_ops.draft_scale((601, 803), decoded) == scale


def test_draft_size_is_of_the_upright_image():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    file = encode(Image.fromarray(noise(400, 800)), "JPEG", exif=exif)
    decoded = image_ops.decode_draft(image_ops.open_image(file), (100, 800))
    assert decoded.size == (400, 800)  # (200, 100) would do for the stored image's sides
    assert image_ops.decode_draft(image_ops.open_image(file), (100, 200)).size == (100, 200)


def test_draft_scale_rejects_another_image():
    with pytest.raises(ValueError, match="no draft"):
        image_ops.draft_scale((100, 100), Image.new("RGB", (33, 33)))


# --- resizing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((480, 640), 768, (576, 768)),
        ((640, 480), 64, (64, 48)),
        ((1, 1000), 64, (1, 64)),
        ((5, 5), 7, (7, 7)),
    ],
)
def test_fit_size(size, side, expected):
    assert image_ops.fit_size(*size, side, "pad") == expected
    assert image_ops.fit_size(*size, side, "stretch") == (side, side)


def test_padding_is_at_the_bottom_and_right():
    white = Image.new("RGB", (40, 20), "white")
    square = image_ops.to_square(white, 10, PreprocessConfig(resize="bilinear", pad_value=0.5))
    assert square.shape == (10, 10, 3) and square.dtype == np.uint8
    assert (square[:5] == 255).all()
    assert (square[5:] == 128).all()
    square = image_ops.to_square(
        white.transpose(Image.Transpose.ROTATE_90),
        10,
        PreprocessConfig(resize="bicubic", pad_value=0.0),
    )
    assert (square[:, :5] == 255).all()
    assert (square[:, 5:] == 0).all()


def test_resize_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = image_ops.resize_crop(Image.fromarray(stripes), (8, 8), resize="bilinear")
    assert np.ptp(small) < 12 and abs(small.mean() - 127.5) < 1


def test_crop_is_cut_before_resizing():
    image = Image.fromarray(noise(20, 30))
    for resize in ("bilinear", "bicubic", "gaussian"):
        cropped = image_ops.place(image, 10, PreprocessConfig(resize=resize), crop=(5, 2, 15, 12))
        np.testing.assert_array_equal(cropped, noise(20, 30)[2:12, 5:15])


def test_stretched_images_fill_the_square():
    image = Image.fromarray(noise(20, 30))
    square = image_ops.to_square(image, 10, PreprocessConfig(geometry="stretch"))
    expected = np.asarray(image.resize((10, 10), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(square, expected)


@pytest.mark.parametrize("geometry", ["pad", "stretch"])
@pytest.mark.parametrize("size", [(70, 100), (40, 12), (1, 50), (50, 1), (3, 3)])
def test_gaussian_zoom_is_a_smooth_resize(size, geometry):
    # A linear ramp stays the ramp it is, whatever is done to it, away from edges and padding.
    ramp = np.broadcast_to(np.linspace(20, 220, size[1])[None, :, None], (*size, 3))
    image = Image.fromarray(np.round(ramp).astype(np.uint8))
    gaussian = PreprocessConfig(resize="gaussian", geometry=geometry, pad_value=0)
    square = image_ops.to_square(image, 32, gaussian).astype(int)
    assert square.shape == (32, 32, 3)
    height, width = image_ops.fit_size(*size, 32, geometry)
    factor = image_ops.extent(*size, geometry)[0] / 32
    columns = np.arange(3, width - 4)
    place = (columns + 0.5) * factor - 0.5  # in pixels of the image, of its pixels' centres
    is_inside = (place >= 0) & (place <= size[1] - 1)
    columns, place = columns[is_inside], place[is_inside]
    expected = 20 + 200 * place / max(size[1] - 1, 1)
    difference = square[1 : max(height - 3, 1), columns] - expected[None, :, None]
    assert np.abs(difference).max(initial=0) <= 2
    np.testing.assert_array_equal(square[min(height + 3, 32) :], 0)


def test_padding_cannot_exhaust_the_memory():
    long = Image.new("RGB", (40_000, 1))
    with pytest.raises(image_ops.UnreadableImage, match="padded to a square it exceeds"):
        image_ops.to_square(long, 32, PreprocessConfig(resize="gaussian"))


def test_flip_twice_is_the_identity():
    image = Image.fromarray(noise(20, 31))
    once = image_ops.resize_crop(image, (20, 31), resize="bilinear", flip=True)
    np.testing.assert_array_equal(once, noise(20, 31)[:, ::-1])
    twice = image_ops.resize_crop(
        Image.fromarray(np.ascontiguousarray(once)), (20, 31), resize="bilinear", flip=True
    )
    np.testing.assert_array_equal(twice, noise(20, 31))


# --- boxes ---------------------------------------------------------------------------------------


def test_boxes_scale_by_the_longer_side():
    box = np.array([[10, 20, 30, 60]], np.float32)
    expected = [[0.1, 0.2, 0.1, 0.2]]
    for size in ((100, 200), (200, 100)):
        padded = image_ops.boxes_to_padded(box, *size, "pad")
        np.testing.assert_allclose(padded, expected, rtol=1e-6)


def test_boxes_of_stretched_images_scale_by_each_side():
    box = np.array([[10, 20, 30, 60]], np.float32)
    padded = image_ops.boxes_to_padded(box, 100, 200, "stretch")
    np.testing.assert_allclose(padded, [[0.1, 0.4, 0.1, 0.4]], rtol=1e-6)


@given(
    geometry=st.sampled_from(["pad", "stretch"]),
    height=st.integers(1, 8000),
    width=st.integers(1, 8000),
    corners=st.lists(
        st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), max_size=4
    ),
)
def test_boxes_survive_the_round_trip(geometry, height, width, corners):
    relative = np.array(corners).reshape(-1, 2, 2)
    pixels = np.sort(relative, axis=1).reshape(-1, 4) * [width, height, width, height]
    padded = image_ops.boxes_to_padded(pixels, height, width, geometry)
    assert padded.dtype == np.float32
    back = image_ops.boxes_from_padded(padded, height, width, geometry)
    np.testing.assert_allclose(back, pixels, atol=2e-3)


def test_boxes_from_padded_are_clipped_to_the_image():
    square = np.array([0.5, 0.5, 1.2, 1.2], np.float32)
    for geometry in ("pad", "stretch"):
        clipped = image_ops.boxes_from_padded(square, 50, 80, geometry)
        np.testing.assert_array_equal(clipped, [0, 0, 80, 50])
