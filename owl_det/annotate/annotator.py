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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from data_pipelines import image_ops, label_ops, prompts, tokenizer
from data_pipelines.image_ops import UnreadableImage
from data_pipelines.pseudo_records import PseudoRecord
from data_pipelines.readers.image_text import Sample, Unreadable
from owl_det import boxes as box_lib
from owl_det.annotate import hard_negatives
from owl_det.annotate.label_spaces import LabelSpace
from owl_det.inference import ranking
from owl_det.modeling.build import detector_of
from owl_det.modeling.family import Detector
from owl_det.scoring import class_logits
from owl_det.types import LoadedModel, Params, TokenEmbeddings

QUERIES_AT_ONCE = 64  # scored together, times the prompts; bounds memory
TEXTS_AT_ONCE = 64  # encoded together, times the prompts
MAX_CACHE_BYTES = 1 << 30  # of query embeddings of one shard
# Keys of counts that are no rules of the label space.
NO_CAPTION, ENDS_EARLY = "images without a caption", "images that end early"
NOTE = "note: "


class Queries(NamedTuple):
    """c chunks of q queries of all images, and c2 chunks of each image's own."""

    shared: Float[Array | np.ndarray, "c t q e"]
    is_shared: Bool[Array | np.ndarray, "c q"]
    own: Float[Array | np.ndarray, "b c2 t q e"]
    is_own: Bool[Array | np.ndarray, "b c2 q"]


class BestQueries(NamedTuple):
    """The best query of each of an image's n boxes."""

    boxes_xyxy: Float[Array, "b n 4"]  # relative to the padded square
    scores: Float[Array, "b n"]
    query: Int[Array, "b n"]  # shared queries first, then the image's own


class SharedScores(NamedTuple):
    """What hard negatives are mined from: shared queries without their factor."""

    best: Float[Array, "b c*q"]  # each shared query's best score over an image's boxes
    scores: Float[Array, "b n"]  # each box's best score
    query: Int[Array, "b n"]  # as in `BestQueries`


def best_queries(
    detector: Detector,
    params: Params,
    image: UInt8[Array, "b H W 3"],
    queries: Queries,
    *,
    shared_factor: float,
) -> BestQueries:
    """Scores all shared queries and each image's own.

    A score is the mean probability over the t prompts, times `shared_factor` for shared queries.
    Of equal scores the first query wins; a box that no query is asked of scores 0.
    """
    tokens = ranking.embed_tokens(detector, params, image)
    scores, query = _best_of_boxes(tokens, queries, shared_factor, detector.dtype)
    return BestQueries(box_lib.cxcywh_to_xyxy(tokens.boxes), scores, query)


def best_and_shared(
    detector: Detector,
    params: Params,
    image: UInt8[Array, "b H W 3"],
    queries: Queries,
    *,
    shared_factor: float,
) -> tuple[BestQueries, SharedScores]:
    """As `best_queries`, with the scores that hard negatives are mined from."""
    tokens = ranking.embed_tokens(detector, params, image)
    scores, query = _best_of_boxes(tokens, queries, shared_factor, detector.dtype)
    best = BestQueries(box_lib.cxcywh_to_xyxy(tokens.boxes), scores, query)
    if shared_factor != 1:
        scores, query = _best_of_boxes(tokens, queries, 1.0, detector.dtype)
    of_shared = _best_of_shared(tokens, queries, detector.dtype)
    return best, SharedScores(of_shared, scores, query)


def _best_of_boxes(
    tokens: TokenEmbeddings, asked: Queries, shared_factor: float, dtype: Any
) -> tuple[Float[Array, "b n"], Int[Array, "b n"]]:
    """Score and place of each box's best query."""
    shared, is_shared, own, is_own = asked
    b, n = tokens.logit_shift.shape
    q = (shared if shared.shape[0] else own).shape[-2]

    def keep_better(best: tuple[Array, Array], scores: Array, start: Array) -> tuple[Array, Array]:
        index = jnp.argmax(scores, axis=-1)
        score = jnp.take_along_axis(scores, index[..., None], axis=-1)[..., 0]
        is_better = score > best[0]
        return jnp.where(is_better, score, best[0]), jnp.where(is_better, index + start, best[1])

    def add_shared(best: tuple[Array, Array], chunk: Any) -> tuple[tuple[Array, Array], None]:
        queries, is_query, start = chunk
        scores = _shared_chunk_scores(tokens, queries, is_query, dtype)
        return keep_better(best, shared_factor * scores, start), None

    def add_own(best: tuple[Array, Array], chunk: Any) -> tuple[tuple[Array, Array], None]:
        queries, is_query, start = chunk
        return keep_better(best, _chunk_scores(tokens, queries, is_query, dtype), start), None

    best = jnp.zeros((b, n)), jnp.zeros((b, n), jnp.int32)
    best, _ = jax.lax.scan(add_shared, best, (shared, is_shared, jnp.arange(shared.shape[0]) * q))
    starts = shared.shape[0] * q + jnp.arange(own.shape[1]) * q
    by_chunk = jnp.moveaxis(own, 1, 0), jnp.moveaxis(is_own, 1, 0), starts
    best, _ = jax.lax.scan(add_own, best, by_chunk)
    return best


