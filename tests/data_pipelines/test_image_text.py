"""Image-text pairs in shards."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.readers import image_text, tar_shards
from data_pipelines.readers.image_text import Sample, Unreadable
from data_pipelines.shapes_world import ShapesWorld
from owl_det.errors import DataError


def _png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def _tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _all(where: Path | str, num_shards: int = 0) -> list[list[Sample | Unreadable]]:
    shards = image_text.open_shards(str(where), num_shards)
    return [list(shards.samples(i)) for i in range(len(shards))]


def test_shapes_world_is_cut_into_contiguous_shards() -> None:
    shards = _all("shapes_world:train:7:32", 3)
    assert [len(shard) for shard in shards] == [2, 2, 3]
    world = ShapesWorld(split="train", image_size=32, num_images=7)
    for index, sample in enumerate(s for shard in shards for s in shard):
        assert isinstance(sample, Sample)
        assert sample.texts == world[index].captions
        np.testing.assert_array_equal(sample.image, world[index].image)


def test_tar_members_of_one_stem_are_one_sample(tmp_path: Path) -> None:
    members = [
        ("a/1.png", _png(1)),
        ("a/1.txt", b"a red dog"),
        ("a/2.json", json.dumps({"caption": "two"}).encode()),
        ("a/2.jpg", _png(2)),
        ("a/3.cls", b"7"),
        ("a/4.png", _png(4)),
        ("a/5.png", _png(5)),
        ("a/5.txt", b"\xff\xfa"),
    ]
    _tar(tmp_path / "x.tar", members)
    _tar(tmp_path / "y.tar", members[:2])
    first, second = _all(tmp_path)
    assert first[0] == Sample(key="a/1", image=_png(1), texts=("a red dog",)) == second[0]
    assert first[1] == Sample(key="a/2", image=_png(2), texts=("two",))
    assert isinstance(first[2], Unreadable) and "no image" in first[2].reason
    assert first[3] == Sample(key="a/4", image=_png(4), texts=())
    assert isinstance(first[4], Unreadable) and "text" in first[4].reason


def test_a_file_that_is_gone_is_no_damage(tmp_path: Path) -> None:
    """The file system's failures are raised: a shard must not end with what came before."""
    path = tmp_path / "x.tar"
    _tar(path, [(f"{i}.png", _png(i)) for i in range(3)])
    shards = image_text.open_shards(str(path))
    found = shards.samples(0)
    assert next(found).key == "0"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        list(found)
    with pytest.raises(FileNotFoundError):
        list(shards.samples(0))


def test_compressed_tfrecords_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow", reason="needs TensorFlow")
    (tmp_path / "a.tfrecord.gz").write_bytes(b"")
    with pytest.raises(DataError, match="a.tfrecord.gz: is compressed"):
        image_text.open_shards(str(tmp_path))


@pytest.mark.parametrize("damage", ["cut in data", "cut at header", "bad header"])
def test_damaged_tar_gives_what_comes_before_and_says_so(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.tar"
    _tar(path, [(f"{i}.png", _png(i)) for i in range(3)])
    content = bytearray(path.read_bytes())
    third = 2 * 1024  # header and one block of pixels each
    if damage == "cut in data":
        content = content[: third + 520]
    elif damage == "cut at header":
        content = content[: third + 100]
    else:
        content[third + 20 : third + 40] = b"?" * 20
    path.write_bytes(content)
    (shard,) = _all(path)
    assert [type(item) for item in shard] == [Sample, Sample, Unreadable]
    assert isinstance(shard[2], Unreadable) and "damaged" in shard[2].reason


def test_links_and_huge_members_are_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_shards, "MAX_MEMBER_BYTES", 200)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        big = tarfile.TarInfo("b.png")
        big.size = 201
        tar.addfile(big, io.BytesIO(bytes(201)))
    (shard,) = _all(tmp_path / "x.tar")
    assert [(type(i), i.key) for i in shard] == [(Unreadable, "a"), (Unreadable, "b")]


