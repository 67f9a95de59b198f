"""What an annotation job found: counts, a histogram of scores, pictures."""

import heapq
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import image_ops, pseudo_records
from data_pipelines.image_ops import UnreadableImage
from owl_det import files
from owl_det.annotate import label_spaces
from owl_det.annotate.annotator import ENDS_EARLY, NO_CAPTION, NOTE
from owl_det.annotate.label_spaces import CURATED_FACTOR, LabelSpace, escape_markdown
from owl_det.viz.detections import draw_best
from owl_det.viz.pictures import picture_grid, save_png
from owl_det.viz.score_histogram import plot_score_histogram

NUM_PICTURES = 15
PICTURE_SIDE = 516  # pixels; larger images are shrunk, so that three fit into a row
NUM_PHRASES = 50  # in the table
MAX_PHRASES = 10_000  # in report.json: the N-grams of many captions are mostly of one image each
BINS = 40  # of scores, over [0, 1]


def write(folder: Path, space: LabelSpace, counts: Mapping[str, int]) -> dict[str, Any]:
    """Writes report.json, report.md and PNGs beside complete records; returns the first."""
    job = pseudo_records.read_json(folder / "job.json")
    content = measure(folder, job, counts)
    content["label_space"] = label_spaces.table(space, _rules(counts))
    plot_score_histogram(folder / "scores.png", content["histogram"], job["min_box_score"])
    pictures = list(_pictures(folder, job))
    if pictures:
        save_png(folder / "pictures.png", picture_grid(pictures, columns=3))
    pseudo_records.write_json(folder / "report.json", content)
    text = _markdown(content, job, bool(pictures))
    files.write_atomic(
        folder / "report.md", text + label_spaces.table_markdown(space, _rules(counts))
    )
    return content


def measure(folder: Path, job: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, Any]:
    """Counts over all records; "kept" is what the job's thresholds keep."""
    phrases: Counter[str] = Counter()
    spaces: Counter[str] = Counter()
    images_with: Counter[str] = Counter()
    histogram = np.zeros((len(pseudo_records.SPACES), BINS), int)
    hard_negatives: Counter[str] = Counter()
    kept_images = 0
    for entry in _records(folder, job):
        scores = np.asarray(entry["scores"])
        for row, space in enumerate(pseudo_records.SPACES):
            of_space = scores[[s == space for s in entry["spaces"]]]
            histogram[row] += np.histogram(of_space, BINS, (0, 1))[0]
        kept = _kept(entry, job)
        kept_images += bool(kept)
        phrases.update(entry["phrases"][i] for i in kept)
        spaces.update(entry["spaces"][i] for i in kept)
        images_with.update({entry["phrases"][i] for i in kept})
        hard_negatives.update(entry.get("hard_negatives", ()) if kept else ())
    return {
        "format": pseudo_records.FORMAT,
        "images": counts.get("images", 0),
        "unreadable": counts.get("unreadable", 0),
        "recorded_images": counts.get("recorded images", 0),
        "recorded_boxes": counts.get("recorded boxes", 0),
        "kept_images": kept_images,
        "kept_boxes": sum(phrases.values()),
        "kept_by_space": dict(sorted(spaces.items())),
        "encoded_queries": counts.get("encoded queries", 0),
        "cut_queries": counts.get("cut queries", 0),
        "num_phrases": len(phrases),
        "phrases": [
            {"phrase": phrase, "boxes": n, "images": images_with[phrase]}
            for phrase, n in heapq.nsmallest(
                MAX_PHRASES, phrases.items(), key=lambda item: (-item[1], item[0])
            )
        ],
        "hard_negatives": dict(hard_negatives.most_common(MAX_PHRASES)),
        "histogram": {
            space: histogram[row].tolist() for row, space in enumerate(pseudo_records.SPACES)
        },
        "captioned_images": counts.get("images", 0) - counts.get(NO_CAPTION, 0),
        "images_that_end_early": counts.get(ENDS_EARLY, 0),
        "notes": {key.removeprefix(NOTE): n for key, n in counts.items() if key.startswith(NOTE)},
        "unreadable_reasons": dict(
            reasons(folder, job["num_shards"], range(job["num_shards"])).most_common()
        ),
    }


def _kept(entry: Mapping[str, Any], job: Mapping[str, Any]) -> list[int]:
    return pseudo_records.kept_boxes(
        entry, min_box_score=job["min_box_score"], min_image_score=job["min_image_score"]
    )


def _rules(counts: Mapping[str, int]) -> dict[str, int]:
    """The counts that the label space's rules made."""
    others = {"images", "unreadable", "recorded images", "recorded boxes"}
    others |= {"encoded queries", "cut queries", "hard negatives"}
    others |= {NO_CAPTION, ENDS_EARLY, "damaged shards", "shards without an image"}
    return {k: n for k, n in counts.items() if k not in others and not k.startswith(NOTE)}


