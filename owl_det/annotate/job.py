"""The annotation job: one output shard for each input shard, complete or absent.

Shards are independent. One machine takes them in turn; Apache Beam (`beam_runner`) or an array of
processes, each with its own `--shard_index`, divide them (`run`). Whoever runs a shard does the
same: annotate it, write temporary files, rename them, the summary last. A shard with a summary is
never done again, so a job that was killed goes on where it stopped when the same command is run
again.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from absl import logging

from data_pipelines import phrases, pseudo_records
from data_pipelines.pseudo_records import ShardWriter
from data_pipelines.readers import image_text_inputs
from data_pipelines.readers.image_text_shards import ImageTextShards, Sample, Unreadable
from owl_det.annotate import label_spaces
from owl_det.annotate.annotator import Annotator
from owl_det.checkpoints import identity
from owl_det.checkpoints.load import load_detector
from owl_det.config import digest
from owl_det.errors import DataError

# What a job.json means that was written before there were these keys.
_BEFORE = {"hard_negatives": 0, "uses_noun_phrases": False}

# Keys of counts; see `annotator` for others.
DAMAGED, EMPTY = "damaged shards", "shards without an image"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the records depend on, and how they are made."""

    checkpoint: str
    input: str  # as in `image_text_inputs.open_shards`
    output: str
    labels: str = "union"  # as in `label_spaces.make`
    vocabularies: tuple[str, ...] = ()
    max_ngrams: int = phrases.MAX_NGRAMS  # or noun phrases
    prompts: str = ""  # empty = those the model is evaluated with
    num_shards: int = 0  # of a folder or shapes world; 0 = a thousand images each
    batch_size: int = 8
    min_box_score: float = 0.1
    min_image_score: float = 0.3
    keep_below: float = 0.05  # weaker boxes and images stay in the records down to here
    num_threads: int = 0
    hard_negatives: int = 0  # names mined of each image


