"""The frozen annotator: images and their texts in, the best query of every box out.

With hard negatives also the shared queries that score high and are the best of no box.

Every batch has one shape, with filler images and filler queries, and every text is encoded in a
table of one shape. So what is found in an image depends on nothing but the image, its queries and
its place in the batch.
"""

import dataclasses
import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from jaxtyping import Bool, Float, Float32, Int, UInt8

from data_pipelines import image_ops, label_ops, prompts
from data_pipelines.image_ops import UnreadableImage
from data_pipelines.pseudo_records import PseudoRecord
from data_pipelines.readers.image_text_shards import Sample, Unreadable
from owl_det.annotate.label_spaces import LabelSpace
from owl_det.inference import best_queries, ranking
from owl_det.inference.best_queries import BestQueries, Queries, SharedScores
from owl_det.inference.text_encoder import TextEncoder
from owl_det.modeling.build import detector_of
from owl_det.types import LoadedModel

QUERIES_AT_ONCE = 64  # scored together, times the prompts; bounds memory
TEXTS_AT_ONCE = 64  # encoded together, times the prompts
MAX_CACHE_BYTES = 1 << 30  # of query embeddings of one shard
# Keys of counts that are no rules of the label space.
NO_CAPTION, ENDS_EARLY = "images without a caption", "images that end early"
NOTE = "note: "


# Compiled once in a process for each architecture and shape.
_embed_prompts = jax.jit(ranking.embed_prompts, static_argnames="model")
_best_queries = jax.jit(best_queries.best_queries, static_argnames=("detector", "shared_factor"))
_best_and_shared = jax.jit(
    best_queries.best_and_shared, static_argnames=("detector", "shared_factor")
)


@dataclass(frozen=True)
class Decoded:
    """A readable image at its place in the padded square; `height` and `width` are its own."""

    sample: Sample
    pixels: UInt8[np.ndarray, "H W 3"]
    height: int
    width: int
    ends_early: bool = False  # its file lacks its last bytes


@dataclass(frozen=True)
class Annotated:
    """One image that could be read, with all its boxes from the floor up."""

    record: PseudoRecord
    image: bytes | UInt8[np.ndarray, "h w 3"]


class _Started(NamedTuple):
    """A batch that the device works on."""

    batch: list[Decoded]
    queries: list[tuple[str, ...]]  # of each image
    best: BestQueries
    shared: SharedScores | None


