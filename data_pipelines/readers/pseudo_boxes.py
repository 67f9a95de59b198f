"""Pseudo-annotated images: the records that `owl-det annotate` writes, as a source."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64

from data_pipelines import label_ops, phrases, pseudo_records
from data_pipelines.features import Category, Names, Record
from data_pipelines.image_ops import UnreadableImage
from data_pipelines.label_counts import LabelCounts
from owl_det import files
from owl_det.config import digest
from owl_det.errors import DataError


class _Images(NamedTuple):
    """All kept images of a folder as flat arrays; `first_box` has one more entry, the end."""

    shard: Int32[np.ndarray, " i"]
    offset: Int64[np.ndarray, " i"]
    size: Int64[np.ndarray, " i"]
    first_box: Int64[np.ndarray, " i1"]
    texts: list[tuple[str, ...]]
    hard_negatives: list[Names]


class _Boxes(NamedTuple):
    boxes_xyxy: Float32[np.ndarray, "m 4"]
    scores: Float32[np.ndarray, " m"]
    phrase: Int32[np.ndarray, " m"]  # into the list of phrases


class PseudoBoxesReader:
    """Random access to pseudo-annotated images. Implements `source.Source`.

    An image counts if its best box scores at least `min_image_score`; of it, boxes that score at
    least `min_box_score` are instances. The first `hard_negatives` of the names that the annotator
    wrongly detects are its negatives. No other name is known to be absent, so more negatives come
    from the pool of the phrases of all images. Never drawn for an image are phrases that its weaker
    boxes or its texts hold, whatever the label space: nobody knows whether those are there.
    """

    def __init__(
        self,
        folder: Path,
        *,
        min_box_score: float,
        min_image_score: float,
        hard_negatives: int = 0,
    ):
        """A threshold of 0 is the one that the job was told.

        Raises `DataError` if the records are missing, incomplete, malformed or all filtered.
        """
        job = read_job(folder)
        min_box_score = min_box_score or float(job["min_box_score"])
        min_image_score = min_image_score or float(job["min_image_score"])
        _check_thresholds(folder, job, min_box_score, min_image_score, hard_negatives)
        self.name = str(folder)
        self._folder = folder
        self._num_shards = int(job["num_shards"])
        self._min_box_score = min_box_score
        self._max_ngrams = int(job["max_ngrams"])
        self._uses_ngrams = job.get("uses_ngrams") is True
        summaries = [_summary(folder, shard, self._num_shards) for shard in range(self._num_shards)]
        self._phrases: list[str] = []
        self._num_left_out = 0  # boxes of images that do not count
        self._images, self._boxes = self._read_boxes(min_image_score, hard_negatives)
        if not self._images.texts:
            raise DataError(
                f"{folder}: no image has a box of {min_image_score} or more; lower the key "
                "`min_image_score` of the source"
            )
        self.categories = self._categories()
        self.counts = self._count(min_image_score)
        content = [entry.get("sha256") for entry in summaries]
        chosen = [content, min_box_score, min_image_score]
        chosen += [hard_negatives] if hard_negatives else []  # else the version of before
        self.version = f"pseudo_boxes-{digest(chosen)}"

    def __len__(self) -> int:
        return len(self._images.texts)

    def __getitem__(self, index: int) -> Record:
        """Raises `UnreadableImage` if the file of images has changed or gone."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = self._images.first_box[index : index + 2]
        boxes, scores, phrase = (x[start:end] for x in self._boxes)
        keep = scores >= self._min_box_score
        names = [self._phrases[i] for i in phrase]
        positive = {name for name, kept in zip(names, keep, strict=True) if kept}
        texts = self._images.texts[index]
        maybe = dict.fromkeys((*names, *self._phrases_of(texts)))
        return Record(
            image=self._read_image(index),
            image_id=index,
            boxes_xyxy=boxes[keep],
            names=tuple((name,) for name, kept in zip(names, keep, strict=True) if kept),
            is_crowd=np.zeros(int(keep.sum()), bool),
            scores=scores[keep],
            negatives=self._images.hard_negatives[index],
            not_exhaustive=tuple(name for name in maybe if name not in positive),
            captions=texts,
            source=f"{self.name}[{index}]",
        )

    def _phrases_of(self, texts: tuple[str, ...]) -> Names:
        """What the image's texts say, with and, of N-grams, without punctuation between words."""
        said = [n for text in texts for n in phrases.phrases_in(text)]
        if self._uses_ngrams:  # the published ones keep punctuation
            limit = self._max_ngrams
            said += [n for text in texts for n in phrases.ngrams(text, max_ngrams=limit)]
        return tuple(said)

    def _read_image(self, index: int) -> bytes:
        file = self._file("images", int(self._images.shard[index]))
        size = int(self._images.size[index])
        try:
            image = files.open_range(file, int(self._images.offset[index]), size)
        except OSError as error:
            raise UnreadableImage(f"{file}: {error.strerror}") from error
        if len(image) != size:
            raise UnreadableImage(f"{file}: ends within the image of record {index}")
        return image

    def _file(self, kind: str, shard: int) -> Path:
        return pseudo_records.shard_file(self._folder, kind, shard, self._num_shards)

    def _read_boxes(self, min_image_score: float, num_hard: int) -> tuple[_Images, _Boxes]:
        """The images that count, with all their boxes; fills the list of phrases."""
        known: dict[str, int] = {}
        place: list[tuple[int, int, int]] = []
        texts: list[tuple[str, ...]] = []
        hard_negatives: list[Names] = []
        boxes: list[np.ndarray] = [np.zeros((0, 4), np.float32)]
        scores: list[np.ndarray] = [np.zeros(0, np.float32)]
        phrase: list[int] = []
        for shard, entry in read_entries(self._folder, self._num_shards):
            if not len(entry["scores"]) or entry["scores"].max() < min_image_score:
                self._num_left_out += len(entry["scores"])
                continue
            place.append((shard, entry["image"]["offset"], entry["image"]["size"]))
            texts.append(tuple(entry["texts"]))
            hard_negatives.append(tuple(entry["hard_negatives"][:num_hard]))
            boxes.append(entry["boxes_xyxy"])
            scores.append(entry["scores"])
            phrase += [known.setdefault(p, len(known)) for p in entry["phrases"]]
        self._phrases = list(known)
        places = np.array(place, np.int64).reshape(-1, 3)
        images = _Images(
            shard=places[:, 0].astype(np.int32),
            offset=places[:, 1],
            size=places[:, 2],
            first_box=np.cumsum([len(of_image) for of_image in scores]),
            texts=texts,
            hard_negatives=hard_negatives,
        )
        phrases = np.array(phrase, np.int32)
        return images, _Boxes(np.concatenate(boxes), np.concatenate(scores), phrases)

    def _categories(self) -> tuple[Category, ...]:
        """The phrases of kept boxes; `frequency` is the number of images with them."""
        is_kept = self._boxes.scores >= self._min_box_score
        image = np.repeat(np.arange(len(self)), np.diff(self._images.first_box))
        pairs = np.unique(np.stack([image, self._boxes.phrase], axis=1)[is_kept], axis=0)
        frequency = Counter(pairs[:, 1].tolist())
        return tuple(
            Category(id=number, name=self._phrases[phrase], frequency=float(count))
            for number, (phrase, count) in enumerate(sorted(frequency.items()), start=1)
        )

    def _count(self, min_image_score: float) -> LabelCounts:
        is_kept = self._boxes.scores >= self._min_box_score
        by_phrase = Counter(self._boxes.phrase[is_kept].tolist())
        dropped = Counter(
            {
                f"that score below {self._min_box_score}": int((~is_kept).sum()),
                f"of images without a box of {min_image_score} or more": self._num_left_out,
            }
        )
        return LabelCounts(
            num_images=len(self),
            num_empty=0,  # an image counts if it has a box
            boxes={self._phrases[phrase]: count for phrase, count in sorted(by_phrase.items())},
            dropped=dict(+dropped),
            num_negatives=sum(len(names) for names in self._images.hard_negatives),
            is_federated=True,
        )


