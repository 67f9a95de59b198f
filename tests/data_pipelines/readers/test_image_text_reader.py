"""Image-text pairs at random, and as the source of a training."""

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines import tokenizer
from data_pipelines.batch_spec import COUNTS
from data_pipelines.image_ops import UnreadableImage
from data_pipelines.input import TrainInput
from data_pipelines.open_source import open_source
from data_pipelines.readers import image_text_inputs
from data_pipelines.readers.image_text_shards import Sample
from owl_det.config import ImageTextSource
from owl_det.errors import DataError
from tests import tiny

NAMES = tuple(f"{i:03d}" for i in range(6))


def _png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def _write_tars(folder: Path) -> None:
    """Two files of three pairs; captions alternate between text and JSON."""
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for i in range(3 * number, 3 * number + 3):
                caption = json.dumps({"caption": f"text {i}"}) if i % 2 else f"text {i}"
                members = {"png": _png(i), "json" if i % 2 else "txt": caption.encode()}
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{NAMES[i]}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def _write_tfrecords(folder: Path) -> None:
    tf = pytest.importorskip("tensorflow", reason="writes TFRecord files")

    def feature(value: bytes) -> Any:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    for number in range(2):
        with tf.io.TFRecordWriter(str(folder / f"{number}.tfrecord")) as writer:
            for i in range(3 * number, 3 * number + 3):
                pair = {"image/encoded": feature(_png(i)), "caption": feature(b"text %d" % i)}
                features = tf.train.Features(feature=pair)
                writer.write(tf.train.Example(features=features).SerializeToString())


def _write_folder(folder: Path) -> None:
    for i, name in enumerate(NAMES):
        (folder / f"{name}.png").write_bytes(_png(i))
        (folder / f"{name}.txt").write_text(f"text {i}")


def _write_captions_file(folder: Path) -> None:
    _write_images(folder)
    lines = [{"file_name": f"{name}.png", "caption": f"text {i}"} for i, name in enumerate(NAMES)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))


def _write_images(folder: Path) -> None:
    for i, name in enumerate(NAMES):
        (folder / f"{name}.png").write_bytes(_png(i))