def _records(folder: Path, job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The lines of all shards, each with the tar file that holds its image."""
    for shard in range(job["num_shards"]):
        file = pseudo_records.shard_file(folder, "boxes", shard, job["num_shards"])
        tar = pseudo_records.shard_file(folder, "images", shard, job["num_shards"])
        with files.open_read(file) as lines:
            for line in lines:
                yield {**json.loads(line), "tar": tar}


def reasons(folder: Path, num_shards: int, shards: Iterable[int]) -> Counter[str]:
    """Why things could not be read, of complete shards."""
    found: Counter[str] = Counter()
    for shard in shards:
        file = pseudo_records.shard_file(folder, "quarantine", shard, num_shards)
        with files.open_read(file) as lines:
            found.update(json.loads(line)["reason"] for line in lines)
    return found


def _pictures(folder: Path, job: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """The first kept images, with their kept boxes drawn; a phrase has one colour in all."""
    left = NUM_PICTURES
    colors: dict[str, int] = {}
    for entry in _records(folder, job):
        kept = _kept(entry, job)
        if not kept:
            continue
        encoded = files.open_range(entry["tar"], entry["image"]["offset"], entry["image"]["size"])
        try:
            image = image_ops.decode_image(encoded)
        except UnreadableImage:
            continue  # it could be read when it was annotated; a picture less is no loss
        width = image.width
        image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        phrases = [entry["phrases"][i] for i in kept]
        yield draw_best(
            np.asarray(image),
            np.array([entry["boxes_xyxy"][i] for i in kept]) * (image.width / width),
            phrases,
            np.array([entry["scores"][i] for i in kept]),
            classes=[colors.setdefault(phrase, len(colors)) for phrase in phrases],
            lowest=job["min_box_score"],  # curated names score at most 0.3
        )
        left -= 1
        if not left:
            return


def _phrases_title(num_phrases: int) -> list[str]:
    shown = f"the {NUM_PHRASES} most frequent of {num_phrases:,}"
    return ["", f"## Phrases kept{f': {shown}' if num_phrases > NUM_PHRASES else ''}", ""]


def _why_scores_stop(histogram: Mapping[str, Sequence[int]], labels: str) -> list[str]:
    """Curated names are worth less where phrases of captions are asked beside them."""
    if not labels.startswith("union") or not any(histogram["curated"]):
        return []
    return [
        f"Scores of curated names end at {CURATED_FACTOR:g}: beside phrases of captions they are "
        f"multiplied by that, so that a caption's own words win (OWL-ST, appendix A.3).",
        "",
    ]


def _markdown(content: Mapping[str, Any], job: Mapping[str, Any], has_pictures: bool) -> str:
    kept = ", ".join(f"{n:,} {space}" for space, n in content["kept_by_space"].items())
    lines = [
        "# Pseudo-annotation",
        "",
        f"Input {escape_markdown(job['input'])}, label space {escape_markdown(job['labels'])}, "
        f"prompts {job['prompts']}, annotator {job['checkpoint']} (step {job['checkpoint_step']}).",
        "",
        "| | |",
        "|---|---|",
        f"| images read | {content['images']:,} |",
        f"| with a caption | {content['captioned_images']:,} |",
        f"| that end early, read as far as they go | {content['images_that_end_early']:,} |",
        f"| unreadable | {content['unreadable']:,} |",
        f"| recorded (a box ≥ {job['image_floor']}) | {content['recorded_images']:,} images, "
        f"{content['recorded_boxes']:,} boxes ≥ {job['floor']} |",
        f"| kept (a box ≥ {job['min_image_score']}) | {content['kept_images']:,} images, "
        f"{content['kept_boxes']:,} boxes ≥ {job['min_box_score']} ({kept or 'none'}) |",
        f"| distinct phrases kept | {content['num_phrases']:,} |",
        f"| queries encoded | {content['encoded_queries']:,}, {content['cut_queries']:,} cut |",
        "",
        "![Scores](scores.png)",
        "",
        *_why_scores_stop(content["histogram"], job["labels"]),
    ]
    if has_pictures:
        lines += ["![Kept boxes](pictures.png)", ""]
    for note, n in content["notes"].items():
        lines += [f"- {n:,} images: {escape_markdown(note)}"]
    for reason, n in content["unreadable_reasons"].items():
        lines += [f"- {n:,} unreadable: {escape_markdown(reason)}"]
    lines += _phrases_title(content["num_phrases"])
    lines += ["| phrase | boxes | images |", "|---|---|---|"]
    lines += [
        f"| {escape_markdown(entry['phrase'])} | {entry['boxes']:,} | {entry['images']:,} |"
        for entry in content["phrases"][:NUM_PHRASES]
    ]
    if content["hard_negatives"]:
        lines += ["", "| hard negative | kept images |", "|---|---|"]
        most = list(content["hard_negatives"].items())[:NUM_PHRASES]
        lines += [f"| {escape_markdown(name)} | {n:,} |" for name, n in most]
    return "\n".join([*lines, "", ""])
