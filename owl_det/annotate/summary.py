"""What a process of an annotation job tells its user at its end."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipelines.image_ops import is_tolerable
from owl_det.annotate import report
from owl_det.annotate.annotator import ENDS_EARLY, NO_CAPTION, NOTE
from owl_det.annotate.job import DAMAGED, EMPTY, Job

_MAX_REASONS = 3  # of what could not be read


@dataclass(frozen=True)
class Summary:
    """Of the shards of one process."""

    lines: tuple[str, ...]  # of what was found, and what is amiss
    losses: tuple[str, ...]  # why the command did not do all of its work; empty = it did


def of_job(job: Job, shards: Sequence[int]) -> Summary:
    """Reads the summaries and the quarantine of those of `shards` that are complete.

    What was kept is known once all shards of the job are: the report holds it.
    """
    counts = job.counts(shards)
    lines = [_found(job, counts), *_amiss(counts)]
    reasons = report.reasons(job.folder, len(job.shards), filter(job.is_complete, shards))
    return Summary(tuple(lines), tuple(_losses(counts, reasons)))


def _found(job: Job, counts: Counter[str]) -> str:
    settings, content = job.settings, job.report
    if content is None:
        return (
            f"{counts['recorded images']} of {counts['images']} images of this process's shards "
            f"have a box of {job.image_floor:g} or more; others are still to be done"
        )
    kept, images = content["kept_images"], content["images"]
    if not images:
        return "no image could be read"
    if not kept:
        return f"0 of {images} images kept: no box scored {settings.min_image_score:g} or more"
    return (
        f"{kept} of {images} images kept, with {content['kept_boxes']} boxes of "
        f"{settings.min_box_score:g} or more"
    )


def _amiss(counts: Mapping[str, int]) -> list[str]:
    images = counts.get("images", 0)
    lines = [
        f"{counts[key]} of {images} images {said}"
        for key, said in (
            (NO_CAPTION, "have no caption"),
            (ENDS_EARLY, "end early: read as far as they go"),
        )
        if counts.get(key)
    ]
    notes = Counter({k.removeprefix(NOTE): n for k, n in counts.items() if k.startswith(NOTE)})
    lines += [f"{n} of {images} images: {note}" for note, n in notes.most_common(_MAX_REASONS)]
    return lines


def _losses(counts: Mapping[str, int], reasons: Counter[str]) -> list[str]:
    unreadable = counts.get("unreadable", 0)
    total = counts.get("images", 0) + unreadable
    losses: list[str] = []
    if damaged := counts.get(DAMAGED, 0):
        said = "1 shard is" if damaged == 1 else f"{damaged} shards are"
        losses.append(f"{said} damaged, and what follows the damage is lost")
    if empty := counts.get(EMPTY, 0):
        losses.append(f"{empty} {'shard' if empty == 1 else 'shards'} gave no image")
    if not is_tolerable(unreadable, total):
        losses.append(f"{unreadable} of {total} images could not be read")
    if losses:
        losses += [f"{n} × {reason}" for reason, n in reasons.most_common(_MAX_REASONS)]
        if len(reasons) > _MAX_REASONS:
            losses.append(f"{len(reasons) - _MAX_REASONS} more reasons: see quarantine-*.jsonl")
    return losses


def as_json(counts: Mapping[str, int]) -> dict[str, Any]:
    """The counts of the whole job for the command's one line on stdout."""
    keys = ("images", "unreadable", "recorded images", "recorded boxes")
    line = {key.replace(" ", "_"): counts.get(key, 0) for key in keys}
    return line | {"images_without_a_caption": counts.get(NO_CAPTION, 0)}