class Job:
    """An annotator, its input and its output folder."""

    def __init__(self, settings: Settings):
        """Raises `UserError` if the model, the input or a label list cannot be used."""
        _check(settings)
        self.settings, self.folder = settings, Path(settings.output)
        self.report: dict[str, Any] | None = None  # once all shards are complete
        self.shards = image_text_inputs.open_shards(settings.input, settings.num_shards)
        self.space = label_spaces.make(settings.labels, settings.vocabularies, settings.max_ngrams)
        if settings.hard_negatives and not self.space.curated.names:
            raise DataError(
                "--hard_negatives: they are mined from curated names, and --labels "
                f"{settings.labels} has none"
            )
        if not self.space.curated.names:
            _require_captions(self.shards, settings.labels)
        model = load_detector(settings.checkpoint)
        self.annotator = Annotator(
            model,
            self.space,
            prompt_mode=settings.prompts,
            batch_size=settings.batch_size,
            floor=min(settings.keep_below, settings.min_box_score),
            num_threads=settings.num_threads,
            num_hard_negatives=settings.hard_negatives,
        )
        self.image_floor = min(settings.keep_below, settings.min_image_score)

    def claim(self) -> None:
        """Writes job.json, or compares it: one folder never holds records of two jobs."""
        file, ours = self.folder / "job.json", self.describe()
        if not file.exists() and pseudo_records.write_new_json(file, ours):
            return
        theirs = {"model": ours["model"], **_BEFORE, **pseudo_records.read_json(file)}
        self._accept_former_ids(ours, theirs)
        # The same input may have been named otherwise; its version is that of its content.
        different = [key for key in ours if key != "input" and theirs.get(key) != ours[key]]
        if different:
            key = different[0]
            raise DataError(
                f"{file}: the records there were made with another {key} "
                f"({_short(theirs.get(key))} there, {_short(ours[key])} now); use a new --output"
            )

    def _accept_former_ids(self, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
        """Ids that version 0.1 gave the same model take the place of ours."""
        model = self.annotator.model
        if theirs["model"] == identity.former_settings_hash(model):
            ours["model"] = theirs["model"]
        recorded = theirs.get("checkpoint")
        if recorded not in (None, ours["checkpoint"]):
            if recorded == identity.former_parameter_hash(model.params):
                ours["checkpoint"] = recorded

    def describe(self) -> dict[str, Any]:
        settings, space = self.settings, self.space
        return {
            "format": pseudo_records.FORMAT,
            "input": self.shards.name,
            "input_version": self.shards.version,
            "num_shards": len(self.shards),
            "labels": settings.labels,
            "num_curated": len(space.curated.names),
            "uses_ngrams": space.phrases == "ngrams",
            "uses_noun_phrases": space.phrases == "noun_phrases",
            "max_ngrams": space.max_ngrams,
            "curated_factor": space.curated_factor,
            "label_space": digest(space.describe()),
            "prompts": self.annotator.prompt_mode,
            "min_box_score": settings.min_box_score,
            "min_image_score": settings.min_image_score,
            "floor": self.annotator.floor,
            "image_floor": self.image_floor,
            "batch_size": settings.batch_size,
            "hard_negatives": settings.hard_negatives,
            "checkpoint_step": self.annotator.model.step,
            "checkpoint": identity.parameter_hash(self.annotator.model.params),
            "model": identity.settings_hash(self.annotator.model),
        }

    def is_complete(self, shard: int) -> bool:
        return self._file("shard", shard).is_file()

    def run_shard(self, shard: int) -> None:
        """Annotates one shard and writes its files, unless they are complete.

        Raises `DataError` where the file system fails; of the shard nothing stays then.
        """
        if self.is_complete(shard):
            return
        try:
            self._run_shard(shard)
        except OSError as error:
            if self.is_complete(shard):
                return  # by another process, which cleared our temporary files away
            raise DataError(
                f"shard {shard} of {len(self.shards)}: {error}; it is not written, and the same "
                "command goes on with it"
            ) from error

    def _run_shard(self, shard: int) -> None:
        counts: Counter[str] = Counter()
        started = time.time()
        with ShardWriter(self.folder, shard, len(self.shards)) as writer:
            for item in self.annotator.annotate(self.shards.samples(shard), counts):
                if isinstance(item, Unreadable):
                    counts["unreadable"] += 1
                    counts.update([DAMAGED] if item.is_damage else [])
                    writer.quarantine(item.key, item.reason)
                    continue
                scores = item.record.scores
                if len(scores) and scores[0] >= self.image_floor:
                    counts["recorded images"] += 1
                    counts["recorded boxes"] += len(scores)
                    if item.record.hard_negatives:
                        counts["hard negatives"] += len(item.record.hard_negatives)
                    writer.add(item.record, pseudo_records.encode_image(item.image))
            if not counts["images"]:
                counts[EMPTY] += 1
            summary = {"format": pseudo_records.FORMAT, "counts": dict(sorted(counts.items()))}
            writer.finish(summary)
        seconds = time.time() - started
        logging.info(
            "Shard %d of %d: %d images, %d unreadable, %.1f images/s",
            *(shard, len(self.shards), counts["images"], counts["unreadable"]),
            counts["images"] / max(seconds, 1e-9),
        )

    def counts(self, shards: Iterable[int] | None = None) -> Counter[str]:
        """Total counts over those of `shards` that are complete (default: all)."""
        total: Counter[str] = Counter()
        for shard in range(len(self.shards)) if shards is None else shards:
            if self.is_complete(shard):
                summary = pseudo_records.read_json(self._file("shard", shard))
                total.update(summary["counts"])
        return total

    def _file(self, kind: str, shard: int) -> Path:
        return pseudo_records.shard_file(self.folder, kind, shard, len(self.shards))


_opening = threading.Lock()


def open_job(settings: Settings) -> Job:
    """The job, opened once in a process, which may have several threads that ask for it."""
    with _opening:
        return _open_job(settings)


@lru_cache(maxsize=1)
def _open_job(settings: Settings) -> Job:
    return Job(settings)


def _require_captions(shards: ImageTextShards, labels: str) -> None:
    """Raises `DataError` if there are images and none has a caption: nothing would be asked.

    Reads up to the first caption. What cannot be read is for the shard's own run to report.
    """
    num_images, note = 0, ""
    for shard in range(len(shards)):
        try:
            for sample in shards.samples(shard):
                if isinstance(sample, Sample):
                    num_images += 1
                    note = note or sample.note
                    if sample.texts:
                        return
        except OSError:
            return
    if num_images:
        raise DataError(
            f"--input {shards.name}: {num_images} of {num_images} images have no caption"
            f"{f' ({note})' if note else ''}, and --labels {labels} asks only what captions say; "
            "docs/annotate.md says where captions are looked for, or use --labels curated"
        )


def _check(settings: Settings) -> None:
    """Raises `DataError` naming the flag of a value that is out of range."""
    for key in ("min_box_score", "min_image_score", "keep_below"):
        value = getattr(settings, key)
        if not 0 <= value <= 1:
            raise DataError(f"--{key}: {value}, but scores lie in [0, 1]")
    if settings.min_box_score > settings.min_image_score:
        raise DataError(
            f"--min_box_score: {settings.min_box_score} is above --min_image_score, "
            f"{settings.min_image_score}: images would be left without a box"
        )
    for key in ("batch_size", "max_ngrams"):
        if getattr(settings, key) < 1:
            raise DataError(f"--{key}: {getattr(settings, key)}, but must be at least 1")
    for flag, value in (
        ("hard_negatives", settings.hard_negatives),
        ("shards", settings.num_shards),
        ("num_threads", settings.num_threads),
    ):
        if value < 0:
            raise DataError(f"--{flag}: {value}, but must not be negative")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
