"""The files of pseudo-annotated images: written by `owl-det annotate`, read in training.

    <folder>/job.json                          what made the records
             boxes-00003-of-00010.jsonl        one line an image: boxes, and where its pixels are
             images-00003-of-00010.tar         the images, as they came (WebDataset reads it too)
             quarantine-00003-of-00010.jsonl   what could not be read, and why
             shard-00003-of-00010.json         counts; written last: the shard is complete

A line holds `key`, `image` (offset and size in bytes of the encoded file in the tar), `height`,
`width`, `texts`, and for each box, best first, an entry of `boxes_xyxy` (pixels), `scores`,
`phrases` and `spaces` (one of `SPACES`). Scores are those that thresholds are set on: curated
ones carry their factor already. Every box from the job's floor up is there, so thresholds
are chosen when the records are read. Where hard negatives were mined a line also holds
`hard_negatives`, names that the annotator wrongly detects, hardest first, and
`hard_negative_scores`, their best scores without the factor. Records from before have neither.
"""

import contextlib
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float32

from data_pipelines.image_files import is_image
from owl_det import files
from owl_det.errors import DataError

FORMAT = 1
MAX_LINE_BYTES = 64 * 2**20
SPACES = ("curated", "ngrams", "noun_phrases")


@dataclass(frozen=True, kw_only=True)
class PseudoRecord:
    """The boxes of one image, best first."""

    key: str
    height: int
    width: int
    texts: tuple[str, ...]
    boxes_xyxy: Float32[np.ndarray, "m 4"]  # pixels
    scores: Float32[np.ndarray, " m"]
    phrases: tuple[str, ...]
    spaces: tuple[str, ...]
    hard_negatives: tuple[str, ...] | None = None  # None: not mined
    hard_negative_scores: Float32[np.ndarray, " k"] | None = None


def shard_file(folder: Path, kind: str, shard: int, num_shards: int) -> Path:
    """`kind` is boxes, images, quarantine or shard."""
    suffix = {"boxes": "jsonl", "images": "tar", "quarantine": "jsonl", "shard": "json"}[kind]
    return folder / f"{kind}-{shard:05d}-of-{num_shards:05d}.{suffix}"


class ShardWriter:
    """Writes one shard under temporary names; `finish` gives the files their own.

    Used as a context: leaving it before `finish` removes what was written. Another process may be
    writing the same shard: each writes files of its own.
    """

    def __init__(self, folder: Path, shard: int, num_shards: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._summary = shard_file(folder, "shard", shard, num_shards)
        self._unfinished = contextlib.ExitStack()

        def new_file(kind: str) -> BinaryIO:
            target = shard_file(folder, kind, shard, num_shards)
            partial = self._unfinished.enter_context(files.atomic(target, fsync=True))
            return self._unfinished.enter_context(files.open_write(partial))

        self._tar, self._boxes, self._quarantine = map(new_file, ("images", "boxes", "quarantine"))
        self._boxes_hash = hashlib.sha256()

    def add(self, record: PseudoRecord, image: bytes) -> None:
        """Appends one image; `image` is the encoded file."""
        offset = self._add_member(member_name(record.key, image), image)
        line = {
            "key": record.key,
            "image": {"offset": offset, "size": len(image)},
            "height": record.height,
            "width": record.width,
            "texts": list(record.texts),
            "boxes_xyxy": [[round(float(x), 2) for x in box] for box in record.boxes_xyxy],
            "scores": _rounded(record.scores),
            "phrases": list(record.phrases),
            "spaces": list(record.spaces),
        }
        if record.hard_negatives is not None and record.hard_negative_scores is not None:
            line["hard_negatives"] = list(record.hard_negatives)
            line["hard_negative_scores"] = _rounded(record.hard_negative_scores)
        encoded = _line(line)
        self._boxes.write(encoded)
        self._boxes_hash.update(encoded)

    def quarantine(self, key: str, reason: str) -> None:
        self._quarantine.write(_line({"key": key, "reason": reason}))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Renames the files, the summary last: from then on the shard is complete.

        The summary gets `sha256`, that of the boxes.
        """
        self._tar.write(b"\0" * (2 * tarfile.BLOCKSIZE))  # the end of a tar file
        for file in (self._tar, self._boxes, self._quarantine):
            file.close()  # a full disk is found before any file has its name
        self._unfinished.close()
        write_json(self._summary, {**summary, "sha256": self._boxes_hash.hexdigest()})

    def _add_member(self, name: str, content: bytes) -> int:
        """Appends a tar member without owner or time; returns where its content starts."""
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._tar.write(member.tobuf(tarfile.PAX_FORMAT))
        offset = self._tar.tell()
        self._tar.write(content)
        self._tar.write(b"\0" * (-len(content) % tarfile.BLOCKSIZE))
        return offset

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Any error makes `files.atomic` remove what was written; after `finish` nothing is left.
        cause = error or RuntimeError("the shard is not finished")
        self._unfinished.__exit__(type(cause), cause, trace)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file that appears once it is complete."""
    files.write_atomic(path, _document(content), fsync=True)


def write_new_json(path: Path, content: Mapping[str, Any]) -> bool:
    """As `write_json`, unless the file is there or another process makes it: False then."""
    return files.write_new(path, _document(content))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of this format. Raises `DataError` if it is none."""
    try:
        content = json.loads(files.read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path}: no file of owl-det annotate in format {FORMAT}")
    return content


def kept_boxes(
    entry: Mapping[str, Any], *, min_box_score: float, min_image_score: float
) -> list[int]:
    """Indices of a record's boxes that the two thresholds keep."""
    scores = entry["scores"]
    if not len(scores) or max(scores) < min_image_score:
        return []
    return [i for i, score in enumerate(scores) if score >= min_box_score]


def image_suffix(image: bytes) -> str:
    """The suffix of an encoded file, by its first bytes."""
    starts = {b"\xff\xd8": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"BM": ".bmp"}
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return ".webp"
    if image[4:12] == b"ftypavif":
        return ".avif"
    if image[4:8] == b"jP  ":
        return ".jp2"
    return next((suffix for start, suffix in starts.items() if image.startswith(start)), ".img")


def member_name(key: str, image: bytes) -> str:
    """The key, with the suffix of the file's kind unless it has one already.

    Keys are of unknown origin: the name never leads out of a folder the tar is unpacked in.
    """
    inside = key.replace("..", "__").lstrip("/")
    return inside if is_image(inside) else inside + image_suffix(image)


def encode_image(image: bytes | np.ndarray) -> bytes:
    """The file of an image: as it came, or PNG of pixels."""
    if isinstance(image, bytes):
        return image
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _rounded(scores: Float32[np.ndarray, " m"]) -> list[float]:
    return [round(float(score), 5) for score in scores]


def _line(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n").encode()


def _document(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
