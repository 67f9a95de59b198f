"""Packs examples into the fixed shapes of a batch (`owl_det.types.Batch`)."""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64

from data_pipelines import prompts, query_sets
from data_pipelines.features import Example, Names
from data_pipelines.tokenizer import Tokenizer

Arrays = dict[str, np.ndarray]

# What was left out of an example, in the order of the `counts` array of a packed example.
COUNTS = (
    "unreadable_images",
    "degenerate_boxes",
    "tiny_boxes",
    "dropped_queries",
    "dropped_instances",
    "cut_texts",
    "cut_captions",
    "images_without_caption",
)


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Static sizes of a batch."""

    max_instances: int
    max_queries: int
    min_queries: int
    max_tiles: int
    num_positions: int  # of texts
    with_captions: bool = False
    with_names: bool = False  # examples carry their queries' names, for `with_batch_negatives`


def pack(
    example: Example,
    pool: query_sets.Pool,
    tokenizer: Tokenizer,
    shapes: Shapes,
    *,
    prompt_mode: str,
    shuffle_labels: bool,
    rng: np.random.Generator,
) -> Arrays:
    """One training example as arrays of fixed shape; `query_tokens` are not yet deduplicated.

    With `shuffle_labels` the labels point at random queries of the image: a control that must
    learn nothing about names.
    """
    queries = query_sets.make(
        example.names,
        example.negatives,
        pool,
        excluded=example.excluded,
        max_queries=shapes.max_queries,
        min_queries=shapes.min_queries,
        rng=rng,
    )
    order = rng.permutation(len(queries.names)) if shuffle_labels else None
    texts = [prompts.train_prompt(name, prompt_mode, rng) for name in queries.names]
    tokens = tokenizer.encode_all(texts)
    queries, first = _merge_same_texts(queries, tokens)
    labels = queries.labels
    if order is not None:
        labels = labels[:, order[order < len(first)]]
    arrays = _pack_instances(example, labels, shapes, rng)
    q = shapes.max_queries
    arrays["image"] = example.image
    arrays["is_example"] = np.array(True)
    arrays["image_id"] = np.array(example.image_id, np.int32)
    arrays["original_size"] = np.array(example.original_size, np.int32)
    arrays["query_tokens"] = _padded(tokens[first], (q, shapes.num_positions))
    arrays["is_query"] = _padded(np.ones(len(first), bool), (q,))
    t = shapes.max_tiles
    arrays["tile_boxes"] = _padded(example.tile_boxes_cxcywh, (t, 4))
    arrays["tile_image_id"] = _padded(example.tile_image_id, (t,), fill=-1)
    counts = dict(example.counts)
    counts["dropped_queries"] = queries.num_dropped
    counts["dropped_instances"] = int(
        len(example.names) - arrays["instance_scores"].astype(bool).sum()
    )
    counts["cut_texts"] = sum(not tokenizer.fits(text) for text in texts)
    if shapes.with_captions:
        chosen = [_choose(tile, rng) for tile in example.tile_captions]
        captions = [
            tile[i] if tile else "" for tile, i in zip(example.tile_captions, chosen, strict=True)
        ]
        # Which of the image's captions it is: a teacher's cache knows them by this number.
        arrays["caption_index"] = _padded(np.array(chosen, np.int32), (t,))
        arrays["caption_tokens"] = _padded(
            tokenizer.encode_all(captions), (t, shapes.num_positions)
        )
        arrays["is_caption"] = _padded(np.array([bool(c) for c in captions], bool), (t,))
        counts["images_without_caption"] = sum(not caption for caption in captions)
        counts["cut_captions"] = sum(not tokenizer.fits(caption) for caption in captions)
    arrays["counts"] = np.array([counts.get(name, 0) for name in COUNTS], np.int32)
    if shapes.with_names:
        arrays["query_names"] = _packed_names(example, queries.names)
    return arrays


def _merge_same_texts(
    queries: query_sets.QuerySet, tokens: Int32[np.ndarray, "q l"]
) -> tuple[query_sets.QuerySet, Int64[np.ndarray, " u"]]:
    """The queries whose tokens differ, with the labels of those they stand for, and their rows.

    Names may differ where tokens do not ("dog," and "dog" to SigLIP; two long ones that are cut):
    the model sees one query, which cannot be right and wrong about the same box.
    """
    first_of: dict[bytes, int] = {}
    firsts = [first_of.setdefault(row.tobytes(), i) for i, row in enumerate(tokens)]
    first = np.array(list(first_of.values()), np.int64)
    if len(first) == len(firsts):
        return queries, first
    labels = queries.labels.copy()
    for column, target in enumerate(firsts):
        labels[:, target] |= queries.labels[:, column]
    names = tuple(queries.names[i] for i in first)
    return dataclasses.replace(queries, names=names, labels=labels[:, first]), first


def _packed_names(example: Example, asked: Names) -> np.ndarray:
    """The names asked, in order, and those never to be asked as negatives: JSON, as one object."""
    positives = [name for names in example.names for name in names]
    never = sorted({*positives, *example.excluded} - {*asked})
    return np.array(json.dumps({"asked": asked, "never": never}).encode(), object)


def _choose(captions: Sequence[str], rng: np.random.Generator) -> int:
    """The number of one of an image's captions, each equally likely; 0 without any."""
    return int(rng.integers(len(captions))) if captions else 0


