"""What a run's data must hold, looked at before the first step: boxes, captions, ground truth."""

from collections.abc import Callable, Mapping, Sequence
from enum import Enum

import numpy as np
from absl import logging

from data_pipelines.features import Record
from data_pipelines.image_ops import UnreadableImage, is_tolerable
from data_pipelines.label_counts import LabelCounts, dropped_text
from data_pipelines.source import Source
from owl_det.config import Config
from owl_det.errors import DataError, SourceError

_LOOKED_AT = 256  # records of a source that does not count its labels


class Presence(Enum):
    """What looking at the records of a source told."""

    SOME = "some"
    NONE = "none"  # of all records
    NOT_SEEN = "not seen"  # among those looked at


def log_what_was_read(group: str, sources: Mapping[str, Source]) -> None:
    """A few lines for every source: images, boxes by name, what was dropped and why, negatives."""
    for name, source in sources.items():
        counts = counts_of(source)
        if counts is None:
            logging.info(
                "%s %s: %d images, %d names; its labels are made or read image by image",
                *(group, name, len(source), len(source.categories)),
            )
            continue
        for line in counts.lines(f"{group} {name}"):
            logging.info("%s", line)


def require_training_labels(config: Config, sources: Mapping[str, Source]) -> None:
    """Raises `DataError` if all training sources together hold nothing that the task learns from.

    Warns of each source that alone holds nothing, and where no name is known to be absent.
    """
    if _needs_boxes(config):
        _require_boxes(sources)
    if config.has_heads:
        _warn_of_no_negatives(config, sources)
    if config.data.with_captions:
        _require_captions(sources)


def require_ground_truth(config: Config, sources: Mapping[str, Source]) -> None:
    """Raises `DataError` for an evaluation set that nothing can be measured on."""
    limit = config.evaluation.max_images
    for name, source in sources.items():
        where = f"config.data.eval.{name}"
        boxes = _boxes(source, limit)
        if config.has_heads:
            if boxes is Presence.NONE:
                raise DataError(
                    f"{where}: no usable box{_in_first(limit, source)} to measure against: "
                    f"{told(source)}; mend its labels, or leave the set out"
                )
        elif boxes is Presence.NONE and _captions(source, limit) is Presence.NONE:
            raise DataError(
                f"{where}: neither boxes nor captions{_in_first(limit, source)} to measure "
                f"against: {told(source)}; mend its labels, or leave the set out"
            )


def require_boxes(source: Source) -> None:
    """Raises `DataError` for a data set to measure on that counts its boxes, and has none."""
    counts = counts_of(source)
    if counts is not None and not counts.num_boxes:
        raise DataError(
            f"{source.name}: no usable box to measure against: {told(source)}; mend its labels"
        )


def require_files(source: Source, max_images: int = 0) -> None:
    """Raises `DataError` if of a folder's first images more than 1 % are not there; 0 = all."""
    missing_of: Callable[[int], list[str]] | None = getattr(source, "missing", None)
    num_images = min(len(source), max_images or len(source))
    missing = missing_of(num_images) if missing_of else []
    if not is_tolerable(len(missing), num_images):
        raise SourceError(
            f"{source.name}: {len(missing)} of {num_images} images are not there, such as "
            f"{missing[0]}",
            keys="add them, or correct the key `images` of the source",
            flags="add them, or correct --images",
        )


# --- training ------------------------------------------------------------------------------------


def _needs_boxes(config: Config) -> bool:
    if config.has_heads:
        return True
    if config.task != "distill" or config.distill.regions.kind != "proposals":
        return False
    from owl_det.distillation import branches

    return bool(branches.needs(config.distill) & {"regions", "dense_regions"})


def _require_boxes(sources: Mapping[str, Source]) -> None:
    found = {name: _boxes(source) for name, source in sources.items()}
    if all(value is Presence.NONE for value in found.values()):
        all_told = "; ".join(f"{name}: {told(source)}" for name, source in sources.items())
        raise DataError(
            "config.data.train: no usable box in any source, so there is nothing to learn "
            f"({all_told})"
        )
    for name, value in found.items():
        where = f"config.data.train.{name}"
        if value is Presence.NONE:
            logging.warning("%s: no usable box: %s", where, told(sources[name]))
        elif value is Presence.NOT_SEEN:
            logging.warning("%s: no usable box in the %d images looked at", where, _LOOKED_AT)


def _warn_of_no_negatives(config: Config, sources: Mapping[str, Source]) -> None:
    known = [counts for source in sources.values() if (counts := counts_of(source)) is not None]
    names = {category.name.lower() for source in sources.values() for category in source.categories}
    has_others = config.data.batch_negatives or (config.data.min_queries > 0 and len(names) > 1)
    if has_others or len(known) < len(sources) or any(c.num_negatives for c in known):
        return
    logging.warning(
        "config.data.train: of no image is a name known to be absent, and config.data.min_queries "
        "adds none: the model does not learn to say no to a name that an image lacks"
    )


def _require_captions(sources: Mapping[str, Source]) -> None:
    found = {name: _captions(source) for name, source in sources.items()}
    if all(value is Presence.NONE for value in found.values()):
        raise DataError(
            f"config.data.train: no image of {', '.join(sources)} has a caption, and "
            "config.data.with_captions asks for them"
        )
    if Presence.SOME not in found.values():
        logging.warning(
            "config.data.train: no caption in the %d images looked at of each source", _LOOKED_AT
        )


# --- looking -------------------------------------------------------------------------------------


def counts_of(source: Source) -> LabelCounts | None:
    """Not every source counts: labels that are drawn, or read one by one."""
    return getattr(source, "counts", None)


def _boxes(source: Source, limit: int = 0) -> Presence:
    """Whether there are usable boxes among the first `limit` images; 0 = all."""
    counts = counts_of(source)
    is_whole = not limit or limit >= len(source)
    if counts is not None and (is_whole or not counts.num_boxes):
        return Presence.SOME if counts.num_boxes else Presence.NONE
    return _look(source, limit, _has_box)


def _has_box(record: Record) -> bool:
    return bool(np.any(~np.asarray(record.is_crowd, bool)))


def _captions(source: Source, limit: int = 0) -> Presence:
    return _look(source, limit, lambda record: any(text.strip() for text in record.captions))


def _look(source: Source, limit: int, has: Callable[[Record], bool]) -> Presence:
    """Looks at records all over the first `limit`, until one has it."""
    count = min(len(source), limit or len(source))
    indices = _spread(count)
    for index in indices:
        try:
            if has(source[index]):
                return Presence.SOME
        except UnreadableImage:  # told where it is trained on
            continue
    return Presence.NONE if len(indices) == count else Presence.NOT_SEEN


def _spread(count: int) -> Sequence[int]:
    """At most `_LOOKED_AT` of `count` indices, evenly."""
    step = max(count / _LOOKED_AT, 1.0)
    return [int(i * step) for i in range(min(count, _LOOKED_AT))]


def told(source: Source) -> str:
    """`12 images, 30 of 30 boxes dropped: 30 without area`."""
    counts = counts_of(source)
    if counts is None:
        return f"{len(source)} images"
    parts = [f"{counts.num_images} images"]
    parts += [f"{counts.num_crowd} crowd regions"] if counts.num_crowd else []
    dropped = counts.num_dropped
    parts += [dropped_text(counts.dropped, counts.num_read)] if dropped else []
    return ", ".join(parts if len(parts) > 1 else [*parts, "no box in the files"])


def _in_first(limit: int, source: Source) -> str:
    is_part = 0 < limit < len(source)
    return f" in the first {limit} images (config.evaluation.max_images)" if is_part else ""
