"""From examples to a batch: `pack_example` each, `stack` them, `finish_batch`.

`data_pipelines.batch_spec` lists the arrays. Packing gives every array its fixed shape; finishing
puts the distinct queries of each data shard into one table.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64

from data_pipelines import batch_spec, prompts, query_sets
from data_pipelines.batch_spec import COUNTS, Arrays
from data_pipelines.features import Example, Names
from data_pipelines.tokenizer import Tokenizer

_DROPPED_QUERIES, _DROPPED_INSTANCES = map(COUNTS.index, ("dropped_queries", "dropped_instances"))
_FIELDS = batch_spec.FIELDS | batch_spec.INPUT_FIELDS | batch_spec.EXAMPLE_FIELDS


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How examples become arrays: their static sizes, and what they carry."""

    max_instances: int
    max_queries: int
    min_queries: int
    max_tiles: int
    num_positions: int  # of texts
    prompt_mode: str = "none"  # as `prompts.train_prompt` takes it
    # Labels point at random queries of the image: a control that must learn nothing about names.
    shuffle_labels: bool = False
    with_captions: bool = False
    with_names: bool = False  # the queries' names, for batch negatives

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes by the letters of `batch_spec`."""
        return {
            "m": self.max_instances,
            "q": self.max_queries,
            "t": self.max_tiles,
            "l": self.num_positions,
        }


@dataclass(frozen=True)
class _Asked:
    """The queries of one example: distinct tokens, and which of them each instance is."""

    names: Names
    tokens: Int32[np.ndarray, "q l"]
    labels: Bool[np.ndarray, "m q"]
    counts: dict[str, int]


def pack_example(
    example: Example,
    pool: query_sets.Pool,
    tokenizer: Tokenizer,
    packing: Packing,
    rng: np.random.Generator,
) -> Arrays:
    """One training example as arrays of fixed shape; `query_tokens` are not yet deduplicated."""
    asked, sizes = _ask(example, pool, tokenizer, packing, rng), packing.sizes
    arrays = _pack_instances(example, asked.labels, sizes, rng)
    arrays["image"] = example.image
    arrays["is_example"] = np.array(True)
    arrays["image_id"] = np.array(example.image_id, np.int32)
    arrays["original_size"] = np.array(example.original_size, np.int32)
    arrays["query_tokens"] = _padded("query_tokens", asked.tokens, sizes)
    arrays["is_query"] = _padded("is_query", np.ones(len(asked.tokens), bool), sizes)
    arrays["tile_boxes"] = _padded("tile_boxes", example.tile_boxes_cxcywh, sizes)
    arrays["tile_image_id"] = _padded("tile_image_id", example.tile_image_id, sizes, fill=-1)
    counts = example.counts | asked.counts
    num_packed = int(arrays["instance_scores"].astype(bool).sum())
    counts["dropped_instances"] = len(example.names) - num_packed
    if packing.with_captions:
        captions, of_captions = _pack_captions(example, tokenizer, sizes, rng)
        arrays |= captions
        counts |= of_captions
    arrays["counts"] = np.array([counts.get(name, 0) for name in COUNTS], np.int32)
    if packing.with_names:
        arrays["query_names"] = _packed_names(example, asked.names)
    return arrays


def _ask(
    example: Example,
    pool: query_sets.Pool,
    tokenizer: Tokenizer,
    packing: Packing,
    rng: np.random.Generator,
) -> _Asked:
    """Chooses the queries of an example and tokenises their prompts."""
    queries = query_sets.make(
        example.names,
        example.negatives,
        pool,
        excluded=example.excluded,
        max_queries=packing.max_queries,
        min_queries=packing.min_queries,
        rng=rng,
    )
    order = rng.permutation(len(queries.names)) if packing.shuffle_labels else None
    texts = [prompts.train_prompt(name, packing.prompt_mode, rng) for name in queries.names]
    tokens = tokenizer.encode_all(texts)
    queries, first = _merge_same_texts(queries, tokens)
    labels = queries.labels
    if order is not None:
        labels = labels[:, order[order < len(first)]]
    counts = {
        "dropped_queries": queries.num_dropped,
        "cut_texts": sum(not tokenizer.fits(text) for text in texts),
    }
    return _Asked(queries.names, tokens[first], labels, counts)


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


def _pack_instances(
    example: Example,
    labels: Bool[np.ndarray, "m q"],
    sizes: Mapping[str, int],
    rng: np.random.Generator,
) -> Arrays:
    """Instances (and crowd regions) that have a label among the queries; a random subset fits."""
    rows = np.flatnonzero(labels.any(axis=1))
    if len(rows) > sizes["m"]:
        # A random choice, so that no tile of a mosaic loses its labels for coming last.
        rows = np.sort(rng.permutation(rows)[: sizes["m"]])
    is_crowd = example.is_crowd[rows]
    packed = {
        "boxes": example.boxes_cxcywh[rows],
        "is_instance": ~is_crowd,
        "is_crowd": is_crowd,
        "instance_labels": labels[rows],
        "instance_scores": example.scores[rows],
        "tile_of_instance": example.tile_of_instance[rows],
    }
    return {name: _padded(name, array, sizes) for name, array in packed.items()}


def _pack_captions(
    example: Example, tokenizer: Tokenizer, sizes: Mapping[str, int], rng: np.random.Generator
) -> tuple[Arrays, dict[str, int]]:
    """One caption of each tile, and counts of those that are missing or cut."""
    chosen = [_choose(tile, rng) for tile in example.tile_captions]
    captions = [
        tile[i] if tile else "" for tile, i in zip(example.tile_captions, chosen, strict=True)
    ]
    packed = {
        "caption_index": np.array(chosen, np.int32),
        "caption_tokens": tokenizer.encode_all(captions),
        "is_caption": np.array([bool(caption) for caption in captions], bool),
    }
    counts = {
        "images_without_caption": sum(not caption for caption in captions),
        "cut_captions": sum(not tokenizer.fits(caption) for caption in captions),
    }
    return {name: _padded(name, array, sizes) for name, array in packed.items()}, counts


def _choose(captions: Sequence[str], rng: np.random.Generator) -> int:
    """The number of one of an image's captions, each equally likely; 0 without any."""
    return int(rng.integers(len(captions))) if captions else 0