def _check_thresholds(
    folder: Path,
    job: Mapping[str, Any],
    min_box_score: float,
    min_image_score: float,
    hard_negatives: int,
) -> None:
    """Raises `DataError` if the records of the job do not hold what is asked for."""
    if min_box_score < job["floor"]:
        raise DataError(
            f"min_box_score: {min_box_score} is below {job['floor']}, from where boxes were kept "
            f"in {folder}; raise it, or annotate again with a lower --keep_below"
        )
    if min_image_score < job["image_floor"]:
        raise DataError(
            f"min_image_score: {min_image_score}, but of images whose best box is below "
            f"{job['image_floor']} {folder} holds nothing; raise it, or annotate again with a "
            "lower --keep_below"
        )
    if min_box_score > min_image_score:
        raise DataError(
            f"min_box_score: {min_box_score} is above min_image_score, {min_image_score}: "
            "images would be left without a box; raise min_image_score (0: the job's)"
        )
    num_mined = job.get("hard_negatives", 0)  # files from before they were mined have none
    if hard_negatives > num_mined:
        raise DataError(
            f"hard_negatives: {hard_negatives}, but {folder} holds {num_mined} of an image; "
            f"annotate again with --hard_negatives {hard_negatives}"
        )


def read_job(folder: Path) -> dict[str, Any]:
    """The job.json of some records. Raises `DataError` if it is missing or malformed."""
    job = pseudo_records.read_json(_existing(folder / "job.json"))
    keys = ("floor", "image_floor", "max_ngrams", "num_shards", "min_box_score", "min_image_score")
    for key in (*keys, *(("hard_negatives",) if "hard_negatives" in job else ())):
        value = job.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**31:
            raise DataError(f"{folder}/job.json: {key} is missing or no number in range")
    return job


