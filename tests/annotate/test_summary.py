"""What `owl-det annotate` tells its user, and its exit codes."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import pseudo_records
from data_pipelines.shapes_world import ShapesWorld
from owl_det import cli
from owl_det.annotate import job, run
from owl_det.checkpoints import identity
from owl_det.errors import DataError
from tests import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    return tiny.save(folder, model__class_prior=0.3, model__class_initial_scale=4.0)


def encoded(index: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(ShapesWorld(image_size=32, num_images=8)[index].image)).save(
        buffer, kind
    )
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def annotate(saved: Path, where: Path, out: Path, *more: str) -> int:
    given = ["annotate", "--checkpoint", str(saved), "--input", str(where), "--output", str(out)]
    return cli.main([*given, "--max_ngrams", "20", "--min_image_score", "0.2", *more])


def test_what_was_found_is_said(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        (images / f"{i}.jpg").write_bytes(encoded(i, "JPEG"))
    (images / "0.jpg").write_bytes(encoded(0, "JPEG")[:-2])
    (images / "0.txt").write_text("\ufeffa red circle")
    (images / "1.txt").write_text("0 0.5 0.5 0.1 0.1")
    more = ("--vocabulary", "shapes_world")
    assert annotate(saved, images, tmp_path / "out", *more) == 0
    said = capsys.readouterr()
    counts = json.loads(said.out)
    assert (counts["images"], counts["images_without_a_caption"]) == (4, 3)
    assert "of 4 images kept, with" in said.err
    assert "owl-det: 3 of 4 images have no caption" in said.err
    assert "owl-det: 1 of 4 images end early: read as far as they go" in said.err
    assert "owl-det: 1 of 4 images: its text holds numbers of boxes" in said.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["captioned_images"], report["images_that_end_early"]) == (1, 1)
    assert "note" not in json.dumps(report["label_space"])
    assert "| with a caption | 1 |" in (tmp_path / "out" / "report.md").read_text()
    # Run again there is nothing to do, and the same is said.
    assert annotate(saved, images, tmp_path / "out", *more) == 0
    assert "owl-det: 3 of 4 images have no caption" in capsys.readouterr().err


def test_nothing_kept_is_said(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": encoded(0), "a.txt": b"a red circle"})
    more = ("--labels", "ngrams", "--min_image_score", "1")
    assert annotate(saved, tmp_path / "a.tar", tmp_path / "out", *more) == 0
    assert "owl-det: 0 of 1 images kept: no box scored 1 or more" in capsys.readouterr().err


def test_phrases_without_captions_are_refused(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "a.tar", {f"{i}.png": encoded(i) for i in range(3)})
    assert annotate(saved, tmp_path / "a.tar", tmp_path / "out", "--labels", "ngrams") == 2
    assert "3 of 3 images have no caption" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    more = ("--labels", "curated", "--vocabulary", "shapes_world")
    assert annotate(saved, tmp_path / "a.tar", tmp_path / "out", *more) == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("page", "it is a page"),
        ("cut", "the tar file is damaged from here on"),
        ("empty", "it is empty"),
        ("dots", "3 images have the key 'v1'"),
    ],
)
def test_losses_are_said_and_exit_with_1(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, message: str
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    members = {"a.png": encoded(0), "a.txt": b"a red circle", "b.png": encoded(1)}
    write_tar(shards / "0.tar", members)
    write_tar(shards / "1.tar", members)
    file = shards / "1.tar"
    if damage == "page":
        file.write_text("<html>404</html>" * 100)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:2600])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        write_tar(file, {**members, **{f"v1.{i}.png": encoded(i) for i in range(3)}})
    assert annotate(saved, shards, tmp_path / "out", "--labels", "ngrams") == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    (line, *_) = (tmp_path / "out" / "quarantine-00001-of-00002.jsonl").read_text().splitlines()
    assert message in json.loads(line)["reason"]
    assert annotate(saved, shards, tmp_path / "out", "--labels", "ngrams") == 1  # as before
    assert message in capsys.readouterr().err


def test_thresholds_and_addresses_are_checked(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": encoded(0), "a.txt": b"a red circle"})
    for more, message in (
        (("--min_box_score", "nan"), "--min_box_score"),
        (("--min_image_score", "1.5"), "--min_image_score"),
        (("--keep_below", "-0.1"), "--keep_below"),
        (("--vocabulary", "gs://bucket/names.txt"), "gs://bucket/names.txt is an address"),
        (("--labels", "s3://bucket/names.txt"), "s3://bucket/names.txt is an address"),
        (("--input", "gs://bucket/x"), "gs://bucket/x is an address"),
        (("--output", "gs://bucket/x"), "gs://bucket/x is an address"),
    ):
        assert annotate(saved, tmp_path / "a.tar", tmp_path / "out", *more) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_jobs_that_start_at_once_do_not_share_a_folder(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that comes second finds the other's job.json although it was not there before."""
    settings = job.Settings(
        checkpoint=str(saved),
        input="shapes_world:train:2:32",
        output=str(tmp_path),
        vocabularies=("shapes_world",),
    )
    opened = job.Job(settings)
    other = {**opened.describe(), "max_ngrams": 7}
    exists = Path.exists

    def appears(path: Path, **options: bool) -> bool:
        if path.name == "job.json" and not exists(path):
            pseudo_records.write_json(path, other)
            return False
        return exists(path, **options)

    monkeypatch.setattr(Path, "exists", appears)
    with pytest.raises(DataError, match="another max_ngrams"):
        opened.claim()
    assert pseudo_records.read_json(tmp_path / "job.json")["max_ngrams"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["job.json"]


def test_a_job_of_an_earlier_version_goes_on(saved: Path, tmp_path: Path) -> None:
    """Its job.json holds the hash that version 0.1 made of the same parameters."""
    settings = job.Settings(
        checkpoint=str(saved),
        input="shapes_world:train:2:32",
        output=str(tmp_path),
        vocabularies=("shapes_world",),
    )
    opened = job.Job(settings)
    former = identity.former_parameter_hash(opened.annotator.model.params)
    written = {**opened.describe(), "checkpoint": former}
    assert written != opened.describe()
    pseudo_records.write_json(tmp_path / "job.json", written)
    opened.claim()
    pseudo_records.write_json(tmp_path / "job.json", {**written, "checkpoint": "0" * 16})
    with pytest.raises(DataError, match=f"another checkpoint \\('{'0' * 16}' there"):
        opened.claim()


def test_a_shard_that_another_process_completes_is_no_error(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It clears temporary files away when all is done, also those of a process beside it."""
    settings = job.Settings(
        checkpoint=str(saved),
        input="shapes_world:train:2:32",
        output=str(tmp_path),
        vocabularies=("shapes_world",),
    )
    opened = job.Job(settings)
    finish = pseudo_records.ShardWriter.finish

    def second(writer: pseudo_records.ShardWriter, summary: dict[str, object]) -> None:
        monkeypatch.setattr(pseudo_records.ShardWriter, "finish", finish)
        opened.run_shard(0)
        run.remove_partial(tmp_path)
        finish(writer, summary)

    monkeypatch.setattr(pseudo_records.ShardWriter, "finish", second)
    opened.run_shard(0)
    assert opened.is_complete(0) and opened.counts()["images"] == 2
    assert not list(tmp_path.glob(".*.partial"))
