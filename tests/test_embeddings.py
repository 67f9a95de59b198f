"""Saved image embeddings: written whole, and refused where they are not what they say."""

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from owl_det.errors import DataError
from owl_det.inference import embedding_files
from owl_det.inference.embeddings import ImageEmbeddings
from owl_det.types import TokenEmbeddings


def _images(count: int = 3) -> ImageEmbeddings:
    rng = np.random.default_rng(count)
    shapes = {"boxes": (4,), "class_embeddings": (6,)}
    names = ("boxes", "class_embeddings", "embedding_norm", "logit_shift", "logit_scale")
    arrays = {
        name: rng.normal(size=(count, 5, *shapes.get(name, ()))).astype(np.float32)
        for name in (*names, "objectness_logits")
    }
    return ImageEmbeddings(
        tokens=TokenEmbeddings(**arrays),
        sizes=rng.integers(1, 99, (count, 2)).astype(np.int32),
        names=tuple(f"{i} ü.png" for i in range(count)),
        image_size=32,
        checkpoint="abc",
    )


@pytest.fixture
def written(tmp_path: Path) -> Path:
    with embedding_files.Writer(tmp_path / "emb") as writer:
        writer.add(_images(3))
        writer.add(_images(2))
    return tmp_path / "emb"


def test_reading_gives_what_was_written(written: Path) -> None:
    shards = list(embedding_files.read(written))
    for read, wanted in zip(shards, (_images(3), _images(2)), strict=True):
        assert (read.names, read.image_size, read.checkpoint) == (wanted.names, 32, "abc")
        np.testing.assert_array_equal(read.sizes, wanted.sizes)
        for name in ("boxes", "class_embeddings", "logit_scale", "objectness_logits"):
            np.testing.assert_array_equal(getattr(read.tokens, name), getattr(wanted.tokens, name))
    assert shards[1].source == str(written / "shard-00001.safetensors")


def test_a_folder_is_complete_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "emb"
    with pytest.raises(RuntimeError, match="stop"), embedding_files.Writer(path) as writer:
        writer.add(_images())
        raise RuntimeError("stop")
    assert not path.exists()
    with embedding_files.Writer(path) as writer:
        writer.add(_images())
    assert [len(shard) for shard in embedding_files.read(path)] == [3]
    assert [p.name for p in tmp_path.iterdir()] == ["emb"]
    with pytest.raises(DataError, match="emb: exists"):
        embedding_files.Writer(path)


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no embeddings there; write them with owl-det embed"):
        embedding_files.read(tmp_path / "absent")


@pytest.mark.parametrize("kept", [0, 7, 200, -4])
def test_cut_files_are_refused(written: Path, kept: int) -> None:
    file = written / "shard-00000.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(DataError, match="shard-00000.safetensors: cannot be read"):
        list(embedding_files.read(written))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logit_shift": np.zeros((3, 4), np.float32)}, r"logit_shift is F32 \[3, 4\]"),
        ({"boxes": np.zeros((3, 5, 4), np.float16)}, "boxes is F16"),
        ({"sizes": np.zeros((2, 2), np.int32)}, r"sizes is I32 \[2, 2\], expected I32 \[3, 2\]"),
        ({"class_embeddings": np.zeros(3, np.float32)}, "is F32 .*, expected F32"),
        ({"more": np.zeros(1, np.float32)}, "holds .*more"),
    ],
)
def test_arrays_of_other_shapes_are_refused(
    written: Path, change: dict[str, np.ndarray], message: str
) -> None:
    file = written / "shard-00000.safetensors"
    metadata = {
        "format": embedding_files.FORMAT,
        "checkpoint": "abc",
        "image_size": "32",
        "names": '["a", "b", "c"]',
    }
    arrays = load_file(file)
    save_file({**arrays, **change}, file, metadata=metadata)
    with pytest.raises(DataError, match=message):
        list(embedding_files.read(written))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "its format is 'other'"),
        ({"names": "[1, 2, 3]"}, "names are no list of texts"),
        ({"names": "["}, "damaged metadata"),
        ({"image_size": "wide"}, "damaged metadata"),
        ({"image_size": "-32"}, "image_size is -32"),
        ({"names": '["a"]'}, r"expected F32 \[1, 5"),
    ],
)
def test_damaged_metadata_is_refused(written: Path, change: dict[str, str], message: str) -> None:
    file = written / "shard-00000.safetensors"
    metadata = {
        "format": embedding_files.FORMAT,
        "checkpoint": "abc",
        "image_size": "32",
        "names": '["a", "b", "c"]',
    }
    save_file(load_file(file), file, metadata={**metadata, **change})
    with pytest.raises(DataError, match=message):
        list(embedding_files.read(written))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("class_embeddings", np.nan, "1 of the 90 values of class_embeddings are NaN or infinite"),
        ("logit_scale", np.inf, "1 of the 15 values of logit_scale are NaN or infinite"),
        ("sizes", 0, "sizes of images are not positive"),
        ("sizes", -4, "sizes of images are not positive"),
    ],
)
def test_values_that_no_model_writes_are_refused(
    written: Path, name: str, value: float, message: str
) -> None:
    file = written / "shard-00000.safetensors"
    with safe_open(file, framework="numpy") as shard:
        metadata = shard.metadata()
    arrays = load_file(file)
    arrays[name].flat[1] = value
    save_file(arrays, file, metadata=metadata)
    with pytest.raises(DataError, match=message):
        list(embedding_files.read(written))