def read_entries(folder: Path, num_shards: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """All shards' lines, checked, boxes and scores as arrays; each with its shard.

    Raises `DataError` at the first that is malformed, or if a shard is not complete.
    """
    for shard in range(num_shards):
        _summary(folder, shard, num_shards)
        file = _existing(pseudo_records.shard_file(folder, "boxes", shard, num_shards))
        tar = _existing(pseudo_records.shard_file(folder, "images", shard, num_shards))
        end = tar.stat().st_size
        with files.open_read(file) as lines:
            for number, line in enumerate(lines, start=1):
                yield shard, _parse(line, end, f"{file}, line {number}")


def _summary(folder: Path, shard: int, num_shards: int) -> dict[str, Any]:
    path = pseudo_records.shard_file(folder, "shard", shard, num_shards)
    if not path.is_file():
        raise DataError(
            f"{path}: missing, so shard {shard} of {num_shards} is not complete; "
            "run the same owl-det annotate again"
        )
    return pseudo_records.read_json(path)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; correct the key `records` or `path` of the source to a folder "
            "that owl-det annotate wrote"
        )
    return path


def _parse(line: bytes, tar_size: int, where: str) -> dict[str, Any]:
    """A line with its boxes and scores as arrays. Raises `DataError` if it is malformed."""
    if len(line) > pseudo_records.MAX_LINE_BYTES:
        raise DataError(f"{where}: {len(line)} bytes; the limit is {pseudo_records.MAX_LINE_BYTES}")
    try:
        entry = json.loads(line)
        with np.errstate(over="ignore"):  # what is infinite is found out below
            boxes = np.asarray(entry["boxes_xyxy"], np.float32).reshape(-1, 4)
            scores = np.asarray(entry["scores"], np.float32).reshape(-1)
        phrases, texts = entry["phrases"], entry["texts"]
        mined = entry.get("hard_negatives", [])  # lines from before they were mined have none
        offset, size = entry["image"]["offset"], entry["image"]["size"]
        sides = (entry["height"], entry["width"])
        is_sound = (
            isinstance(entry["key"], str)
            and all(isinstance(values, list) for values in (phrases, texts))
            and len(boxes) == len(scores) == len(phrases)
            and isinstance(mined, list)
            and all(isinstance(phrase, str) and phrase for phrase in (*phrases, *mined))
            and set(mined).isdisjoint(phrases)
            and all(isinstance(text, str) for text in texts)
            and isinstance(offset, int)
            and isinstance(size, int)
            and 0 < size <= size + offset <= tar_size
            and bool(((scores >= 0) & (scores <= 1)).all())
            and all(isinstance(side, int) and 0 < side < 2**31 for side in sides)
            and bool(label_ops.drop_degenerate(boxes, *sides).all())
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(f"{where}: no record of owl-det annotate ({error!r})") from None
    if not is_sound:
        raise DataError(f"{where}: values out of range; annotate the shard again")
    return {**entry, "boxes_xyxy": boxes, "scores": scores, "hard_negatives": mined}