def _packed_names(example: Example, asked: Names) -> np.ndarray:
    """The names asked, in order, and those never to be asked as negatives: JSON, as one object."""
    positives = [name for names in example.names for name in names]
    never = sorted({*positives, *example.excluded} - {*asked})
    return np.array(json.dumps({"asked": asked, "never": never}).encode(), object)


def _padded(name: str, array: np.ndarray, sizes: Mapping[str, int], fill: int = 0) -> np.ndarray:
    """The field `name` of one example, filled up to its shape."""
    field = _FIELDS[name]
    out = np.full(field.example_shape(sizes), fill, field.dtype)
    out[tuple(slice(0, n) for n in array.shape)] = array
    return out


def stack(examples: Sequence[Arrays]) -> Arrays:
    """The arrays of several examples along a new first axis."""
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def finish_batch(
    stacked: Arrays,
    num_data_shards: int,
    max_distinct: int,
    rngs: Sequence[np.random.Generator] | None = None,
) -> Arrays:
    """Replaces `query_tokens` by one table of distinct queries for each data shard.

    The table has `max_distinct` rows a shard, or as many as could ever be needed if that is 0.
    Queries beyond it are masked out of their images and counted as `dropped_queries`; those used
    as positives come first and are the last to go, and images lose alike.

    With `rngs`, one for each image, every image is also asked for what the other images of its data
    shard are asked for (`_ask_of_others`). The examples then carry `query_names`, which are left
    out of the batch.
    """
    out = {name: a for name, a in stacked.items() if name not in ("query_tokens", "query_names")}
    tokens, labels = stacked["query_tokens"], stacked["instance_labels"]
    is_positive = np.asarray(labels.any(axis=1))
    b, q, length = tokens.shape
    per_shard = b // num_data_shards
    rows = max_distinct or per_shard * q
    table = np.zeros((num_data_shards, rows, length), np.int32)
    index = np.zeros((b, q), np.int32)
    is_query, counts = stacked["is_query"].copy(), stacked["counts"].copy()
    for shard in range(num_data_shards):
        images = slice(shard * per_shard, (shard + 1) * per_shard)
        _fill_table(
            table[shard], index[images], is_query[images], tokens[images], is_positive[images]
        )
        counts[images, _DROPPED_QUERIES] += (stacked["is_query"] & ~is_query)[images].sum(-1)
        if rngs is not None:
            names = [json.loads(text) for text in stacked["query_names"][images]]
            _ask_of_others(
                index[images], is_query[images], is_positive[images], names, rngs[images]
            )
    out["query_table"] = table.reshape(num_data_shards * rows, length)
    out["query_index"], out["is_query"], out["counts"] = index, is_query, counts
    # An instance whose every label was masked out is no longer asked for.
    has_label = (labels & is_query[:, None, :]).any(axis=-1)
    lost = (out["is_instance"] & ~has_label).sum(axis=-1)
    counts[:, _DROPPED_INSTANCES] += lost.astype(np.int32)
    out["is_instance"] = out["is_instance"] & has_label
    return out