def _best_of_shared(tokens: TokenEmbeddings, asked: Queries, dtype: Any) -> Float[Array, "b c*q"]:
    """Each shared query's best score over the boxes."""

    def best(_: None, chunk: Any) -> tuple[None, Array]:
        queries, is_query = chunk
        return None, _shared_chunk_scores(tokens, queries, is_query, dtype).max(axis=1)

    _, by_chunk = jax.lax.scan(best, None, (asked.shared, asked.is_shared))
    return jnp.moveaxis(by_chunk, 0, 1).reshape(tokens.logit_shift.shape[0], -1)


def _shared_chunk_scores(
    tokens: TokenEmbeddings, queries: Float[Array, "t q e"], is_query: Bool[Array, " q"], dtype: Any
) -> Float[Array, "b n q"]:
    b = tokens.logit_shift.shape[0]
    queries = jnp.broadcast_to(queries[None], (b, *queries.shape))
    return _chunk_scores(
        tokens, queries, jnp.broadcast_to(is_query[None], (b, len(is_query))), dtype
    )


def _chunk_scores(
    tokens: TokenEmbeddings,
    queries: Float[Array, "b t q e"],
    is_query: Bool[Array, "b q"],
    dtype: Any,
) -> Float[Array, "b n q"]:
    """Probabilities, averaged over the prompts; 0 for filler queries."""
    b, t, q, _ = queries.shape
    logits = class_logits(
        tokens.class_embeddings,
        tokens.logit_shift,
        tokens.logit_scale,
        queries.reshape(b, t * q, -1),
        dtype,
    )
    scores = jax.nn.sigmoid(logits).reshape(b, -1, t, q).mean(axis=2)
    return jnp.where(is_query[:, None, :], scores, 0.0)


# Compiled once in a process for each architecture and shape.
_encode_queries = jax.jit(ranking.encode_queries, static_argnames="detector")
_best_queries = jax.jit(best_queries, static_argnames=("detector", "shared_factor"))
_best_and_shared = jax.jit(best_and_shared, static_argnames=("detector", "shared_factor"))


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
        self._templates = prompts.eval_prompts(self.prompt_mode)
        self._num_threads = num_threads or os.cpu_count() or 1
        self._tokenizer = tokenizer.build(model.config.text, model.tokenizer)
        self._detector = detector_of(model.config, model.preprocess)
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
        shape = len(phrases), len(self._templates), self.model.config.embedding_dim
        out = np.zeros(shape, self._dtype)
        for start in range(0, len(phrases), TEXTS_AT_ONCE):
            chunk = phrases[start : start + TEXTS_AT_ONCE]
            tokens = self._tokens(chunk, counts)
            embeddings = _encode_queries(self._detector, self.model.params, tokens)
            out[start : start + len(chunk)] = np.asarray(embeddings).swapaxes(0, 1)[: len(chunk)]
        counts["encoded queries"] += len(phrases)
        return out

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
        given = self._detector, self.model.params, pixels, asked
        if self.num_hard_negatives:
            return _best_and_shared(*given, shared_factor=self.space.curated_factor)
        return _best_queries(*given, shared_factor=self.space.curated_factor), None

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
        shape = len(self._templates), q, self.model.config.embedding_dim
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
        shape = b, c, len(self._templates), q, self.model.config.embedding_dim
        own = np.zeros(shape, self._dtype)
        is_own = np.zeros((b, c, q), bool)
        for row, phrases in enumerate(queries):
            for i, phrase in enumerate(phrases):
                own[row, i // q, :, i % q] = cache[phrase]
                is_own[row, i // q, i % q] = True
        return own, is_own

    def _tokens(self, phrases: Sequence[str], counts: Counter[str]) -> Int[np.ndarray, "t q l"]:
        tokens = np.zeros(
            (len(self._templates), TEXTS_AT_ONCE, self._tokenizer.num_positions), np.int32
        )
        for i, phrase in enumerate(phrases):
            texts = [prompts.apply_template(template, phrase) for template in self._templates]
            tokens[:, i] = self._tokenizer.encode_all(texts)
            counts["cut queries"] += not all(self._tokenizer.fits(text) for text in texts)
        return tokens


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