@pytest.mark.parametrize(
    "write", [_write_tars, _write_tfrecords, _write_folder, _write_captions_file]
)
def test_any_order_gives_what_front_to_back_gives(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    write(tmp_path)
    reader = open_source(ImageTextSource(), str(tmp_path))
    assert len(reader) == 6 and reader.categories == ()
    for i in (5, 0, 3, 1, 4, 2, 2):
        record = reader[i]
        assert (record.image, record.captions, record.image_id) == (_png(i), (f"text {i}",), i)
        assert record.boxes_xyxy.shape == (0, 4) and record.names == ()
    shards = image_text_inputs.open_shards(str(tmp_path))
    samples = [sample for i in range(len(shards)) for sample in shards.samples(i)]
    assert [sample.image for sample in samples if isinstance(sample, Sample)] == [
        reader[i].image for i in range(6)
    ]
    with pytest.raises(IndexError):
        reader[6]


def test_images_without_a_caption_are_there(tmp_path: Path) -> None:
    _write_images(tmp_path)
    line = json.dumps({"file_name": f"{NAMES[1]}.png", "caption": "text"})
    (tmp_path / "captions.jsonl").write_text(f"\n{line}\n\n")
    reader = open_source(ImageTextSource(), str(tmp_path))
    assert [reader[i].captions for i in range(len(reader))] == [(), ("text",), (), (), (), ()]


def test_an_empty_text_does_not_hide_the_json(tmp_path: Path) -> None:
    members = {"png": _png(0), "txt": b"", "json": b'{"caption": "text"}'}
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for extension, content in members.items():
            info = tarfile.TarInfo(f"0.{extension}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    reader = open_source(ImageTextSource(), str(tmp_path))
    assert reader[0].captions == ("text",)


def test_version_changes_with_files_and_sizes(tmp_path: Path) -> None:
    _write_captions_file(tmp_path)
    versions = {open_source(ImageTextSource(), str(tmp_path)).version}
    assert len(versions) == 1
    with (tmp_path / "captions.jsonl").open("a") as file:
        file.write('\n{"file_name": "000.png", "caption": "another"}')
    versions.add(open_source(ImageTextSource(), str(tmp_path)).version)
    (tmp_path / "000.png").write_bytes(_png(0) + b"x")
    versions.add(open_source(ImageTextSource(), str(tmp_path)).version)
    assert len(versions) == 3


def test_coco_captions(tmp_path: Path) -> None:
    (tmp_path / "val2017").mkdir()
    _write_images(tmp_path / "val2017")
    content = {
        "images": [{"id": 10 + i, "file_name": f"{name}.png"} for i, name in enumerate(NAMES)],
        "annotations": [
            {"image_id": 11, "caption": "one\n"},
            {"image_id": 11, "caption": "uno"},
            {"image_id": 12, "caption": " "},
        ],
    }
    path = tmp_path / "captions.json"
    entry = ImageTextSource(images="val2017", captions="captions.json")
    path.write_text(json.dumps(content))
    reader = open_source(entry, str(tmp_path))
    assert [reader[i].captions for i in range(6)] == [(), ("one", "uno"), (), (), (), ()]
    for place, value, message in (
        ("annotations", {"image_id": 99, "caption": "x"}, r"annotations\[3\].image_id: no image"),
        ("annotations", {"image_id": 11}, r"annotations\[3\]: the field caption is missing"),
        ("images", {"id": 1, "file_name": "../x.png"}, r"images\[6\].file_name: '../x.png'"),
    ):
        path.write_text(json.dumps({**content, place: [*content[place], value]}))
        with pytest.raises(DataError, match=message):
            open_source(entry, str(tmp_path))
    with pytest.raises(DataError, match="key `captions`"):
        open_source(ImageTextSource(images="val2017", captions="gone.json"), str(tmp_path))


def test_what_cannot_be_read_is_a_record_that_raises(tmp_path: Path) -> None:
    _write_tars(tmp_path)
    path = tmp_path / "0.tar"
    content = bytearray(path.read_bytes())
    content[4 * 1024 + 20 : 4 * 1024 + 40] = b"?" * 20  # the header of the third pair's image
    path.write_bytes(content)
    reader = open_source(ImageTextSource(), str(tmp_path))
    assert len(reader) == 6  # two pairs, the damage, three pairs
    with pytest.raises(UnreadableImage, match="damaged from here on"):
        reader[2]
    assert reader[3].captions == ("text 3",)
    (tmp_path / "1.tar").write_bytes(b"")
    with pytest.raises(UnreadableImage, match="become shorter"):
        reader[3]


def test_what_is_no_data_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow", reason="without it TFRecord files are refused at once")
    (tmp_path / "x.tfrecord").write_bytes(b"\x1f\x8b" + bytes(200))  # as gzip begins
    for entry, message in (
        (ImageTextSource(images="gone"), "gone: no such file or folder; correct the key `images`"),
        (ImageTextSource(), "no image-text pair"),
        (ImageTextSource(captions="c.json", images="gone"), "gone: no such folder"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(entry, str(tmp_path))


def test_tfrecords_need_tensorflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.tfrecord").write_bytes(bytes(16))
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(DataError, match="pip install tensorflow, or store"):
        open_source(ImageTextSource(), str(tmp_path))


def test_a_training_counts_what_its_pairs_lack(tmp_path: Path) -> None:
    """Six pairs: one caption is too long, one is missing, one image is none."""
    _write_folder(tmp_path)
    (tmp_path / "001.txt").write_text("word " * 20)
    (tmp_path / "002.txt").unlink()
    (tmp_path / "003.png").write_bytes(b"no image")
    config = tiny.config(
        task="contrastive",
        model__contrastive="softmax",
        data__train={"pairs": {"kind": "image_text", "path": str(tmp_path)}},
        data__with_captions=True,
        data__train_prompts="clip",  # templates are for names: captions stay as they are
        optimizer__clip={"scope": "global"},
    )
    data = TrainInput(config)
    words = tokenizer.build(config.model.text, "")
    seen: dict[int, dict[str, int]] = {}
    for number in range(12):
        example = data.example(number)
        counts = dict(zip(COUNTS, example["counts"].tolist(), strict=True))
        image_id = int(example["image_id"])
        seen[image_id] = counts
        caption = data.sources[0][image_id].captions
        assert bool(example["is_caption"][0]) == bool(caption)
        expected = words.encode_all(caption or ("",))
        np.testing.assert_array_equal(example["caption_tokens"], expected)
    assert seen.keys() == {0, 1, 2, 4, 5}
    assert [i for i in seen if seen[i]["cut_captions"]] == [1]
    assert [i for i in seen if seen[i]["images_without_caption"]] == [2]
    assert [data.sources[0].name + "[3]"] == list(data.unreadable.values())


def test_what_pairs_lack_is_said_when_they_are_opened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write_tars(tmp_path)
    with tarfile.open(tmp_path / "2.tar", "w") as tar:
        for name in ("a.png", "b.png", "v1.0.png", "v1.1.png"):
            info = tarfile.TarInfo(name)
            info.size = len(_png(9))
            tar.addfile(info, io.BytesIO(_png(9)))
    reader = open_source(ImageTextSource(), str(tmp_path))
    assert (len(reader), reader.counts) == (10, None)
    assert "2 of 8 images have no caption" in caplog.text
    assert "2 images have the key 'v1'" in caplog.text
    for file in tmp_path.glob("*.tar"):
        file.write_text("<html>not found</html>")
    with pytest.raises(DataError, match="no image-text pair that can be read: .* it is a page"):
        open_source(ImageTextSource(), str(tmp_path))
