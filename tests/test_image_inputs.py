"""Images as callers give them: what is taken as meant, and what is refused in one line."""

import io
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from data_pipelines.image_ops import UnreadableImage
from owl_det.errors import DataError
from owl_det.inference import image_inputs

RGB = np.random.default_rng(0).integers(2, 256, (6, 9, 3), np.uint8)


class Tensor:
    """What another library's tensor shows to NumPy."""

    def __init__(self, array: np.ndarray, error: Exception | None = None):
        self._array, self._error = array, error

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if self._error:
            raise self._error
        return self._array


def _read_all(images: Any) -> list[np.ndarray]:
    return [np.asarray(image_inputs.read(image)) for image in image_inputs.each(images)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a picture.png"
    Image.fromarray(RGB).save(path)
    return path


def test_one_image_is_one(file: Path) -> None:
    content = file.read_bytes()
    with file.open("rb") as stream, Image.open(file) as opened:
        singles = [str(file), file, content, bytearray(content), io.BytesIO(content), stream, RGB]
        singles += [Image.fromarray(RGB), opened, jnp.asarray(RGB), Tensor(RGB)]
        for single in singles:
            (read,) = _read_all(single)
            np.testing.assert_array_equal(read, RGB)


def test_many_images_are_in_order(file: Path) -> None:
    other = RGB[::-1]
    for many in (
        [file, other],
        (str(file), Tensor(other)),
        (image for image in (RGB, other)),
        np.stack([RGB, other]),
        jnp.asarray(np.stack([RGB, other])),
        np.stack([RGB, other]).transpose(0, 3, 1, 2),
        np.array([RGB, other, None], object)[:2],
    ):
        np.testing.assert_array_equal(_read_all(many), [RGB, other])
    assert [read.tolist() for read in _read_all(np.array([str(file), str(file)]))] == [
        RGB.tolist()
    ] * 2
    assert _read_all([]) == [] and _read_all(np.zeros((0, 4, 4, 3), np.uint8)) == []


def test_pixels_of_other_kinds_are_taken_as_meant() -> None:
    grey = RGB[..., 0]
    as_rgb = np.repeat(grey[..., None], 3, 2)
    for array, wanted in (
        (RGB.transpose(2, 0, 1), RGB),
        (RGB.astype(np.float32), RGB),
        (RGB / 255, RGB),
        (RGB.astype(np.int64), RGB),
        (RGB.astype(np.uint16) * 257, RGB),
        (jnp.asarray(RGB, jnp.bfloat16), np.asarray(jnp.asarray(RGB, jnp.bfloat16), np.uint8)),
        (grey, as_rgb),
        (grey[..., None], as_rgb),
        (grey > 100, 255 * (as_rgb > 100)),
        (np.dstack([RGB, np.full_like(grey, 255)]), RGB),
        (np.dstack([RGB, np.zeros_like(grey)]), np.full_like(RGB, 255)),
    ):
        (read,) = _read_all(array)
        np.testing.assert_array_equal(read, wanted)


def test_a_dark_frame_is_scaled_with_its_batch() -> None:
    batch = np.stack([np.full((4, 5, 3), 200.0), np.ones((4, 5, 3))])
    assert [int(read.max()) for read in _read_all(batch)] == [200, 1]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "images: got None; give a path"),
        (7, "images: got int"),
        ({"a": RGB}, "images: a dict; give its images as a list"),
        ({"a.png", "b.png"}, "a set has no order"),
        ([RGB, None], "image: got None"),
        ([RGB.tolist()], r"got list; .* give np.array"),
        (np.zeros((7, 8, 9), np.uint8), r"\[7, 8, 9\] may be many grey images or none"),
        (np.zeros((8, 9, 5), np.uint8), r"\[8, 9, 5\] may be"),
        (np.zeros((4, 9, 4), np.uint8), r"\[4, 9, 4\] is no image"),
        (np.zeros(5, np.uint8), r"\[5\] is no image"),
        (np.zeros((2, 2, 4, 5, 3), np.uint8), r"is no image; give \[h, w, 3\]"),
        (np.zeros((0, 5, 3), np.uint8), r"\[0, 5, 3\] has no pixels"),
        (RGB / 127.5 - 1, r"float64 values from -.* are no pixels; .* before any normalisation"),
        (RGB * 3.0, "float64 values up to .* may be pixels"),
        (RGB.astype(np.uint16), "uint16 values up to .* may be pixels of 8 bits or of more"),
        (RGB.astype(np.int32) * 1000, "are no pixels"),
        (np.full((4, 5, 3), np.nan), "NaN"),
        (RGB * 1j, "complex128 holds no pixels"),
        (Tensor(RGB, RuntimeError("it is on\na device")), r"gives no NumPy array \(it is on a"),
    ],
)
def test_what_is_no_image_is_one_clear_line(images: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        _read_all(images)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", None, r"a\.png: no such file$"),
        ("a.mp4", b"\0\0\0\x18ftypmp42", r"a\.mp4: is a video; give its frames"),
        ("a.pdf", b"%PDF-1.7", r"a\.pdf: is a PDF; give its pages"),
        ("a.txt", b"words", r"a\.txt: not an image of a known format"),
        ("empty.jpg", b"", r"empty\.jpg: the file is empty"),
        ("cut.png", b"\x89PNG\r\n\x1a\n\0\0", r"cut\.png: "),
        ("*.jpg", None, r"\*\.jpg: no such file; a pattern\?"),
    ],
)
def test_files_that_are_no_images_are_named(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableImage, match=message):
        image_inputs.read(tmp_path / name)


def test_paths_that_are_none_are_said_to_be(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, "is a folder; give its files"),
        ("https://example.org/a.jpg", "is an address; download it"),
        ("", "is no path"),
        ("data:image/png;base64," + "A" * 5000, "a text of 5022 characters is no path"),
        ("a\0b", "is no path"),
    ):
        with pytest.raises(UnreadableImage, match=message):
            image_inputs.read(path)


def test_a_broken_file_that_pillow_opened_is_named(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UnreadableImage, match=r"a picture\.png: damaged"):
        with Image.open(file) as opened:
            image_inputs.read(opened)
    with pytest.raises(UnreadableImage, match="image 3: image of 0 x 5 pixels"):
        image_inputs.read(Image.new("RGB", (0, 5)), "image 3")


def test_a_file_that_is_spelt_otherwise_is_named(tmp_path: Path) -> None:
    (tmp_path / "Photos").mkdir()
    # An umlaut of one character, as most systems write it.
    real = tmp_path / "Photos" / "m\u00fcll.JPG"
    Image.fromarray(RGB).save(real, format="JPEG")
    for spelt in ("Photos/m\u00fcll.jpg", "photos/mu\u0308ll.JPG", "PHOTOS/M\u00dcLL.jpeg"):
        with pytest.raises(UnreadableImage, match="did you mean '.*m\u00fcll.JPG'"):
            image_inputs.read(f"{tmp_path}/{spelt}")
    with pytest.raises(UnreadableImage, match="did you mean '.*Photos/m\u00fcll.JPG'"):
        image_inputs.read(f"{tmp_path}\\Photos\\m\u00fcll.JPG".replace("\\Ph", "/Ph"))
    with pytest.raises(UnreadableImage, match=r"no such file$"):
        image_inputs.read(tmp_path / "Photos" / "other.jpg")
