"""Detection for users: images of any size in, boxes in their own pixels out."""

import itertools
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Bool, Float32, Int32, UInt8
from PIL import Image

from data_pipelines import image_ops, prompts, tokenizer
from data_pipelines.image_ops import Geometry
from owl_det.errors import ConfigError, DataError
from owl_det.inference import detections as detections_lib
from owl_det.inference import (
    embeddings,
    image_inputs,
    query_boxes,
    ranges,
    ranking,
    stablehlo,
    text_queries,
)
from owl_det.inference.detections import Detections, Proposals
from owl_det.inference.embeddings import ImageEmbeddings, QueryEmbeddings
from owl_det.inference.image_inputs import ImageLike, Images
from owl_det.inference.query_boxes import Box
from owl_det.types import LoadedModel, Params, TokenEmbeddings

__all__ = ["Detections", "ImageLike", "Predictor", "Proposals"]

Queries: TypeAlias = str | Sequence[str] | QueryEmbeddings

QUERY_BUCKET = 16  # numbers of queries are rounded up to a multiple: fewer compilations
TEXTS_AT_ONCE = 256  # queries that pass through the text tower together, in up to seven prompts
TEXTS_KEPT = 2**28  # bytes of texts' embeddings that are remembered: 256 MiB
SCORES_AT_ONCE = 2**24  # of a search: 64 MiB


class _ImageBatch(NamedTuple):
    """Images that pass through the model together; rows beyond `indices` are fillers."""

    indices: list[int]  # of the images as they were given
    sizes: list[tuple[int, int]]  # height, width in pixels
    pixels: UInt8[np.ndarray, "b H W 3"]  # padded squares

    def all_sizes(self) -> Int32[np.ndarray, "b 2"]:
        """`sizes` of all rows; fillers have one pixel."""
        sizes = np.ones((len(self.pixels), 2), np.int32)
        sizes[: len(self.sizes)] = np.array(self.sizes, np.int32).reshape(-1, 2)
        return sizes


class _Prepared(NamedTuple):
    """One image of a batch."""

    pixels: UInt8[np.ndarray, "H W 3"]  # the padded square
    size: tuple[int, int]  # height, width in pixels


class _Asked(NamedTuple):
    """Queries as `inference.rank` takes them."""

    embeddings: Float32[np.ndarray, "t q e"]
    names: tuple[str, ...]
    is_asked: Bool[np.ndarray, " q"]  # False: the same text stands before