def test_tfrecords(tmp_path: Path) -> None:
    tf = pytest.importorskip("tensorflow", reason="reads TFRecord files")

    def example(**features: list[bytes]) -> bytes:
        entries = {
            key: tf.train.Feature(bytes_list=tf.train.BytesList(value=value))
            for key, value in features.items()
        }
        return tf.train.Example(features=tf.train.Features(feature=entries)).SerializeToString()

    path = tmp_path / "a.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(example(**{"image/encoded": [_png(1)], "caption": [b"one", b"uno"]}))
        writer.write(example(caption=[b"no image"]))
        writer.write(b"\xff\xff\xff")
        writer.write(example(**{"image/encoded": [_png(4)]}))
    (shard,) = _all(path)
    assert shard[0] == Sample(key="00000000", image=_png(1), texts=("one", "uno"))
    assert [type(item) for item in shard] == [Sample, Unreadable, Unreadable, Sample]
    path.write_bytes(path.read_bytes()[:-5])
    (shard,) = _all(path)
    assert isinstance(shard[-1], Unreadable) and "damaged" in shard[-1].reason


def test_folder_with_texts_beside_the_images(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.png").write_bytes(_png(1))
    (tmp_path / "b.txt").write_text("a cat\n")
    (tmp_path / "sub" / "a.png").write_bytes(_png(2))
    first, second = _all(tmp_path, 2)
    assert first == [Sample(key="b.png", image=_png(1), texts=("a cat",))]
    assert second == [Sample(key="sub/a.png", image=_png(2), texts=())]


def test_folder_with_a_captions_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png(1))
    lines = [
        {"file_name": "a.png", "text": "one"},
        {"file": "a.png", "caption": ["two", "three"]},
        {"file": "a.png", "caption": " "},
        {"file": "gone.png", "caption": "lost"},
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ((first, second),) = _all(tmp_path)
    assert first == Sample(key="a.png", image=_png(1), texts=("one", "two", "three"))
    assert isinstance(second, Unreadable) and second.key == "gone.png"


def test_a_captions_file_may_spell_names_in_several_ways(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "a.png").write_bytes(_png(1))
    lines = [{"file": "./img/a.png", "text": "one"}, {"file": "img//a.png", "text": "two"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert _all(tmp_path) == [[Sample(key="img/a.png", image=_png(1), texts=("one", "two"))]]


def test_a_captions_file_is_utf8(tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_bytes('{"file": "a.png", "text": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="line 1"):
        image_text.open_shards(str(tmp_path))


def test_file_names_that_are_no_utf8_are_written_out(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(_png(1))
    ((sample,),) = _all(tmp_path)
    assert sample == Sample(key="caf\\xe9.png", image=_png(1), texts=())


def test_texts_beside_images_are_part_of_the_version(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(_png(1))
    (tmp_path / "b.txt").write_text("a cat")
    before = image_text.open_shards(str(tmp_path)).version
    (tmp_path / "b.txt").write_text("a black cat")
    assert image_text.open_shards(str(tmp_path)).version != before


def test_a_malformed_pax_header_is_damage(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.png")
        info.size, info.pax_headers = len(_png(1)), {"GNU.sparse.size": "x"}
        tar.addfile(info, io.BytesIO(_png(1)))
    ((sample,),) = _all(tmp_path)
    assert isinstance(sample, Unreadable) and "damaged" in sample.reason


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file": "a\\u0000.png", "caption": "x"}', "line 1"),
        ('{"file": "\\ud83d.png", "caption": "x"}', "line 1"),
        ('{"file": "../secret.png", "caption": "x"}', "line 1"),
        ('{"file": "/etc/passwd", "caption": "x"}', "line 1"),
        ('{"caption": "x"}', "line 1"),
        ("[]", "line 1"),
        ('{"file": "a.png", "caption": "\\ud800"}', "line 1"),
    ],
)
def test_captions_files_are_checked(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "captions.jsonl").write_text(line)
    with pytest.raises(DataError, match=message):
        image_text.open_shards(str(tmp_path))


def test_inputs_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    for where, num_shards in (
        (str(tmp_path / "absent"), 0),
        (str(tmp_path), 0),
        ("shapes_world:train", 0),
        ("shapes_world:train:none", 0),
        ("shapes_world:train:3", 4),
    ):
        with pytest.raises(DataError, match=r"absent|no images|shapes_world|--shards"):
            image_text.open_shards(where, num_shards)
    _tar(tmp_path / "x.tar", [])
    with pytest.raises(DataError, match="--shards"):
        image_text.open_shards(str(tmp_path), 2)