def _fill_table(
    table: Int32[np.ndarray, "u l"],
    index: Int32[np.ndarray, "b q"],
    is_query: Bool[np.ndarray, "b q"],
    tokens: Int32[np.ndarray, "b q l"],
    is_positive: Bool[np.ndarray, "b q"],
) -> None:
    """Fills in the table of one data shard and the rows of its queries; masks those beyond it."""
    known: dict[bytes, int] = {}
    for image, query in _in_turn(is_query, is_positive):
        key = tokens[image, query].tobytes()
        row = known.setdefault(key, len(known))
        if row < len(table):
            table[row] = tokens[image, query]
            index[image, query] = row
            continue
        del known[key]
        is_query[image, query] = False


def _in_turn(
    is_query: Bool[np.ndarray, "b q"], is_positive: Bool[np.ndarray, "b q"]
) -> Iterator[tuple[int, int]]:
    """(image, query) of every query: positives first, and of each image one after the other's."""
    for wanted in (is_query & is_positive, is_query & ~is_positive):
        columns = [np.flatnonzero(row).tolist() for row in wanted]
        for turn in itertools.zip_longest(*columns):
            yield from ((image, query) for image, query in enumerate(turn) if query is not None)


def _ask_of_others(
    index: Int32[np.ndarray, "b q"],
    is_query: Bool[np.ndarray, "b q"],
    is_positive: Bool[np.ndarray, "b q"],
    names: Sequence[dict[str, list[str]]],
    rngs: Sequence[np.random.Generator],
) -> None:
    """Asks every image of a data shard for what its other images are asked for.

    After Grounding DINO 1.5 (arXiv 2405.10300), which takes negatives from the texts of the batch.
    Names are drawn with the image's own generator until its slots are full; never those that it is
    asked for already, its own positives, or names that are in it without (all) their boxes. They
    are rows of the query table that are there anyway: the text tower has no more to do.
    """
    # A positive that was masked out keeps its labels: its slot is not free.
    is_free = ~is_query & ~is_positive
    row_of: dict[str, int] = {}
    for image, query in np.argwhere(is_query):
        row_of.setdefault(names[image]["asked"][query], int(index[image, query]))
    for image in range(len(names)):
        own = {*names[image]["asked"], *names[image]["never"]}
        # Names of the same tokens share a row.
        own_rows = {row for name, row in row_of.items() if name in own}
        others = [row for row in dict.fromkeys(row_of.values()) if row not in own_rows]
        slots = np.flatnonzero(is_free[image])
        chosen = rngs[image].permutation(len(others))[: len(slots)]
        slots = slots[: len(chosen)]
        index[image, slots] = np.array(others, np.int32)[chosen]
        is_query[image, slots] = True
