"""The annotation job, its records and the source that reads them."""

import dataclasses
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines import image_ops, phrases, pseudo_records
from data_pipelines.features import Record
from data_pipelines.image_ops import UnreadableImage
from data_pipelines.input import TrainInput
from data_pipelines.open_source import open_source
from data_pipelines.readers.image_text_shards import Sample, Unreadable
from data_pipelines.readers.pseudo_boxes import PseudoBoxesReader
from data_pipelines.shapes_world import ShapesWorld
from data_pipelines.tokenizer import ClipTokenizer
from owl_det import cli
from owl_det.annotate import job, label_spaces, report
from owl_det.annotate.annotator import Annotated, Annotator
from owl_det.annotate.run import run_job, shard_range
from owl_det.checkpoints.load import save_model
from owl_det.config import PseudoBoxesSource
from owl_det.errors import DataError
from owl_det.inference.predictor import Predictor
from owl_det.types import LoadedModel
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorflow")


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny.loaded(model__class_prior=0.3, model__class_initial_scale=4.0)


@pytest.fixture(scope="module")
def saved(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "checkpoint"
    save_model(path, model)
    return path


@pytest.fixture(scope="module")
def annotator(model: LoadedModel) -> Annotator:
    space = label_spaces.make("union", ["shapes_world"], max_ngrams=20)
    return Annotator(model, space, batch_size=4, floor=0.01, num_threads=2)


def _samples(indices: list[int]) -> list[Sample]:
    world = ShapesWorld(image_size=32, num_images=64)
    return [Sample(key=str(i), image=world[i].image, texts=world[i].captions) for i in indices]


def _settings(saved: Path, output: Path, **changes: Any) -> job.Settings:
    given: dict[str, Any] = {
        "checkpoint": str(saved),
        "input": "shapes_world:train:10:32",
        "output": str(output),
        "labels": "union",
        "vocabularies": ("shapes_world",),
        "max_ngrams": 20,
        "num_shards": 3,
        "batch_size": 4,
        "min_box_score": 0.05,
        "min_image_score": 0.2,
        "keep_below": 0.01,
    }
    return job.Settings(**{**given, **changes})


def _contents(folder: Path) -> dict[str, bytes]:
    """The records of a job, by file."""
    names = [p.name for kind in ("boxes", "images", "shard") for p in folder.glob(f"{kind}-*")]
    return {name: (folder / name).read_bytes() for name in sorted(names)}


# --- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", ["none", "clip_best7"])
def test_scores_are_those_of_the_predictor(model: LoadedModel, prompts: str) -> None:
    """Each box's best query, curated scores times 0.3, probabilities averaged over prompts."""
    curated = label_spaces.merge_vocabularies([["red circle", "blue star", "cat"]])
    space = label_spaces.LabelSpace(curated=curated, phrases="ngrams", curated_factor=0.3)
    (sample,) = _samples([3])
    sample = Sample(key="a", image=sample.image, texts=("green ring free",))
    annotator = Annotator(model, space, prompt_mode=prompts, batch_size=2, floor=0.0)
    (found,) = annotator.annotate([sample])
    assert isinstance(found, Annotated)

    queries = ["blue star", "cat", "red circle", "green", "green ring", "ring"]
    (every,) = Predictor(model).detect(
        [sample.image], queries, threshold=0.0, top_k=10_000, prompt_mode=prompts
    )
    record = found.record
    assert len(record.scores) == 16
    scaled = every.scores * np.where(every.labels < 3, 0.3, 1.0)
    for box, score, phrase in zip(record.boxes_xyxy, record.scores, record.phrases, strict=True):
        of_box = np.flatnonzero(np.abs(every.boxes - box).max(axis=1) < 0.02)
        assert len(of_box) == len(queries)
        best = of_box[scaled[of_box].argmax()]
        np.testing.assert_allclose(score, scaled[best], rtol=1e-4)
        assert phrase == queries[every.labels[best]]
    assert (np.diff(record.scores) <= 0).all()


def test_an_image_does_not_depend_on_its_neighbours(annotator: Annotator) -> None:
    """Bit for bit, wherever it stands in whatever batch."""

    def find(indices: list[int]) -> dict[str, Annotated]:
        items = list(annotator.annotate(_samples(indices)))
        return {item.record.key: item for item in items if isinstance(item, Annotated)}

    together, others = find([0, 1, 2, 3, 4, 5]), find([9, 4, 8, 0, 7, 6, 5])
    for key in ("0", "4", "5"):
        ours, theirs = together[key].record, others[key].record
        assert ours.phrases == theirs.phrases
        np.testing.assert_array_equal(ours.scores, theirs.scores)
        np.testing.assert_array_equal(ours.boxes_xyxy, theirs.boxes_xyxy)


def test_each_distinct_query_is_encoded_once(annotator: Annotator) -> None:
    samples, counts = _samples([0, 1, 0, 2, 1, 0]), Counter()
    keys = [item.record.key for item in annotator.annotate(samples, counts)]  # pyright: ignore
    assert keys == ["0", "1", "0", "2", "1", "0"]
    queries = {q for sample in samples for q in annotator.space.of_image(sample.texts)}
    assert counts["encoded queries"] == len(queries)
    assert counts["images"] == 6


def test_unreadable_images_are_told_apart(annotator: Annotator) -> None:
    samples: list[Sample | Unreadable] = list(_samples([0, 1, 2]))
    samples.insert(1, Sample(key="bad", image=b"no image", texts=()))
    samples.append(Unreadable(key="gone", reason="no such file"))
    items = list(annotator.annotate(samples))
    assert [i.record.key for i in items if isinstance(i, Annotated)] == ["0", "1", "2"]
    assert [i.key for i in items if isinstance(i, Unreadable)] == ["bad", "gone"]


# --- the job -------------------------------------------------------------------------------------


def test_job_writes_records_that_training_reads(saved: Path, tmp_path: Path) -> None:
    done = run_job(_settings(saved, tmp_path))
    assert done.counts()["images"] == 10
    lines = [
        json.loads(line)
        for file in sorted(tmp_path.glob("boxes-*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    assert [line["key"] for line in lines] == sorted(line["key"] for line in lines)
    with tarfile.open(tmp_path / "images-00000-of-00003.tar") as tar:
        names = [member.name for member in tar]
    assert names == [f"{line['key']}.png" for line in lines if int(line["key"]) < 3]

    reader = PseudoBoxesReader(tmp_path, min_box_score=0.05, min_image_score=0.2)
    kept = [line for line in lines if line["scores"][0] >= 0.2]
    assert len(reader) == len(kept) > 0
    world = ShapesWorld(image_size=32, num_images=10)
    for index, line in enumerate(kept):
        record = reader[index]
        pixels = np.asarray(image_ops.decode_image(record.image))
        np.testing.assert_array_equal(pixels, world[int(line["key"])].image)
        num = sum(score >= 0.05 for score in line["scores"])
        assert record.names == tuple((phrase,) for phrase in line["phrases"][:num])
        np.testing.assert_allclose(record.scores, line["scores"][:num], rtol=1e-6)
        np.testing.assert_allclose(record.boxes_xyxy, line["boxes_xyxy"][:num], rtol=1e-6)
        assert record.negatives == ()
    frequency = {category.name: category.frequency for category in reader.categories}
    name = reader[0].names[0][0]
    assert frequency[name] == sum((name,) in reader[i].names for i in range(len(reader)))
    assert (tmp_path / "report.md").read_text().startswith("# Pseudo-annotation")
    assert {"scores.png", "pictures.png"} <= {path.name for path in tmp_path.iterdir()}
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kept_images"] == len(kept)
    assert report["kept_boxes"] == sum(len(reader[i].names) for i in range(len(reader)))


def test_thresholds_are_chosen_when_records_are_read(saved: Path, tmp_path: Path) -> None:
    run_job(_settings(saved, tmp_path))
    sizes = []
    for low, high in ((0.01, 0.01), (0.05, 0.2), (0.3, 0.4)):
        reader = PseudoBoxesReader(tmp_path, min_box_score=low, min_image_score=high)
        records = [reader[i] for i in range(len(reader))]
        assert all(record.scores.min() >= low for record in records)
        assert all(record.scores.max() >= high for record in records)
        sizes.append(sum(len(record.scores) for record in records))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    with pytest.raises(DataError, match="--keep_below"):
        PseudoBoxesReader(tmp_path, min_box_score=0.005, min_image_score=0.2)
    with pytest.raises(DataError, match="min_image_score"):
        PseudoBoxesReader(tmp_path, min_box_score=0.05, min_image_score=1.0)
    with pytest.raises(DataError, match="min_box_score: 0.3 is above min_image_score, 0.2"):
        PseudoBoxesReader(tmp_path, min_box_score=0.3, min_image_score=0.0)
    reader = PseudoBoxesReader(tmp_path, min_box_score=0.0, min_image_score=0.0)
    told = _settings(saved, tmp_path)
    scores = [reader[i].scores for i in range(len(reader))]
    assert min(map(min, scores)) >= told.min_box_score
    assert min(map(max, scores)) >= told.min_image_score
    job_file = tmp_path / "job.json"
    job_file.write_text(json.dumps(json.loads(job_file.read_text()) | {"image_floor": 0.3}))
    with pytest.raises(DataError, match="min_image_score: 0.2, but of images whose best box"):
        PseudoBoxesReader(tmp_path, min_box_score=0.05, min_image_score=0.2)


def test_what_nobody_knows_is_never_a_negative(saved: Path, tmp_path: Path) -> None:
    """Phrases of weaker boxes, and N-grams of the caption that no box took."""
    run_job(_settings(saved, tmp_path))
    reader = PseudoBoxesReader(tmp_path, min_box_score=0.3, min_image_score=0.3)
    names = {category.name for category in reader.categories}
    for index in range(len(reader)):
        record: Record = reader[index]
        positive = {name for group in record.names for name in group}
        asked = set(phrases.ngrams(record.captions[0], max_ngrams=20)) & names
        assert asked <= positive | set(record.not_exhaustive)
        assert not positive & set(record.not_exhaustive)


def test_curated_names_of_the_caption_are_never_negatives(saved: Path, tmp_path: Path) -> None:
    run_job(_settings(saved, tmp_path, labels="curated", min_box_score=0.01))
    reader = PseudoBoxesReader(tmp_path, min_box_score=0.3, min_image_score=0.3)
    names = {category.name for category in reader.categories}
    held = 0
    for index in range(len(reader)):
        record = reader[index]
        positive = {name for group in record.names for name in group}
        mentioned = set(phrases.phrases_in(record.captions[0])) & names
        assert mentioned <= positive | set(record.not_exhaustive)
        held += len(mentioned)
    assert held


# TextBlob leaves its lexicon open after reading it.
@pytest.mark.filterwarnings("ignore:unclosed file.*textblob:ResourceWarning")
def test_parts_of_noun_phrases_are_never_negatives(saved: Path, tmp_path: Path) -> None:
    """Nor whole ones that no box took; punctuation does not hide them."""
    pytest.importorskip("textblob", reason="needs the extra phrases")
    settings = _settings(
        saved, tmp_path, labels="noun_phrases", vocabularies=(), min_box_score=0.01
    )
    run_job(settings)
    text = "".join(file.read_text() for file in tmp_path.glob("boxes-*.jsonl"))
    assert '"noun_phrases"' in text and '"ngrams"' not in text and '"curated"' not in text
    reader = PseudoBoxesReader(tmp_path, min_box_score=0.3, min_image_score=0.3)
    names = {category.name for category in reader.categories}
    assert names and not any("," in name for name in names)
    for index in range(len(reader)):
        record = reader[index]
        positive = {name for group in record.names for name in group}
        held = set(phrases.phrases_in(record.captions[0])) & names
        assert held and held <= positive | set(record.not_exhaustive)
    assert "noun phrases" in (tmp_path / "report.md").read_text()


def test_training_takes_the_records(saved: Path, tmp_path: Path) -> None:
    run_job(_settings(saved, tmp_path))
    entry = {"kind": "pseudo_boxes", "records": tmp_path.name, "min_box_score": 0.05}
    config = tiny.config(
        data__path=str(tmp_path.parent),
        data__train={"pseudo": {**entry, "min_image_score": 0.2}},
        data__max_instances=40,
        data__max_queries=40,
        data__min_queries=20,
        data__augment={
            "mosaic_sizes": [1, 2],
            "mosaic_probabilities": [0.5, 0.5],
            "tile_scale_min": 0.5,
        },
    )
    example = TrainInput(config).example(0)
    assert example["is_instance"].any()
    assert example["is_query"].sum() >= 20
    assert 0 < example["instance_scores"].max() < 1


def test_rerun_redoes_unfinished_shards_only(saved: Path, tmp_path: Path) -> None:
    run_job(_settings(saved, tmp_path / "whole"))
    folder = tmp_path / "parts"
    run_job(_settings(saved, folder), shard_index=1)
    assert [p.name for p in folder.glob("shard-*")] == ["shard-00001-of-00003.json"]
    assert not (folder / "report.md").exists()
    stamp = (folder / "boxes-00001-of-00003.jsonl").stat().st_mtime_ns
    # As a process leaves them that is killed: a temporary file, and files without a summary.
    (folder / ".boxes-00002-of-00003.jsonl.1.partial").write_text("half")
    (folder / "boxes-00002-of-00003.jsonl").write_text("half")
    run_job(_settings(saved, folder), shard_index=0, shard_step=2)
    assert (folder / "boxes-00001-of-00003.jsonl").stat().st_mtime_ns == stamp
    assert _contents(folder) == _contents(tmp_path / "whole")
    assert not list(folder.glob(".*.partial"))
    assert (folder / "report.md").exists()


def test_a_failing_shard_leaves_nothing_behind(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = job.open_job(_settings(saved, tmp_path))

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(pseudo_records.ShardWriter, "add", fail)
    with pytest.raises(DataError, match="shard 0 of 3: no space left on device; it is not written"):
        opened.run_shard(0)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_fails_completes_no_shard(saved: Path, tmp_path: Path) -> None:
    """Images that are gone with their folder are no property of the data."""
    images, moved = tmp_path / "images", tmp_path / "moved"
    images.mkdir()
    for index in range(2):
        Image.new("RGB", (32, 32)).save(images / f"{index}.png")
    given = {"input": str(images), "labels": "curated", "num_shards": 0}
    opened = job.open_job(_settings(saved, tmp_path / "out", **given))
    (images / "0.png").rename(tmp_path / "0.png")
    images.rename(moved)
    with pytest.raises(DataError, match="no file of shard 0 can be read"):
        opened.run_shard(0)
    assert not opened.is_complete(0)
    moved.rename(images)  # one file alone is quarantined
    opened.run_shard(0)
    assert (opened.counts()["images"], opened.counts()["unreadable"]) == (1, 1)


def test_one_folder_holds_one_job(saved: Path, tmp_path: Path) -> None:
    run_job(_settings(saved, tmp_path), shard_index=0)
    for change in ({"max_ngrams": 21}, {"min_box_score": 0.06}, {"batch_size": 2}):
        with pytest.raises(DataError, match=f"another {next(iter(change))}"):
            run_job(_settings(saved, tmp_path, **change))
    with pytest.raises(DataError, match="--min_box_score: 0.3 is above --min_image_score"):
        run_job(_settings(saved, tmp_path, min_box_score=0.3))
    with pytest.raises(DataError, match="--shard_index"):
        run_job(_settings(saved, tmp_path), shard_index=3)
    assert list(shard_range(3, 3, 4)) == []  # of four processes the last has nothing to do
    for given in ({"shard_step": 2}, {"shard_index": 0, "shard_step": -1}):
        with pytest.raises(DataError, match="--shard_step"):
            run_job(_settings(saved, tmp_path), **given)


def test_corrupt_images_are_quarantined_and_counted(saved: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    world = ShapesWorld(image_size=32, num_images=4)
    for index in range(4):
        image_ops.decode_image(world[index].image).save(images / f"{index}.png")
        (images / f"{index}.txt").write_text(world[index].captions[0])
    for index in (1, 3):
        broken = (images / f"{index}.png").read_bytes()[:-40]
        (images / f"{index}.png").write_bytes(broken)
    out = tmp_path / "out"
    arguments = ["annotate", "--checkpoint", str(saved), "--input", str(images), "--output"]
    arguments += [str(out), "--labels", "ngrams", "--max_ngrams", "20", "--min_image_score", "0.1"]
    assert cli.main(arguments) == 1  # more than one, and more than 1 %
    lines = (out / "quarantine-00000-of-00001.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["1.png", "3.png"]
    assert json.loads((out / "report.json").read_text())["unreadable"] == 2
    reader = open_source(PseudoBoxesSource(min_image_score=0.1), str(out))
    assert [image_ops.image_size(reader[i].image) for i in range(len(reader))] == [(32, 32)] * 2  # pyright: ignore[reportArgumentType]


def test_user_errors_are_one_line(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["annotate", "--checkpoint", str(saved), "--output", str(tmp_path / "out"), "--input"]
    for extra, part in (
        (["absent"], "--input"),
        (["shapes_world:train:4", "--labels", "union"], "--vocabulary"),
        (["shapes_world:train:4", "--labels", "n-grams"], "--labels: 'n-grams' is neither a file"),
        (["shapes_world:train:4", "--labels", "ngrams", "--shards", "-1"], "--shards"),
        (["shapes_world:train:4", "--labels", "ngrams", "--keep_below", "2"], "--keep_below"),
        (["shapes_world:train:4", "--labels", "ngrams", "--hard_negatives", "5"], "--hard_neg"),
    ):
        assert cli.main([*base, *extra]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert part in line


def test_names_in_the_tar_file_stay_in_its_folder() -> None:
    png = pseudo_records.encode_image(np.zeros((2, 2, 3), np.uint8))
    assert pseudo_records.member_name("a/1", png) == "a/1.png"
    assert pseudo_records.member_name("a/1.JPG", png) == "a/1.JPG"
    assert pseudo_records.member_name("/../../etc/x", png) == "__/__/etc/x.png"


# --- hard negatives ------------------------------------------------------------------------------


def test_hard_negatives_score_high_and_win_no_box(model: LoadedModel) -> None:
    """Of the curated names' best scores, as the predictor finds them, without the factor."""
    names = ["red circle", "blue star", "cat", "green ring", "ring", "purple cross"]
    curated = label_spaces.merge_vocabularies([names])
    space = label_spaces.LabelSpace(curated=curated, phrases="ngrams", curated_factor=0.3)
    (sample,) = _samples([3])
    sample = Sample(key="a", image=sample.image, texts=("green ring free",))
    annotator = Annotator(model, space, batch_size=2, floor=0.0, num_hard_negatives=3)
    (found,) = annotator.annotate([sample])
    plain = Annotator(model, space, batch_size=2, floor=0.0)
    (without,) = plain.annotate([sample])
    assert isinstance(found, Annotated) and isinstance(without, Annotated)
    assert found.record.phrases == without.record.phrases
    np.testing.assert_array_equal(found.record.scores, without.record.scores)
    assert without.record.hard_negatives is None

    queries = [*curated.names, "green"]
    (every,) = Predictor(model).detect(
        [sample.image], queries, threshold=0.0, top_k=10_000, prompt_mode="none"
    )
    best = {n: every.scores[every.labels == i].max() for i, n in enumerate(queries)}
    boxes, places = np.unique(every.boxes.round(1), axis=0, return_inverse=True)
    winners = set()
    for box in range(len(boxes)):
        of_box = np.flatnonzero(places == box)
        winners.add(queries[every.labels[of_box[every.scores[of_box].argmax()]]])
    # A phrase of one word is part of every name that holds it.
    there = winners | set(found.record.phrases) | {"green ring", "ring"}
    words = [set(phrase.split()) for phrase in there]
    expected = [
        name
        for name in sorted(curated.names, key=lambda n: -best[n])
        if not any(set(name.split()) <= w or w <= set(name.split()) for w in words)
    ]
    assert expected and len(boxes) == 16
    assert found.record.hard_negatives == tuple(expected[:3])
    np.testing.assert_allclose(
        found.record.hard_negative_scores, [best[n] for n in expected[:3]], rtol=1e-4
    )


def test_training_asks_the_hardest_negatives(saved: Path, tmp_path: Path) -> None:
    done = run_job(_settings(saved, tmp_path, hard_negatives=5, labels="curated"))
    lines = [
        json.loads(line)
        for file in sorted(tmp_path.glob("boxes-*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    mined = [line["hard_negatives"] for line in lines]
    assert done.counts()["hard negatives"] == sum(map(len, mined)) > len(lines)
    for line in lines:
        scores = line["hard_negative_scores"]
        assert scores == sorted(scores, reverse=True) and len(scores) == len(line["hard_negatives"])
    assert json.loads((tmp_path / "report.json").read_text())["hard_negatives"]
    assert "| hard negative |" in (tmp_path / "report.md").read_text()

    thresholds = {"min_box_score": 0.05, "min_image_score": 0.05}
    reader = PseudoBoxesReader(tmp_path, **thresholds, hard_negatives=3)
    assert len(reader) == len(lines)
    assert [reader[i].negatives for i in range(len(lines))] == [tuple(m[:3]) for m in mined]
    plain = PseudoBoxesReader(tmp_path, **thresholds)
    assert plain[0].negatives == () and plain.version != reader.version
    with pytest.raises(DataError, match="--hard_negatives 6"):
        PseudoBoxesReader(tmp_path, **thresholds, hard_negatives=6)
    with pytest.raises(DataError, match="another hard_negatives"):
        run_job(_settings(saved, tmp_path, labels="curated"))

    entry = {"kind": "pseudo_boxes", "hard_negatives": 3, **thresholds}
    config = tiny.config(
        data__path=str(tmp_path),
        data__train={"pseudo": entry},
        data__max_instances=40,
        data__max_queries=40,
    )
    packed = TrainInput(config).example(0)
    names = mined[int(packed["image_id"])][:3]
    tokens = {x.tobytes() for x in packed["query_tokens"][packed["is_query"]]}
    assert names and {x.tobytes() for x in ClipTokenizer(8).encode_all(names)} <= tokens


def test_names_of_other_sources_that_a_caption_holds_are_never_negatives(
    saved: Path, tmp_path: Path
) -> None:
    run_job(_settings(saved, tmp_path))
    reader = PseudoBoxesReader(tmp_path, min_box_score=0.05, min_image_score=0.2)
    known = {category.name for category in reader.categories}
    for index in range(len(reader)):
        record = reader[index]
        boxed = {name for names in record.names for name in names}
        said = {n for text in record.captions for n in phrases.phrases_in(text)} - boxed
        assert said - known and said <= set(record.not_exhaustive)


def test_an_image_too_long_for_the_square_is_quarantined(model: LoadedModel) -> None:
    preprocess = dataclasses.replace(model.preprocess, resize="gaussian")
    stretched = dataclasses.replace(model, preprocess=preprocess)
    annotator = Annotator(stretched, label_spaces.make("ngrams", [], max_ngrams=4), batch_size=1)
    long = Sample(key="long", image=np.zeros((1, 15_000, 3), np.uint8), texts=())
    (found,) = annotator.annotate([long])
    assert isinstance(found, Unreadable) and "padded to a square" in found.reason


def test_another_preprocessing_is_another_job(
    model: LoadedModel, saved: Path, tmp_path: Path
) -> None:
    run_job(_settings(saved, tmp_path / "records"), shard_index=0)
    preprocess = dataclasses.replace(model.preprocess, pad_value=0.0)
    other = tmp_path / "other"
    save_model(other, dataclasses.replace(model, preprocess=preprocess))
    with pytest.raises(DataError, match="another model"):
        run_job(_settings(other, tmp_path / "records"))


def test_pictures_of_the_report_are_of_a_bounded_size(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "PICTURE_SIDE", 16)
    monkeypatch.setattr(report, "draw_best", lambda image, *_, **__: image)
    run_job(_settings(saved, tmp_path))
    content = json.loads((tmp_path / "job.json").read_text())
    pictures = list(report._pictures(tmp_path, content))
    assert pictures and all(max(picture.shape[:2]) == 16 for picture in pictures)


def test_records_from_before_hard_negatives_are_read_and_continued(
    saved: Path, tmp_path: Path
) -> None:
    run_job(_settings(saved, tmp_path), shard_index=0)
    file = tmp_path / "job.json"
    content = json.loads(file.read_text())
    del content["hard_negatives"], content["model"]
    file.write_text(json.dumps(content))
    run_job(_settings(saved, tmp_path))
    assert '"hard_negatives"' not in (tmp_path / "boxes-00000-of-00003.jsonl").read_text()
    reader = PseudoBoxesReader(tmp_path, min_box_score=0.05, min_image_score=0.2)
    assert len(reader) and reader[0].negatives == ()
    with pytest.raises(DataError, match="holds 0 of an image"):
        PseudoBoxesReader(tmp_path, min_box_score=0.05, min_image_score=0.2, hard_negatives=1)


# --- records of unknown origin -------------------------------------------------------------------


@pytest.fixture
def records(saved: Path, tmp_path: Path) -> Path:
    run_job(_settings(saved, tmp_path, num_shards=1))
    return tmp_path


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"offset":512', '"offset":99999999'),
        ('"offset":512', '"offset":-1'),
        ('"scores":[', '"scores":[2,'),
        ('"scores":[', '"scores":[NaN,'),
        ('"phrases":[', '"phrases":[1,'),
        ('"boxes_xyxy":[[', '"boxes_xyxy":[[0,0,0,0],['),
        ('{"key"', '{"kex"]'),
        ('{"key"', '{"hard_negatives":[3],"key"'),
        ('{"key"', '{"hard_negatives":"cat","key"'),
    ],
)
def test_malformed_records_are_named(records: Path, old: str, new: str) -> None:
    file = records / "boxes-00000-of-00001.jsonl"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match="line 1"):
        PseudoBoxesReader(records, min_box_score=0.05, min_image_score=0.2)


def test_missing_records_are_named(records: Path) -> None:
    reader = PseudoBoxesReader(records, min_box_score=0.05, min_image_score=0.2)
    (records / "images-00000-of-00001.tar").write_bytes(b"")
    with pytest.raises(UnreadableImage, match="ends within"):
        reader[0]
    (records / "shard-00000-of-00001.json").unlink()
    with pytest.raises(DataError, match="run the same owl-det annotate again"):
        PseudoBoxesReader(records, min_box_score=0.05, min_image_score=0.2)
    with pytest.raises(DataError, match="`records`"):
        PseudoBoxesReader(records / "absent", min_box_score=0.05, min_image_score=0.2)
