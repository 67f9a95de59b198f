"""TFRecord files of tf.train.Example with an encoded image and its captions."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.readers import captions
from data_pipelines.readers.image_text_shards import (
    Place,
    Sample,
    Unreadable,
    read_spans,
    version_of,
    what_it_is,
)
from owl_det import files
from owl_det.errors import DataError
from owl_det.optional import is_installed, leave_accelerators_to_jax

MAX_RECORD_BYTES = 256 * 2**20
IMAGE_KEYS = ("image/encoded", "image", "jpg", "png", "jpeg", "image_bytes", "encoded")
# The first that the record has; then any of `captions.CAPTION_KEYS`, in their spelling.
TEXT_KEYS = ("caption", "image/caption", "text", "txt")
COMPRESSED = (".gz", ".zlib", ".zst", ".bz2", ".xz")


class TfRecordShards:
    """The samples of .tfrecord files, one shard a file. Implements `LocatedShards`."""

    def __init__(self, where: str, files: Sequence[Path]):
        """Raises `DataError` if TensorFlow is missing or a file is compressed."""
        if not is_installed("tensorflow"):
            raise DataError(
                f"{where}: reading TFRecord needs TensorFlow: pip install tensorflow, or store the "
                "pairs in .tar files (WebDataset), which need nothing"
            )
        for file in files:
            if file.suffix in COMPRESSED:
                raise DataError(f"{file}: is compressed; decompress it first")
        leave_accelerators_to_jax()
        self._files = files
        self.name, self.version = where, version_of("tfrecord", files)

    def __len__(self) -> int:
        return len(self._files)

    def samples(self, shard: int) -> Iterator[Sample | Unreadable]:
        import tensorflow as tf

        file = self._files[shard]
        position = 0
        try:
            for position, raw in enumerate(
                tf.data.TFRecordDataset(str(files.fetch(file))), start=1
            ):
                yield _sample(f"{position - 1:08d}", bytes(raw.numpy()), tf)
        except tf.errors.DataLossError as error:
            yield self._damage(shard, position, str(error.message))
        except tf.errors.OpError as error:
            raise OSError(f"{file}: {error.message}") from error
        else:
            # TensorFlow takes up to eleven bytes after a record for the end of the file.
            yield from (place for place in self.locate(shard) if isinstance(place, Unreadable))

    def locate(self, shard: int) -> Iterator[Place | Unreadable]:
        """From the lengths alone: unlike `samples` it looks at no checksum.

        A record is a length (8 bytes), its checksum (4), the data, and the data's checksum (4).
        """
        file = self._files[shard]
        end, offset, number = file.stat().st_size, 0, 0
        with files.open_read(file) as opened:
            while offset < end:
                opened.seek(offset)
                size = int.from_bytes(opened.read(8), "little")
                if size > MAX_RECORD_BYTES or offset + size + 16 > end:
                    reason = f"{file.name} is damaged, or compressed, from byte {offset} on"
                    kind = "" if offset else what_it_is(file)
                    reason = f"{file.name} is no TFRecord file: it is {kind}" if kind else reason
                    yield Unreadable(key=f"{number:08d}", reason=reason, is_damage=True)
                    return
                yield Place(key=f"{number:08d}", numbers=(offset + 12, size))
                offset += size + 16
                number += 1
        if not number:
            yield Unreadable(key=file.name, reason="the file holds no record", is_damage=True)

    def fetch(self, shard: int, place: Place) -> Sample | Unreadable:
        import tensorflow as tf

        file = self._files[shard]
        try:
            (raw,) = read_spans(file, [place.numbers])
        except OSError as error:
            return Unreadable(key=place.key, reason=f"{file.name}: {error}")
        return _sample(place.key, raw, tf)

    def _damage(self, shard: int, position: int, message: str) -> Unreadable:
        """With the number of records that are lost, as far as their lengths tell."""
        file = self._files[shard]
        places = [place for place in self.locate(shard) if isinstance(place, Place)]
        lost = f" ({len(places) - position} records are lost)" if len(places) > position else ""
        kind = "" if position else what_it_is(file)
        reason = f"{file.name} is damaged from here on{lost}: {message}"
        reason = f"{file.name} is no TFRecord file: it is {kind}" if kind else reason
        return Unreadable(key=f"{position:08d}", reason=reason, is_damage=True)


def _sample(key: str, raw: bytes, tf: Any) -> Sample | Unreadable:
    from google.protobuf.message import DecodeError

    try:
        features = tf.train.Example.FromString(raw).features.feature
    except DecodeError:
        return Unreadable(key=key, reason="no tf.train.Example")
    images = [features[k].bytes_list.value for k in IMAGE_KEYS if k in features]
    if not images or len(images[0]) != 1:
        there = ", ".join(sorted(features)[:8]) or "none"
        reason = f"not one image under {' or '.join(IMAGE_KEYS)}; its features: {there}"
        return Unreadable(key=key, reason=reason)
    keys = (*TEXT_KEYS, *(key for key in captions.CAPTION_KEYS if key not in TEXT_KEYS))
    names = [
        name for key in keys for name in (key, key.upper(), f"image/{key}") if name in features
    ]
    try:
        found = [captions.of_values(features[name].bytes_list.value) for name in names]
    except ValueError as error:
        return Unreadable(key=key, reason=f"its text cannot be read: {error}")
    note = ""
    if not names:
        others = sorted(name for name in features if not name.startswith("image"))
        note = f"it has the features {', '.join(others[:8])}; none is a caption" if others else ""
    texts = next((texts for texts in found if texts), ())
    return Sample(key=key, image=images[0][0], texts=texts, note=note)