def _pack_instances(
    example: Example, labels: np.ndarray, shapes: Shapes, rng: np.random.Generator
) -> Arrays:
    """Instances (and crowd regions) that have a label among the queries; a random subset fits."""
    rows = np.flatnonzero(labels.any(axis=1))
    if len(rows) > shapes.max_instances:
        # A random choice, so that no tile of a mosaic loses its labels for coming last.
        rows = np.sort(rng.permutation(rows)[: shapes.max_instances])
    m, q = shapes.max_instances, shapes.max_queries
    is_crowd = example.is_crowd[rows]
    return {
        "boxes": _padded(example.boxes_cxcywh[rows], (m, 4)),
        "is_instance": _padded(~is_crowd, (m,)),
        "is_crowd": _padded(is_crowd, (m,)),
        "instance_labels": _padded(labels[rows], (m, q)),
        "instance_scores": _padded(example.scores[rows], (m,)),
        "tile_of_instance": _padded(example.tile_of_instance[rows], (m,)),
    }


def _padded(array: np.ndarray, shape: tuple[int, ...], fill: int = 0) -> np.ndarray:
    out = np.full(shape, fill, array.dtype)
    out[tuple(slice(0, n) for n in array.shape)] = array
    return out


def stack(examples: Sequence[Arrays]) -> Arrays:
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def with_query_table(batch: Arrays, num_shards: int, max_distinct: int) -> Arrays:
    """Replaces `query_tokens` by one table of distinct queries for each data shard.

    The table has `max_distinct` rows a shard, or as many as could ever be needed if that is 0.
    Queries beyond it are masked out of their images and counted as `dropped_queries`; those used
    as positives come first and are the last to go, and images lose alike.
    """
    tokens, is_query = batch["query_tokens"], batch["is_query"].copy()
    b, q, length = tokens.shape
    per_shard = b // num_shards
    rows = max_distinct or per_shard * q
    is_positive = np.asarray(batch["instance_labels"].any(axis=1))
    table = np.zeros((num_shards, rows, length), np.int32)
    index = np.zeros((b, q), np.int32)
    counts = batch["counts"].copy()
    for shard in range(num_shards):
        known: dict[bytes, int] = {}
        images = slice(shard * per_shard, (shard + 1) * per_shard)
        for image, query in _in_turn(is_query[images], is_positive[images]):
            image += images.start
            key = tokens[image, query].tobytes()
            row = known.setdefault(key, len(known))
            if row < rows:
                table[shard, row] = tokens[image, query]
                index[image, query] = row
                continue
            del known[key]
            is_query[image, query] = False
            counts[image, COUNTS.index("dropped_queries")] += 1
    out = {key: value for key, value in batch.items() if key != "query_tokens"}
    out["query_table"] = table.reshape(num_shards * rows, length)
    out["query_index"], out["is_query"], out["counts"] = index, is_query, counts
    # An instance whose every label was masked out is no longer asked for.
    has_label = (out["instance_labels"] & is_query[:, None, :]).any(axis=-1)
    lost = (out["is_instance"] & ~has_label).sum(axis=-1)
    counts[:, COUNTS.index("dropped_instances")] += lost.astype(np.int32)
    out["is_instance"] = out["is_instance"] & has_label
    return out


def _in_turn(
    is_query: Bool[np.ndarray, "b q"], is_positive: Bool[np.ndarray, "b q"]
) -> Iterator[tuple[int, int]]:
    """(image, query) of every query: positives first, and of each image one after the other's."""
    for wanted in (is_query & is_positive, is_query & ~is_positive):
        columns = [np.flatnonzero(row).tolist() for row in wanted]
        for turn in itertools.zip_longest(*columns):
            yield from ((image, query) for image, query in enumerate(turn) if query is not None)


def with_batch_negatives(
    batch: Arrays, num_shards: int, rngs: Sequence[np.random.Generator]
) -> Arrays:
    """Asks every image for what the other images of its data shard are asked for.

    After Grounding DINO 1.5 (arXiv 2405.10300), which takes negatives from the texts of the batch.
    Names are drawn with the image's own generator until its slots are full; never those that it is
    asked for already, its own positives, or names that are in it without (all) their boxes. They
    are rows of the query table that are there anyway: the text tower has no more to do.

    `batch` is what `with_query_table` returns, of examples with `query_names`, which are taken out.
    """
    out = {key: value for key, value in batch.items() if key != "query_names"}
    out["query_index"], out["is_query"] = batch["query_index"].copy(), batch["is_query"].copy()
    # A positive that was masked out keeps its labels: its slot is not free.
    is_free = ~batch["is_query"] & ~batch["instance_labels"].any(axis=1)
    names = [json.loads(text) for text in batch["query_names"]]
    per_shard = len(names) // num_shards
    for shard in range(num_shards):
        images = range(shard * per_shard, (shard + 1) * per_shard)
        row_of: dict[str, int] = {}
        for image in images:
            for query in np.flatnonzero(batch["is_query"][image]):
                row = int(batch["query_index"][image, query])
                row_of.setdefault(names[image]["asked"][query], row)
        for image in images:
            own = {*names[image]["asked"], *names[image]["never"]}
            # Names of the same tokens share a row.
            own_rows = {row for name, row in row_of.items() if name in own}
            others = [row for row in dict.fromkeys(row_of.values()) if row not in own_rows]
            slots = np.flatnonzero(is_free[image])
            chosen = rngs[image].permutation(len(others))[: len(slots)]
            slots = slots[: len(chosen)]
            out["query_index"][image, slots] = np.array(others, np.int32)[chosen]
            out["is_query"][image, slots] = True
    return out
