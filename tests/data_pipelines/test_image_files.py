"""Which files of a folder are images, and which JPEGs without their last bytes are read."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import image_files, image_ops
from data_pipelines.image_ops import UnreadableImage


def picture(height: int = 200, width: int = 300) -> Image.Image:
    """Colours in all directions: nowhere grey."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(
        np.stack([x * 255 // width, 255 - y * 255 // height, (x + y) % 256], -1).astype(np.uint8)
    )


def jpeg(**options: object) -> bytes:
    buffer = io.BytesIO()
    picture().save(buffer, "JPEG", **options)
    return buffer.getvalue()


def test_every_suffix_stands_for_a_format_that_is_decoded() -> None:
    extensions = Image.registered_extensions()
    for suffix in image_files.IMAGE_SUFFIXES:
        kind = {".pnm": "PPM", ".dib": "BMP", ".mpo": "JPEG"}.get(suffix) or extensions[suffix]
        buffer = io.BytesIO()
        grey = picture().convert("L" if suffix in (".pgm", ".pbm") else "RGB")
        (grey.convert("1") if suffix == ".pbm" else grey).save(buffer, kind)
        assert image_ops.decode_image(buffer.getvalue()).size == (300, 200), suffix


def test_a_photograph_of_two_frames_gives_its_first() -> None:
    buffer = io.BytesIO()
    picture().save(buffer, "MPO", save_all=True, append_images=[picture(100, 100)])
    assert image_ops.decode_image(buffer.getvalue()).size == (300, 200)
    assert image_ops.decode_image(buffer.getvalue()[:-20]).size == (300, 200)


def test_links_to_folders_are_told_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far/a.png").write_bytes(b"")
    (tmp_path / "near").mkdir()
    (tmp_path / "near/far").symlink_to(tmp_path / "far")
    found = image_files.find(tmp_path / "near")
    told = "1 link to a folder is not followed, such as far; name what it leads to"
    assert found.images == () and found.nothing().endswith(told)
    (tmp_path / "near/b.png").symlink_to(tmp_path / "far/a.png")  # links to files are files
    (tmp_path / "near/.hidden").symlink_to(tmp_path / "far")
    found = image_files.find(tmp_path / "near")
    assert found.images == ("b.png",) and found.links == ("far",)
    assert found.lines() == [f"{tmp_path / 'near'}: {told}"]
    # A folder that is itself a link is what was named.
    assert image_files.find(tmp_path / "near/far").images == ("a.png",)


def test_a_folder_is_searched_without_what_is_hidden(tmp_path: Path) -> None:
    for name in (
        *("b.JPG", "a.jfif", "sub/c.avif", "notes.txt", "photo.heic"),
        *("._b.JPG", ".DS_Store", "__MACOSX/b.jpg", ".cache/d.png", "out/drawn.png"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = image_files.find(tmp_path, leave_out=tmp_path / "out")
    assert found.images == ("a.jfif", "b.JPG", "sub/c.avif")
    assert found.others == {"notes.txt", "photo.heic"}
    below, others = found.lines()
    assert "1 of 3 images lie in subfolders (sub)" in below
    assert "2 files are no images, left out: 1 .heic, 1 .txt" in others
    assert "only 1 .heic, 1 .txt" in found.nothing()


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}]
)
@pytest.mark.parametrize("missing", [1, 2, 3, 20, 60])
def test_a_jpeg_without_its_last_bytes_is_read(options: dict[str, object], missing: int) -> None:
    image_ops.take_early_ends()
    whole = image_ops.decode_image(jpeg(**options))
    assert not image_ops.ends_early(whole)
    for _ in range(2):
        cut = image_ops.decode_image(jpeg(**options)[:-missing])
    assert image_ops.ends_early(cut)
    assert image_ops.take_early_ends() == 1  # one file, read twice
    assert image_ops.take_early_ends() == 0
    differs = (np.abs(np.asarray(cut, int) - np.asarray(whole, int)) > 8).any(-1)
    assert differs.mean() < 0.03
    assert not differs[:150].any()


def test_a_jpeg_without_its_last_bytes_is_turned_and_shrunk_all_the_same() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = jpeg(exif=exif)[:-2]
    assert image_ops.decode_image(content).size == (200, 300)
    opened = image_ops.open_image(content)
    small = image_ops.decode_draft(opened, (50, 75))
    assert small.size == (50, 75) and image_ops.ends_early(small)


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_a_jpeg_that_lost_much_is_damaged(options: dict[str, object], share: float) -> None:
    image_ops.take_early_ends()
    content = jpeg(**options)
    with pytest.raises(UnreadableImage, match="damaged image"):
        image_ops.decode_image(content[: int(len(content) * share)])
    assert image_ops.take_early_ends() == 0


def test_formats_that_name_their_size_are_whole_or_damaged() -> None:
    """PNG and GIF are read once all their pixels are there; the rest refuse what is cut."""
    for kind, missing, is_read in (
        *(("PNG", 12, True), ("PNG", 60, False), ("GIF", 1, True), ("GIF", 400, False)),
        *(("WEBP", 4, False), ("BMP", 4, False), ("TIFF", 4, False), ("AVIF", 4, False)),
    ):
        buffer = io.BytesIO()
        picture().save(buffer, kind)
        try:
            image_ops.decode_image(buffer.getvalue()[:-missing])
            assert is_read, kind
        except UnreadableImage:
            assert not is_read, kind
