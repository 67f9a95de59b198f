"""Image-text pairs in shards."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.readers import image_text_inputs, tar_shards
from data_pipelines.readers.image_text_shards import Sample, Unreadable
from data_pipelines.shapes_world import ShapesWorld
from owl_det.errors import DataError, UserError


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
    shards = image_text_inputs.open_shards(str(where), num_shards)
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
    shards = image_text_inputs.open_shards(str(path))
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
        image_text_inputs.open_shards(str(tmp_path))


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
        image_text_inputs.open_shards(str(tmp_path))


def test_file_names_that_are_no_utf8_are_written_out(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(_png(1))
    ((sample,),) = _all(tmp_path)
    assert sample == Sample(key="caf\\xe9.png", image=_png(1), texts=())


def test_texts_beside_images_are_part_of_the_version(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(_png(1))
    (tmp_path / "b.txt").write_text("a cat")
    before = image_text_inputs.open_shards(str(tmp_path)).version
    (tmp_path / "b.txt").write_text("a black cat")
    assert image_text_inputs.open_shards(str(tmp_path)).version != before


def test_a_malformed_pax_header_is_damage(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.png")
        info.size, info.pax_headers = len(_png(1)), {"GNU.sparse.size": "x"}
        tar.addfile(info, io.BytesIO(_png(1)))
    ((sample,),) = _all(tmp_path)
    assert isinstance(sample, Unreadable) and "damaged" in sample.reason


@pytest.mark.parametrize("name", ["b.png", ".b.png"])
def test_a_negative_size_is_damage(tmp_path: Path, name: str) -> None:
    """tarfile would go back by so much, and read the same members for ever."""
    path = tmp_path / "x.tar"
    _tar(path, [("a.png", _png(0)), (name, _png(1))])
    content = bytearray(path.read_bytes())
    header = content[1024:1536]
    header[124:136] = (-2048).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[1024:1536] = header
    path.write_bytes(content)
    (shard,) = _all(path)
    assert [type(item) for item in shard] == [Sample, Unreadable]
    assert isinstance(shard[1], Unreadable) and "damaged" in shard[1].reason


@pytest.mark.parametrize("size", [2**62, 2**80])
@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_name_of_absurd_length_is_damage(tmp_path: Path, kind: bytes, size: int) -> None:
    """tarfile reads it at once."""
    path = tmp_path / "x.tar"
    _tar(path, [("a.png", _png(0))])
    member = tarfile.TarInfo("b.png")
    member.type, member.size = kind, size
    header = member.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(path.read_bytes()[:1024] + header)
    (shard,) = _all(path)
    assert [type(item) for item in shard] == [Sample, Unreadable]
    assert isinstance(shard[1], Unreadable) and "damaged" in shard[1].reason


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file": "a\\u0000.png", "caption": "x"}', "line 1"),
        ('{"file": "\\ud83d.png", "caption": "x"}', "line 1"),
        ('{"file": "../secret.png", "caption": "x"}', "line 1"),
        ('{"file": "/etc/passwd", "caption": "x"}', "line 1"),
        ('{"caption": "x"}', "line 1"),
        (json.dumps({"file": "a" * 300 + ".png", "caption": "x"}), "line 1"),
        ("[]", "line 1"),
        ('{"file": "a.png", "caption": "\\ud800"}', "line 1"),
    ],
)
def test_captions_files_are_checked(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "captions.jsonl").write_text(line)
    with pytest.raises(DataError, match=message):
        image_text_inputs.open_shards(str(tmp_path))


def test_inputs_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    for where, num_shards in (
        (str(tmp_path / "absent"), 0),
        (str(tmp_path), 0),
        ("shapes_world:train", 0),
        ("shapes_world:train:none", 0),
        ("shapes_world:train:3", 4),
    ):
        with pytest.raises(DataError, match=r"absent|no images|shapes_world|--shards"):
            image_text_inputs.open_shards(where, num_shards)
    _tar(tmp_path / "x.tar", [])
    with pytest.raises(DataError, match="--shards"):
        image_text_inputs.open_shards(str(tmp_path), 2)


# --- captions of other tools ---------------------------------------------------------------------


def _captions_of(folder: Path) -> dict[str, tuple[str, ...]]:
    found = [item for shard in _all(folder) for item in shard]
    assert all(isinstance(item, Sample) for item in found)
    return {item.key: item.texts for item in found if isinstance(item, Sample)}


def _images(folder: Path, count: int = 3) -> None:
    for i in range(count):
        (folder / f"{i}.png").write_bytes(_png(i))


TABLE = {"0.png": ("a red dog",), "1.png": ("two, or three cats",), "2.png": ()}
ROWS = 'a red dog\r\n1.png,"two, or three cats"\r\n2.png,\r\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", f"file_name,text\r\n0.png,{ROWS}".encode()),
        ("captions.csv", f"image,caption\r\n0.png,{ROWS}".encode("utf-8-sig")),
        ("metadata.csv", f"Filename,Alt Text\r\n./0.png,{ROWS}".encode("utf-16")),
        (
            "metadata.csv",
            b"id;TEXT;path\n1;a red dog;0.png\n2;two, or three cats;1.png\n3;;2.png\n",
        ),
        ("captions.tsv", b"file_name\tprompt\n0\ta red dog\n1\ttwo, or three cats\n2\t\n"),
        ("captions.txt", f"image,caption\r\n0.png,{ROWS}".encode()),
    ],
)
def test_tables_of_captions(tmp_path: Path, name: str, content: bytes) -> None:
    _images(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert _captions_of(tmp_path) == TABLE


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.json", {"0.png": "a red dog", "1.png": ["two, or three cats"], "2.png": []}),
        (
            "metadata.json",
            [
                {"image": "0.png", "sentences": [{"raw": "a red dog", "tokens": ["a", "red"]}]},
                {"image": "1.png", "TEXT": "two, or three cats"},
            ],
        ),
        (
            "captions.json",
            {
                "images": [{"id": i, "file_name": f"{i}.png"} for i in range(3)],
                "annotations": [
                    {"image_id": 0, "caption": "a red dog"},
                    {"image_id": 1, "caption": "two, or three cats "},
                ],
            },
        ),
    ],
)
def test_json_files_of_captions(tmp_path: Path, name: str, content: object) -> None:
    _images(tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    assert _captions_of(tmp_path) == TABLE


@pytest.mark.parametrize(
    ("file", "written"),
    [
        ("caf\u00e9.png", "cafe\u0301.png"),  # as macOS writes it
        ("cafe\u0301.png", "caf\u00e9.png"),
        ("a.png", "A.PNG"),
        ("a.PNG", "a"),
        ("sub/a.png", "sub\\a.png"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "json"])
def test_tables_name_images_in_other_spellings(
    tmp_path: Path, file: str, written: str, kind: str
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(_png(1))
    table = (
        json.dumps({written: "a dog"}) if kind == "json" else f"file_name,text\n{written},a dog\n"
    )
    (tmp_path / f"captions.{kind}").write_text(table, encoding="utf-8")
    assert _captions_of(tmp_path) == {file: ("a dog",)}


def test_a_name_that_two_images_may_have_is_neithers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.png", "A.png", "b.png"):
        (tmp_path / name).write_bytes(_png(1))
    (tmp_path / "metadata.csv").write_text("file_name,text\na.PNG,a dog\nb.png,a cat\n")
    image_text_inputs.open_shards(str(tmp_path))
    assert "1 of its 2 images are not in the folder, such as a.PNG" in caplog.text


def test_texts_beside_the_images_come_before_a_table(tmp_path: Path) -> None:
    _images(tmp_path, 1)
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,of the table\n")
    (tmp_path / "0.txt").write_text("0 0.5 0.5 0.2 0.2\n")  # a label: no caption
    assert _captions_of(tmp_path) == {"0.png": ("of the table",)}
    (tmp_path / "0.txt").write_text("beside")
    assert _captions_of(tmp_path) == {"0.png": ("beside",)}


def test_json_beside_the_images_comes_last_and_costs_no_image(tmp_path: Path) -> None:
    _images(tmp_path, 3)
    before = image_text_inputs.open_shards(str(tmp_path)).version
    for i, content in enumerate(('{"shapes": [], "imagePath": "0.png"}', "[1]", "{")):
        (tmp_path / f"{i}.json").write_text(content)
    assert _captions_of(tmp_path) == {"0.png": (), "1.png": (), "2.png": ()}
    # Labels are not part of it.
    assert image_text_inputs.open_shards(str(tmp_path)).version == before
    (tmp_path / "2.json").write_text('{"caption": "two"}')
    assert _captions_of(tmp_path) == {"0.png": (), "1.png": (), "2.png": ("two",)}
    (tmp_path / "0.txt").write_text("text")
    assert _captions_of(tmp_path) == {"0.png": ("text",), "1.png": (), "2.png": ()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file_name,text\n0.png,a, b\n", "line 2: has 3 cells, and the header has 2"),
        ('file_name,text\n0.png,"a\n1.png,b\n', "line 2: unexpected end of data"),
        ("file_name,text\n../0.png,a\n", "line 2: no `file_name`"),
        ("file_name,text,Text\n0.png,a,\n", "line 1: two columns are called 'text'"),
        ("file_name,text\n9.png,a\n", "none of its 1 images is in the folder, such as 9.png"),
    ],
)
def test_malformed_tables_are_named(tmp_path: Path, content: str, message: str) -> None:
    _images(tmp_path)
    (tmp_path / "metadata.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        image_text_inputs.open_shards(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.csv", "file_name,label\n0.png,dog\n", "file_name, label; none is a caption"),
        ("metadata.csv", "id,text\n0,dog\n", "id, text; none names images"),
        ("metadata.csv", "0.png,a dog\n", "has no header"),
        ("metadata.jsonl", '{"file_name": "0.png", "label": 3}', "file_name, label; none is a"),
        ("metadata.csv", "file_name,text\n0.png,dog\n9.png,cat\n", "1 of its 2 images are not in"),
        ("metadata.csv", "file_name,text\n0.png,dog\n", "2 of 3 images have no entry there"),
        ("metadata.parquet", "PAR1", "metadata.parquet: is not read"),
        ("captions.json", "{", "captions.json: no JSON"),
        ("labels.csv", "file_name,text\n0.png,dog\n", "labels.csv is not read: tables of captions"),
        ("data.jsonl", '{"file_name": "0.png", "text": "dog"}', "data.jsonl is not read: tables"),
    ],
)
def test_what_a_table_lacks_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, content: str, message: str
) -> None:
    _images(tmp_path)
    (tmp_path / name).write_text(content)
    assert len(_all(tmp_path)[0]) >= 3
    assert message in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffblue triangle".encode(),
        "blue triangle\r\n".encode("utf-16"),
        "blue \u200btri\u00adangle".encode("utf-8-sig"),
        "\u200eblue triangle\ufeff\x00".replace("\x00", "").encode(),
    ],
)
def test_characters_that_nobody_sees_are_no_part_of_a_caption(
    tmp_path: Path, content: bytes
) -> None:
    _images(tmp_path, 1)
    for name in ("0.txt", "0.caption", "0.png.txt", "0.TXT"):
        (tmp_path / name).write_bytes(content)
        assert _captions_of(tmp_path) == {"0.png": ("blue triangle",)}
        (tmp_path / name).unlink()
    _tar(tmp_path / "x.tar", [("a.png", _png(1)), ("a.txt", content)])
    ((sample,),) = _all(tmp_path / "x.tar")
    assert isinstance(sample, Sample) and [t.strip() for t in sample.texts] == ["blue triangle"]


@pytest.mark.parametrize(
    ("text", "is_caption"),
    [
        ("0 0.5 0.5 0.2 0.2", False),
        ("3 0.1 0.2 0.3 0.4 0.5 0.6\n7 0.1 0.2 0.3 0.4\n", False),
        ("Car 0.00 0 -1.58 587.01 173.33 614.12 200.12 1.65 1.67 3.64 -0.65 1.71 46.70", False),
        ("12.0 10.0 40.0 10.0 40.0 60.0 12.0 60.0 large-vehicle 1", False),
        ("377,117,463,117,465,130,378,130,Main Street", False),
        ("1,2,794.2,247.5,71.2,174.8,1,-1,-1,-1\n", False),
        ("imagesource:web\ngsd:0.1\n12.0 10.0 40.0 10.0 40.0 60.0 12.0 60.0 plane 1", False),
        ("a dog, 2 cats, 3.5 m, 4 trees; 5 cars", True),
        ("iphone 4 5 6 7 case", True),
        ("1 2 3", True),
        ("0 0.5 0.5 0.2 0.2\nand a dog", True),
    ],
)
def test_labels_of_boxes_are_no_captions(tmp_path: Path, text: str, is_caption: bool) -> None:
    _images(tmp_path, 1)
    (tmp_path / "0.txt").write_text(text)
    _tar(tmp_path / "x.tar", [("0.png", _png(0)), ("0.txt", text.encode())])
    for where in (tmp_path / "x.tar", tmp_path):
        ((sample,),) = _all(where)
        assert isinstance(sample, Sample)
        assert bool(sample.texts) == is_caption
        assert ("numbers of boxes" in sample.note) != is_caption
        (tmp_path / "x.tar").unlink(missing_ok=True)


def test_hidden_files_are_no_images_and_no_captions(tmp_path: Path) -> None:
    _images(tmp_path, 1)
    for name in ("._0.png", "._0.txt", ".DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "0.png").write_bytes(b"x")
    assert _captions_of(tmp_path) == {"0.png": ()}
    members = [("._0.png", b"x"), ("./0.png", _png(0)), ("__MACOSX/._0.png", b"x")]
    _tar(tmp_path / "x.tar", members)
    ((sample,),) = _all(tmp_path / "x.tar")
    assert isinstance(sample, Sample) and sample.image == _png(0)


# --- tar files of other tools --------------------------------------------------------------------


def test_every_image_of_a_key_with_dots_is_counted(tmp_path: Path) -> None:
    """`v1.200.png` has the key `v1`: WebDataset splits at the first dot of the file name."""
    members = [(f"a{i}.png", _png(i)) for i in range(2)]
    members += [(f"v1.{i}.{end}", _png(i)) for i in range(3) for end in ("png", "txt")]
    members += [("d.ir/b.png", _png(7)), ("d.ir/b.txt", b"seven")]
    _tar(tmp_path / "x.tar", members)
    (shard,) = _all(tmp_path)
    lost = [item for item in shard if isinstance(item, Unreadable)]
    assert [item.key for item in lost] == ["v1.0.png", "v1.1.png", "v1.2.png"]
    assert all("3 images have the key 'v1'" in item.reason for item in lost)
    assert shard[-1] == Sample(key="d.ir/b", image=_png(7), texts=("seven",))
    assert len(shard) == 2 + 3 + 1


@pytest.mark.parametrize(
    "members",
    [
        [("a.image.jpg", 1), ("a.image.txt", b"one")],
        [("a.JPEG", 1), ("a.TXT", b"one")],
        [("a.b.jfif", 1), ("a.txt", b"one")],
        [("a.webp", 1), ("a.txt", b""), ("a.caption", b"one")],
        [("a.png", 1), ("a.json", b'{"TEXT": "one", "url": "x"}')],
        [("a.json", b'{"caption": null, "alt": ["one"]}'), ("a.avif", 1)],
    ],
)
def test_members_of_other_tools(tmp_path: Path, members: list[tuple[str, bytes | int]]) -> None:
    content = [(name, x if isinstance(x, bytes) else _png(x)) for name, x in members]
    _tar(tmp_path / "x.tar", content)
    assert _all(tmp_path) == [[Sample(key="a", image=_png(1), texts=("one",))]]


def test_images_beside_the_one_that_is_taken_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = [("a.png", _png(1)), ("a.depth.png", _png(2)), ("b.png", _png(3)), ("b.png", _png(4))]
    _tar(tmp_path / "x.tar", members)
    (shard,) = _all(tmp_path)
    assert [item.key for item in shard] == ["a", "b", "b"]
    assert isinstance(shard[1], Unreadable) and "b.png occurs twice" in shard[1].reason
    assert isinstance(shard[2], Sample) and shard[2].image == _png(4)
    assert "1 images are left out, such as a.depth.png" in caplog.text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404 not found</html>" * 40, "a page"),
        (b"\x1f\x8b\x08" + bytes(2000), "gzip"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS"),
        (bytes(10240), "holds no files"),
        (b"\x00\x01\x02garbage" * 100, "damaged"),
    ],
)
@pytest.mark.parametrize("suffix", ["tar", "tfrecord"])
def test_files_that_are_no_shards_are_damage(
    tmp_path: Path, content: bytes, reason: str, suffix: str
) -> None:
    if suffix == "tfrecord":
        pytest.importorskip("tensorflow", reason="reads TFRecord files")
    (tmp_path / f"x.{suffix}").write_bytes(content)
    ((item,),) = _all(tmp_path)
    assert isinstance(item, Unreadable) and item.is_damage
    assert (
        reason in item.reason
        or (suffix == "tfrecord" and "damaged" in item.reason)
        or (content == b"" and "holds no record" in item.reason)
    )


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.TAR.ZST"])
def test_compressed_tar_files_are_refused(tmp_path: Path, name: str) -> None:
    _tar(tmp_path / "a.tar", [("a.png", _png(1))])
    (tmp_path / name).write_bytes(b"")
    for where in (tmp_path, tmp_path / name):
        with pytest.raises(DataError, match="is compressed; decompress it first"):
            image_text_inputs.open_shards(str(where))


@pytest.mark.parametrize("left", [1, 11, 12, 100])
def test_a_tfrecord_file_cut_anywhere_in_a_record_is_damaged(tmp_path: Path, left: int) -> None:
    tf = pytest.importorskip("tensorflow", reason="writes TFRecord files")
    path = tmp_path / "a.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for _ in range(2):
            writer.write(bytes(100))
    path.write_bytes(path.read_bytes()[: 116 + left])
    (shard,) = _all(path)
    assert isinstance(shard[-1], Unreadable) and shard[-1].is_damage and len(shard) == 2


def test_lost_records_are_counted(tmp_path: Path) -> None:
    tf = pytest.importorskip("tensorflow", reason="reads TFRecord files")
    path = tmp_path / "a.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for _ in range(5):
            writer.write(bytes(100))
    content = bytearray(path.read_bytes())
    content[2 * 116 + 50] ^= 1  # in the data of the third
    path.write_bytes(content)
    (shard,) = _all(path)
    assert len(shard) == 3
    assert isinstance(shard[2], Unreadable) and shard[2].is_damage
    assert "(3 records are lost)" in shard[2].reason


def test_folders_without_images_say_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/notes.md").write_text("x")
    with pytest.raises(DataError, match=r"no images, .tar or .tfrecord files there; only 1 .md"):
        image_text_inputs.open_shards(str(tmp_path))
    _tar(tmp_path / "sub" / "x.tar", [])
    with pytest.raises(DataError, match=r"its shards lie in subfolders, such as sub/x\.tar"):
        image_text_inputs.open_shards(str(tmp_path))


def test_shards_in_subfolders_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("x.TAR", "sub/y.tar"):
        _tar(tmp_path / name, [("a.png", _png(1)), ("a.txt", b"a dog")])
    ((sample,),) = _all(tmp_path)
    assert isinstance(sample, Sample)
    assert "1 shards lie in subfolders and are not read, such as sub/y.tar" in caplog.text


def test_tar_files_joined_by_cat_are_damage(tmp_path: Path) -> None:
    _tar(tmp_path / "x.tar", [("a.png", _png(1)), ("a.txt", b"a dog")])
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole + b"\0" * 100_000)  # more zeros are padding
    assert len(_all(tmp_path)[0]) == 1
    (tmp_path / "x.tar").write_bytes(whole + whole)
    first, rest = _all(tmp_path)[0]
    assert isinstance(first, Sample) and isinstance(rest, Unreadable) and rest.is_damage
    assert "more follows the end of the tar file" in rest.reason


def test_addresses_are_refused() -> None:
    with pytest.raises(UserError, match="--input: gs://bucket/x is an address"):
        image_text_inputs.open_shards("gs://bucket/x")