class Annotator:
    """A frozen detector with a label space; the same in every process."""

    def __init__(
        self,
        model: LoadedModel,
        space: LabelSpace,
        *,
        prompt_mode: str = "",
        batch_size: int = 8,
        floor: float = 0.05,
        num_threads: int = 0,
        num_hard_negatives: int = 0,
    ):
        """`prompt_mode` as in `prompts.eval_prompts`, by default the one the model is evaluated
        with; boxes below `floor` are not reported; 0 threads takes one per core. Of each image up
        to `num_hard_negatives` curated names are reported that `hard_negatives` chooses.
        """
        self.model, self.space, self.batch_size, self.floor = model, space, batch_size, floor
        self.num_hard_negatives = num_hard_negatives
        self.prompt_mode = prompt_mode or model.eval_prompts
        self._dtype = np.dtype(model.config.dtype)  # of query embeddings
        self._num_prompts = len(prompts.eval_prompts(self.prompt_mode))
        self._num_threads = num_threads or os.cpu_count() or 1
        self._detector = detector_of(model.config, model.preprocess)
        self._encoder = TextEncoder(
            partial(_embed_prompts, self._detector),
            model.config,
            model.tokenizer,
            names_at_once=TEXTS_AT_ONCE,
            multiple=TEXTS_AT_ONCE,
        )
        most = 0 if space.phrases == "none" else space.max_ngrams
        self._chunk = min(QUERIES_AT_ONCE, max(most, len(space.curated.names)))
        self._num_own = -(-most // self._chunk)
        self._shared, self._is_shared = self._shared_queries()

    def annotate(
        self, samples: Iterable[Sample | Unreadable], counts: Counter[str] | None = None
    ) -> Iterator[Annotated | Unreadable]:
        """Annotates one shard: readable images in their order, the others as soon as they are met.

        A pure function of the shard: the cache of query embeddings starts empty. `counts` adds up
        what the rules of the label space did, `images`, `encoded queries` and `cut queries`, and
        where there are any: `NO_CAPTION`, `ENDS_EARLY` and notes of samples.
        """
        counts = Counter() if counts is None else counts
        cache = QueryCache(self.encode, counts)
        pending: _Started | None = None
        batch: list[Decoded] = []
        for item in self._decoded(samples):
            if isinstance(item, Unreadable):
                yield item
                continue
            _count(item, counts)
            batch.append(item)
            if len(batch) < self.batch_size:
                continue
            # The next batch is decoded and looked up while the device works on this one.
            started = self._start(batch, cache, counts)
            if pending is not None:
                yield from self._finish(pending)
            pending, batch = started, []
        if pending is not None:
            yield from self._finish(pending)
        if batch:
            yield from self._finish(self._start(batch, cache, counts))

    def encode(self, phrases: Sequence[str], counts: Counter[str]) -> Float[np.ndarray, "q t e"]:
        """Embeddings of the phrases, each in every prompt."""
        cut = self._encoder.is_cut(phrases, self.prompt_mode)
        counts["cut queries"] += int(cut.any(axis=0).sum())
        counts["encoded queries"] += len(phrases)
        embeddings = self._encoder.embed(self.model.params, phrases, self.prompt_mode)
        return np.ascontiguousarray(embeddings.swapaxes(0, 1), self._dtype)

    def score(
        self,
        pixels: UInt8[np.ndarray, "b H W 3"],
        queries: Sequence[tuple[str, ...]],
        cache: "QueryCache | Mapping[str, np.ndarray]",
    ) -> tuple[BestQueries, SharedScores | None]:
        """Hands one full batch to the device: the best of shared queries and of each image's own.

        `cache` holds the embeddings of `queries`. The second is there if hard negatives are mined.
        """
        asked = Queries(self._shared, self._is_shared, *self._own_queries(queries, cache))
        inputs = self._detector, self.model.params, pixels, asked
        if self.num_hard_negatives:
            return _best_and_shared(*inputs, shared_factor=self.space.curated_factor)
        return _best_queries(*inputs, shared_factor=self.space.curated_factor), None

    def _start(self, batch: list[Decoded], cache: "QueryCache", counts: Counter[str]) -> "_Started":
        """Hands a batch to the device; returns before it is done."""
        queries = [self.space.of_image(item.sample.texts, counts) for item in batch]
        cache.add(itertools.chain(*queries))
        side, size = self.model.config.image_size, self.batch_size
        pixels = np.zeros((size, side, side, 3), np.uint8)
        for row, item in enumerate(batch):
            pixels[row] = item.pixels
        counts["images"] += len(batch)
        return _Started(batch, queries, *self.score(pixels, queries, cache))

    def _finish(self, started: "_Started") -> Iterator[Annotated]:
        best = [np.asarray(x) for x in started.best]
        shared = [np.asarray(x) for x in started.shared or ()]
        for row, (item, own) in enumerate(zip(started.batch, started.queries, strict=True)):
            record = self._record(item, own, *(x[row] for x in best))
            if shared:
                record = self._with_hard_negatives(record, *(x[row] for x in shared))
            yield Annotated(record, item.sample.image)

    def _with_hard_negatives(
        self,
        record: PseudoRecord,
        of_names: Float32[np.ndarray, " c"],
        scores: Float32[np.ndarray, " n"],
        query: Int[np.ndarray, " n"],
    ) -> PseudoRecord:
        """`scores` and `query` are those of each box's best query without the curated factor."""
        from owl_det.annotate import hard_negatives

        names = self.space.curated.names
        best = query[(scores >= self.floor) & (query < len(names))]
        of_names = of_names[: len(names)]
        chosen = hard_negatives.choose(
            names,
            of_names,
            self.num_hard_negatives,
            found=(*record.phrases, *(names[i] for i in best)),
            texts=record.texts,
        )
        return dataclasses.replace(
            record,
            hard_negatives=tuple(names[i] for i in chosen),
            hard_negative_scores=of_names[chosen],
        )

    def _record(
        self,
        item: Decoded,
        own: tuple[str, ...],
        boxes: Float32[np.ndarray, "n 4"],
        scores: Float32[np.ndarray, " n"],
        query: Int[np.ndarray, " n"],
    ) -> PseudoRecord:
        pixels = np.round(
            ranking.pixel_boxes(boxes, item.height, item.width, self.model.preprocess.geometry),
            2,
        )
        keep = (scores >= self.floor) & (scores > 0)
        keep &= label_ops.drop_degenerate(pixels, item.height, item.width)
        kept = np.flatnonzero(keep)
        kept = kept[np.argsort(-scores[kept], kind="stable")]
        first_own = self._is_shared.size
        names = self.space.curated.names
        is_own = query[kept] >= first_own
        phrases = [own[i - first_own] if i >= first_own else names[i] for i in query[kept]]
        return PseudoRecord(
            key=item.sample.key,
            height=item.height,
            width=item.width,
            texts=item.sample.texts,
            boxes_xyxy=pixels[kept],
            scores=scores[kept],
            phrases=tuple(phrases),
            spaces=tuple(self.space.phrases if x else "curated" for x in is_own),
        )

    def _decoded(self, samples: Iterable[Sample | Unreadable]) -> Iterator[Decoded | Unreadable]:
        """Decodes in threads, three batches ahead, in the order of the samples."""
        waiting: deque[Future[Decoded | Unreadable]] = deque()
        with ThreadPoolExecutor(self._num_threads) as pool:
            for sample in samples:
                waiting.append(pool.submit(self.decode, sample))
                if len(waiting) > 3 * self.batch_size:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def decode(self, sample: Sample | Unreadable) -> Decoded | Unreadable:
        """Pixels as the model takes them, or why there are none."""
        if isinstance(sample, Unreadable):
            return sample
        try:
            image = image_ops.decode_image(sample.image)
            pixels = image_ops.to_square(image, self.model.config.image_size, self.model.preprocess)
        except UnreadableImage as error:
            return Unreadable(key=sample.key, reason=str(error))
        return Decoded(sample, pixels, image.height, image.width, image_ops.ends_early(image))

    def _shared_queries(self) -> tuple[jax.Array, Bool[np.ndarray, "c q"]]:
        names = self.space.curated.names
        q, count = self._chunk, -(-len(names) // self._chunk)
        shape = self._num_prompts, q, self.model.config.embedding_dim
        shared, counts = np.zeros((count, *shape), self._dtype), Counter[str]()
        for chunk in range(count):
            part = names[chunk * q : (chunk + 1) * q]
            shared[chunk, :, : len(part)] = self.encode(part, counts).swapaxes(0, 1)
        if counts["cut queries"]:
            logging.warning(
                "%d of %d curated names are longer than the text tower takes, and cut",
                *(counts["cut queries"], len(names)),
            )
        is_shared = (np.arange(count * q) < len(names)).reshape(count, q)
        return jax.device_put(shared), is_shared

    def _own_queries(
        self, queries: Sequence[tuple[str, ...]], cache: "QueryCache | Mapping[str, np.ndarray]"
    ) -> tuple[Float[np.ndarray, "b c2 t q e"], Bool[np.ndarray, "b c2 q"]]:
        b, c, q = self.batch_size, self._num_own, self._chunk
        shape = b, c, self._num_prompts, q, self.model.config.embedding_dim
        own = np.zeros(shape, self._dtype)
        is_own = np.zeros((b, c, q), bool)
        for row, phrases in enumerate(queries):
            for i, phrase in enumerate(phrases):
                own[row, i // q, :, i % q] = cache[phrase]
                is_own[row, i // q, i % q] = True
        return own, is_own


def _count(item: Decoded, counts: Counter[str]) -> None:
    """Counts what is amiss with an image; nothing is added where all is well."""
    if not item.sample.texts:
        counts[NO_CAPTION] += 1
    if item.ends_early:
        counts[ENDS_EARLY] += 1
    if item.sample.note:
        counts[f"{NOTE}{item.sample.note}"] += 1


class QueryCache:
    """Embeddings of queries, each encoded once while there is room for all."""

    def __init__(
        self,
        encode: Callable[[Sequence[str], Counter[str]], Float[np.ndarray, "q t e"]],
        counts: Counter[str],
        max_bytes: int = MAX_CACHE_BYTES,
    ):
        self._encode, self._counts, self._max_bytes = encode, counts, max_bytes
        self._embeddings: dict[str, np.ndarray] = {}
        self._bytes = 0

    def __getitem__(self, query: str) -> Float[np.ndarray, "t e"]:
        return self._embeddings[query]

    def add(self, queries: Iterable[str]) -> None:
        """Encodes those that are not there; all queries of one call are there afterwards."""
        if self._bytes > self._max_bytes:
            # All at once: simple, and the same in every run.
            self._embeddings, self._bytes = {}, 0
        new = [query for query in dict.fromkeys(queries) if query not in self._embeddings]
        for query, embedding in zip(new, self._encode(new, self._counts), strict=True):
            self._embeddings[query] = embedding
            self._bytes += embedding.nbytes