class Predictor:
    """A frozen detector. Preprocessing is that of training and evaluation.

    Images are one or many: files, bytes, Pillow images, arrays (`image_inputs`). Queries are texts,
    or the `QueryEmbeddings` that `encode_queries` makes of texts and `encode_image_queries` of
    images. All scores are probabilities as the model gives them. Boxes that lie in the padding of
    an image that is no square are never returned, and take no place of those that are.

    Options that methods share:

        batch_size         images that pass through the image tower together
        image_size         side of the padded square in pixels, a multiple of the patch size below
                           the model's own: faster, and blind to smaller things. The positions are
                           the top left part of the model's grid
        nms_iou            boxes that overlap a better one of their query more than this are dropped
        nms_across_queries boxes of other queries count as well

    Every method raises `DataError` for an option, image or query of no use, before any work, and
    `CheckpointError` if the model computes NaN.
    """

    def __init__(self, model: LoadedModel, functions: ranking.Functions | None = None):
        """`functions` are those of an export; without them the model's modules run."""
        self.model = model
        self._functions = functions or ranking.functions_of(model)
        self._tokenizer = tokenizer.build(model.config.text, model.tokenizer)
        self._encode = jax.jit(self._functions.encode_queries)
        self._embed = jax.jit(self._embed_and_keep, static_argnames="num_tokens")
        self._rank = jax.jit(self._rank_tokens, static_argnames="top_k")
        self._choose = jax.jit(ranking.choose_query_token, static_argnames="geometry")
        self._texts: OrderedDict[tuple[tuple[str, ...], str], np.ndarray] = OrderedDict()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Predictor":
        """From a workdir (its latest checkpoint), one checkpoint directory, or a StableHLO export.

        Raises `CheckpointError` if there is none or it has no detection heads. An export needs
        neither Flax nor Orbax.
        """
        if stablehlo.is_export(path):
            return cls(*stablehlo.load(path))
        from owl_det import checkpoint

        return cls(checkpoint.load_detector(path))

    @cached_property
    def checkpoint(self) -> str:
        """`embeddings.fingerprint` of the model, which embeddings carry."""
        return embeddings.fingerprint(self.model)

    @property
    def names(self) -> tuple[str, ...]:
        """What a fine-tuned model was trained to find; empty where it keeps no names."""
        return self.model.names

    # --- detection -------------------------------------------------------------------------------

    def __call__(self, images: Images, queries: Queries, **options: Any) -> list[Detections]:
        """`detect`."""
        return self.detect(images, queries, **options)

    def detect(
        self,
        images: Images,
        queries: Queries,
        *,
        threshold: float = 0.1,
        top_k: int = 300,
        batch_size: int = 8,
        prompt_mode: str | None = None,
        image_size: int | None = None,
        nms_iou: float | None = None,
        nms_across_queries: bool = False,
    ) -> list[Detections]:
        """The best `top_k` query-box pairs of each image that score at least `threshold`.

        `prompt_mode` is "none", "clip" or "clip_best7" (probabilities are averaged over the
        prompts); by default the one the model was evaluated with. Images may differ in size, and
        there may be many thousand queries. Raises `DataError` without queries, for queries of
        another checkpoint or an `image_size` that the model cannot take, and
        `image_ops.UnreadableImage`, naming the image, where one cannot be decoded.
        """
        _check(threshold=threshold, top_k=top_k, batch_size=batch_size, nms_iou=nms_iou)
        self._prompts(prompt_mode)
        side, given = self._side(image_size), _each_image(images)
        asked = self._encoded(queries, prompt_mode)
        padded, is_query = _pad_queries(asked)
        found: list[Detections] = []
        for batch in self._batches(given, batch_size, side):
            # Apart, so that another number of queries compiles no image tower again.
            sizes = batch.all_sizes()
            tokens = self._embed(self.model.params, batch.pixels, sizes)
            pairs = self._rank(tokens, padded, is_query, sizes, top_k=top_k)
            found += self._detections(pairs, batch.sizes, asked, threshold)
        return [detections_lib.suppress(x, nms_iou, nms_across_queries) for x in found]

    def propose(
        self,
        images: Images,
        *,
        top_k: int = 100,
        threshold: float = 0.0,
        batch_size: int = 8,
        image_size: int | None = None,
        nms_iou: float | None = None,
    ) -> list[Proposals]:
        """The `top_k` boxes of highest objectness of each image that score at least `threshold`.

        Raises `DataError` if the model has no objectness head; else as `detect`.
        """
        _check(threshold=threshold, top_k=top_k, batch_size=batch_size, nms_iou=nms_iou)
        self._require_objectness("propose")
        side, given = self._side(image_size), _each_image(images)
        proposals: list[Proposals] = []
        for batch in self._batches(given, batch_size, side):
            sizes = batch.all_sizes()
            tokens = self._embed(self.model.params, batch.pixels, sizes, num_tokens=top_k)
            proposals += detections_lib.of_tokens(tokens, batch.sizes, threshold, self._geometry)
        return [detections_lib.suppress(x, nms_iou, across_queries=True) for x in proposals]

    # --- queries ---------------------------------------------------------------------------------

    def encode_queries(
        self, queries: str | Sequence[str], prompt_mode: str | None = None
    ) -> QueryEmbeddings:
        """Texts as queries to keep, or to ask together with those of images.

        A text that is given twice is one query.
        """
        if isinstance(queries, QueryEmbeddings):
            raise DataError("queries: are encoded already; give texts")
        asked = self._encoded(queries, prompt_mode)
        rows = np.flatnonzero(asked.is_asked)
        return QueryEmbeddings(
            embeddings=asked.embeddings[:, rows],
            names=tuple(asked.names[row] for row in rows),
            checkpoint=self.checkpoint,
        )

    def encode_image_queries(
        self,
        images: Images,
        boxes: Sequence[Box | None] | Box | None = None,
        names: Sequence[str] | str | None = None,
        *,
        batch_size: int = 8,
        image_size: int | None = None,
    ) -> QueryEmbeddings:
        """Queries that look for what stands in the given box of each image (one-shot detection).

        `boxes` are in pixels of their images; where there is none, the query is the image's most
        prominent object, the token of highest objectness. Images that share a name are one query,
        the mean of their embeddings; without `names` each is its own. How the token of a box is
        found: `inference.choose_query_token`.

        Raises `DataError` where images, boxes and names do not go together, a box is none in
        pixels of its image, or an image has no box and the model no objectness head.
        """
        _check(batch_size=batch_size)
        side, pictures = self._side(image_size), list(_each_image(images))
        given = query_boxes.each(boxes, len(pictures))
        # One text is the name of what all the images show.
        several = [names] * len(pictures) if isinstance(names, str) else names
        labels = _names_of(several, len(pictures), "image queries")
        if not pictures or not len(pictures) == len(given) == len(labels):
            raise DataError(
                f"image queries: {len(pictures)} images, {len(given)} boxes and {len(labels)} "
                "names; give as many of each, at least one"
            )
        if any(box is None for box in given):
            self._require_objectness("image queries without a box")
        chosen: list[Float32[np.ndarray, " e"]] = []
        for batch in self._batches(iter(pictures), batch_size, side):
            chosen += self._chosen_tokens(batch, given, pictures)
        distinct = tuple(dict.fromkeys(labels))
        means = [
            np.mean([x for x, label in zip(chosen, labels, strict=True) if label == name], axis=0)
            for name in distinct
        ]
        return QueryEmbeddings(
            embeddings=np.stack(means)[None], names=distinct, checkpoint=self.checkpoint
        )

    def _chosen_tokens(
        self, batch: _ImageBatch, boxes: Sequence[Box | None], images: Sequence[ImageLike]
    ) -> list[Float32[np.ndarray, " e"]]:
        """The class embedding of the token that stands for each image's box."""
        padded = np.zeros((len(batch.pixels), 4), np.float32)
        has_box = np.zeros(len(batch.pixels), bool)
        for row, (index, size) in enumerate(zip(batch.indices, batch.sizes, strict=True)):
            box, image = boxes[index], images[index]
            if box is not None:
                of_file = f" of {image}" if isinstance(image, (str, os.PathLike)) else ""
                where = f"image queries, box {index}{of_file}"
                padded[row] = query_boxes.relative(box, size, self._geometry, where)
                has_box[row] = True
        sizes = batch.all_sizes()
        tokens = self._embed(self.model.params, batch.pixels, sizes)
        token = np.asarray(self._choose(tokens, padded, has_box, sizes, geometry=self._geometry))
        rows = np.arange(len(batch.indices))
        found = np.asarray(tokens.class_embeddings)[rows, token[rows]]
        ranking.require_finite("image queries", found)
        return list(found)

    # --- embed once, search later ----------------------------------------------------------------

    def embed_images(
        self,
        images: Images,
        names: Sequence[str | os.PathLike[str]] | str | None = None,
        *,
        num_tokens: int = 0,
        batch_size: int = 8,
        image_size: int | None = None,
        on_unreadable: Callable[[image_ops.UnreadableImage], None] | None = None,
    ) -> ImageEmbeddings:
        """All that `search` needs of the images, so that new queries need no image tower.

        With every token kept (`num_tokens` 0), search finds what `detect` finds. `num_tokens` > 0
        keeps so many of highest objectness in each image, those that show it before those in its
        padding: smaller and faster, and boxes of the others are not found. An unreadable image is
        left out if `on_unreadable` takes its error. Raises as `detect`, and `DataError` if names
        are not as many as images or the model has no objectness head to choose tokens by.
        """
        _check(batch_size=batch_size)
        ranges.count("num_tokens", num_tokens, least=0)
        if num_tokens:
            self._require_objectness("num_tokens")
        side, pictures = self._side(image_size), list(_each_image(images))
        labels = _names_of([names] if isinstance(names, str) else names, len(pictures), "embed")
        if not pictures or len(labels) != len(pictures):
            raise DataError(f"embed: {len(pictures)} images and {len(labels)} names")
        batches = list(
            self._embedded_batches(pictures, batch_size, side, num_tokens, on_unreadable)
        )
        sizes = [size for batch, _ in batches for size in batch.sizes]
        return ImageEmbeddings(
            tokens=jax.tree.map(lambda *x: np.concatenate(x), *[tokens for _, tokens in batches]),
            sizes=np.array(sizes, np.int32).reshape(-1, 2),
            names=tuple(labels[index] for batch, _ in batches for index in batch.indices),
            image_size=side,
            checkpoint=self.checkpoint,
        )

    def search(
        self,
        images: ImageEmbeddings,
        queries: Queries,
        *,
        threshold: float = 0.1,
        top_k: int = 300,
        prompt_mode: str | None = None,
        nms_iou: float | None = None,
        nms_across_queries: bool = False,
    ) -> list[Detections]:
        """What `detect` finds in the embedded images, without their pixels.

        Raises `DataError` if the images were embedded with another checkpoint.
        """
        _check(threshold=threshold, top_k=top_k, nms_iou=nms_iou)
        if not isinstance(images, ImageEmbeddings):
            raise DataError(
                f"search: got {type(images).__name__}; give what embed_images returns, or one "
                "after the other what embeddings.read does"
            )
        embeddings.check_checkpoint(images.source, images.checkpoint, self.checkpoint)
        width = self.model.config.embedding_dim
        if images.tokens.class_embeddings.shape[2] != width:
            raise DataError(f"{images.source}: class embeddings are not {width} wide")
        asked = self._encoded(queries, prompt_mode)
        # Ranking compiles in no time: a few queries go as they are, and not with fillers.
        few = len(asked.names) < QUERY_BUCKET
        padded, is_query = _pad_queries(asked, len(asked.names) if few else None)
        num_tokens = images.tokens.logit_shift.shape[1]
        scores = num_tokens * min(padded.shape[1], ranking.QUERY_CHUNK)
        chunk = max(1, min(len(images), SCORES_AT_ONCE // scores))
        found: list[Detections] = []
        for start in range(0, len(images), chunk):
            here = slice(start, start + chunk)
            tokens = jax.tree.map(lambda x, rows=here: _fill_up(x[rows], chunk), images.tokens)
            sizes = images.sizes[here]
            shapes = _fill_up(sizes, chunk)
            pairs = self._rank(tokens, padded, is_query, shapes, top_k=top_k)
            of_images = cast(list[tuple[int, int]], sizes.tolist())
            found += self._detections(pairs, of_images, asked, threshold)
        return [detections_lib.suppress(x, nms_iou, nms_across_queries) for x in found]

    def forget_texts(self) -> None:
        """Empties the memory of the last texts' embeddings, which spares the text tower."""
        self._texts.clear()

    # --- parts -----------------------------------------------------------------------------------

    def preprocess(
        self, image: Image.Image, image_size: int | None = None
    ) -> UInt8[np.ndarray, "H W 3"]:
        """Resizes and pads one image as the model was trained."""
        return image_ops.to_square(image, self._side(image_size), self.model.preprocess)

    def _prepared(self, given: ImageLike, side: int, where: str) -> _Prepared:
        """Reads and preprocesses one image; an error names the file."""
        image = image_inputs.read(given, where)
        try:
            return _Prepared(self.preprocess(image, side), (image.height, image.width))
        except image_ops.UnreadableImage as error:
            name = given if isinstance(given, (str, os.PathLike)) else where
            raise image_ops.UnreadableImage(f"{name}: {error}") from None

    def _detections(
        self,
        pairs: ranking.TopPairs,
        sizes: Sequence[tuple[int, int]],
        asked: _Asked,
        threshold: float,
    ) -> list[Detections]:
        return detections_lib.of_pairs(
            pairs, sizes, asked.names, asked.is_asked, threshold, self._geometry
        )

    @property
    def _geometry(self) -> Geometry:
        return self.model.preprocess.geometry

    # Compiled in __init__.

    def _embed_and_keep(
        self, params: Params, image: jax.Array, sizes: jax.Array, num_tokens: int = 0
    ) -> Any:
        tokens = self._functions.embed_tokens(params, image)
        return ranking.keep_tokens(tokens, num_tokens, sizes, self._geometry)

    def _rank_tokens(
        self, tokens: Any, queries: jax.Array, is_query: jax.Array, sizes: jax.Array, top_k: int
    ) -> Any:
        return ranking.rank(
            tokens,
            queries,
            is_query,
            sizes,
            top_k=top_k,
            dtype=jnp.dtype(self.model.config.dtype),
            geometry=self._geometry,
        )

    def _side(self, image_size: int | None) -> int:
        full, patch = self.model.config.image_size, self.model.config.image.patch_size
        side = full if image_size is None else ranges.count("image_size", image_size)
        if self._functions.is_one_size and side != full:
            raise DataError(f"image_size: this export takes images of {full} pixels only")
        if not 0 < side <= full or side % patch:
            raise DataError(
                f"image_size: {side} is not a multiple of the patch size {patch} between {patch} "
                f"and {full}"
            )
        return side

    def _require_objectness(self, what: str) -> None:
        if "objectness_head" not in self.model.params:
            raise DataError(
                f"{what}: this model has no objectness head (OWL-ViT has none, OWLv2 has); query "
                "images need a box, and tokens cannot be chosen"
            )

    def _batches(
        self,
        images: Iterator[ImageLike],
        batch_size: int,
        side: int,
        on_unreadable: Callable[[image_ops.UnreadableImage], None] | None = None,
    ) -> Iterator[_ImageBatch]:
        """Batches are filled up to the shape of the first, so that it is compiled already."""
        numbered, width = enumerate(images), 0
        while chunk := list(itertools.islice(numbered, batch_size)):
            width = width or len(chunk)
            batch = _ImageBatch([], [], np.zeros((width, side, side, 3), np.uint8))
            for index, given in chunk:
                try:
                    prepared = self._prepared(given, side, f"image {index}")
                except image_ops.UnreadableImage as error:
                    if on_unreadable is None:
                        raise
                    on_unreadable(error)
                    continue
                batch.pixels[len(batch.indices)] = prepared.pixels
                batch.indices.append(index)
                batch.sizes.append(prepared.size)
            yield batch

    def _embedded_batches(
        self,
        images: Sequence[ImageLike],
        batch_size: int,
        side: int,
        num_tokens: int,
        on_unreadable: Callable[[image_ops.UnreadableImage], None] | None,
    ) -> Iterator[tuple[_ImageBatch, TokenEmbeddings]]:
        """Tokens of the readable images of each batch, on the host."""
        for batch in self._batches(iter(images), batch_size, side, on_unreadable):
            sizes = batch.all_sizes()
            tokens = self._embed(self.model.params, batch.pixels, sizes, num_tokens=num_tokens)
            count = len(batch.indices)
            kept = jax.tree.map(lambda x, count=count: np.asarray(x)[:count], tokens)
            ranking.require_finite("embed", *jax.tree.leaves(kept))
            yield batch, kept

    def _encoded(self, queries: Queries, prompt_mode: str | None) -> _Asked:
        mode = self._prompts(prompt_mode)
        if isinstance(queries, QueryEmbeddings):
            embeddings.check_checkpoint("queries", queries.checkpoint, self.checkpoint)
            everything = np.ones(len(queries), bool)
            return _Asked(queries.embeddings, queries.names, everything)
        texts = text_queries.texts(queries)
        return _Asked(self._encode_texts(texts, mode), texts, text_queries.is_asked(texts))

    def _prompts(self, mode: str | None) -> str:
        """Raises `DataError` for a mode that is none."""
        if mode is None or mode == "":
            return self.model.eval_prompts
        try:
            prompts.eval_prompts(mode)
        except (ConfigError, TypeError):
            raise DataError(
                f"prompt_mode: {mode!r} is not one of 'none', 'clip' and 'clip_best7'"
            ) from None
        return mode

    def _encode_texts(self, queries: tuple[str, ...], mode: str) -> Float32[np.ndarray, "t q e"]:
        """Embeddings of texts, from memory if they were asked lately."""
        key = queries, mode
        if key not in self._texts:
            text_queries.check_read(queries, self._tokenizer)
            text_queries.warn(queries)
            self._texts[key] = self._run_text_tower(queries, mode)
            ranking.require_finite("queries", self._texts[key])
        self._texts.move_to_end(key)
        found = self._texts[key]
        while sum(x.nbytes for x in self._texts.values()) > TEXTS_KEPT:
            self._texts.popitem(last=False)
        return found

    def _run_text_tower(self, queries: tuple[str, ...], mode: str) -> Float32[np.ndarray, "t q e"]:
        parts = []
        at_once = TEXTS_AT_ONCE
        num_prompts = len(prompts.eval_prompts(mode))
        if num_prompts > 7:  # "clip" has 80
            at_once = max(QUERY_BUCKET, 7 * TEXTS_AT_ONCE // num_prompts)
        for start in range(0, len(queries), at_once):
            chunk = queries[start : start + at_once]
            # Later chunks are filled up to the first one's shape, which is compiled already.
            width = at_once if len(queries) > at_once else _bucket(len(chunk))
            encoded = self._encode(self.model.params, self._tokens(chunk, mode, width))
            parts.append(np.asarray(encoded, np.float32)[:, : len(chunk)])
        return np.concatenate(parts, axis=1)

    def _tokens(
        self, queries: tuple[str, ...], mode: str, width: int
    ) -> Int32[np.ndarray, "t q l"]:
        length = self._tokenizer.num_positions
        templates = prompts.eval_prompts(mode)
        tokens = np.zeros((len(templates), width, length), np.int32)
        for row, template in enumerate(templates):
            for column, query in enumerate(queries):
                text = prompts.apply_template(template, query)
                if not self._tokenizer.fits(text):
                    logging.warning("Query %r is cut: it is longer than %d tokens", text, length)
                tokens[row, column] = self._tokenizer.encode(text)
        return tokens


def _each_image(images: Any) -> Iterator[ImageLike]:
    if isinstance(images, ImageEmbeddings):
        raise DataError("images: are embedded already; search them")
    return image_inputs.each(images)


def _check(*, nms_iou: float | None = None, **options: Any) -> None:
    """Raises `DataError` for an option that is out of its range."""
    if nms_iou is not None:
        ranges.fraction("nms_iou", nms_iou)
    for name, value in options.items():
        (ranges.fraction if name == "threshold" else ranges.count)(name, value)


def _names_of(names: Any, num_images: int, what: str) -> tuple[str, ...]:
    """The names, or numbers where there are none. Raises `DataError` for one that is no text."""
    if names is None:
        return _numbered(num_images)
    given = list(names) if hasattr(names, "__iter__") else [names]
    for index, name in enumerate(given):
        if not isinstance(name, (str, os.PathLike)):
            raise DataError(f"{what}: names: {index}: {name!r} is no text")
    return tuple(str(name) for name in given)


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"image {index}" for index in range(count))


def _bucket(count: int) -> int:
    return -(-count // QUERY_BUCKET) * QUERY_BUCKET


def _pad_queries(
    asked: _Asked, width: int | None = None
) -> tuple[Float32[np.ndarray, "t p e"], Bool[np.ndarray, " p"]]:
    count = len(asked.names)
    width = width or _bucket(count)
    padded = np.pad(asked.embeddings, ((0, 0), (0, width - count), (0, 0)))
    return padded, np.pad(asked.is_asked, (0, width - count))


def _fill_up(rows: np.ndarray, count: int) -> np.ndarray:
    """Zero rows at the end, up to a shape that is compiled already."""
    if len(rows) == count:
        return rows
    return np.pad(rows, [(0, count - len(rows)), *[(0, 0)] * (rows.ndim - 1)])
