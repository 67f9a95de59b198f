"""Detection for users: images of any size in, boxes in their own pixels out."""

import dataclasses
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Bool, Float32, Int32, UInt8
from PIL import Image

from data_pipelines import image_ops, prompts, tokenizer
from data_pipelines.image_ops import Geometry
from owl_det import embeddings, inference, stablehlo
from owl_det.embeddings import ImageEmbeddings, QueryEmbeddings
from owl_det.errors import DataError
from owl_det.types import LoadedModel, Params, TokenEmbeddings

# A file, its bytes, a Pillow image, or pixels [h, w, 3] or [h, w].
ImageLike: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | UInt8[np.ndarray, "..."]
Box: TypeAlias = Sequence[float] | Float32[np.ndarray, " 4"]  # x0, y0, x1, y1 in pixels

QUERY_BUCKET = 16  # numbers of queries are rounded up to a multiple: fewer compilations
TEXTS_AT_ONCE = 256  # queries that pass through the text tower together, in up to seven prompts
TEXTS_KEPT = 2**28  # bytes of texts' embeddings that are remembered: 256 MiB
SCORES_AT_ONCE = 2**24  # of a search: 64 MiB


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first."""

    boxes: Float32[np.ndarray, "n 4"]  # x0, y0, x1, y1 in pixels of the image, inside it
    scores: Float32[np.ndarray, " n"]  # in (0, 1)
    labels: Int32[np.ndarray, " n"]  # index into the queries

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class Proposals:
    """Boxes of one image that look like objects of whatever kind, best first."""

    boxes: Float32[np.ndarray, "n 4"]  # x0, y0, x1, y1 in pixels of the image, inside it
    scores: Float32[np.ndarray, " n"]  # objectness in (0, 1)

    def __len__(self) -> int:
        return len(self.scores)


class _ImageBatch(NamedTuple):
    """Images that pass through the model together; rows beyond `indices` are fillers."""

    indices: list[int]  # of the images as they were given
    sizes: list[tuple[int, int]]  # height, width in pixels
    pixels: UInt8[np.ndarray, "b H W 3"]  # padded squares


class Predictor:
    """A frozen detector. Preprocessing is that of training and evaluation.

    Queries are texts, or the `QueryEmbeddings` that `encode_queries` makes of texts and
    `encode_image_queries` of images. All scores are probabilities as the model gives them.

    Options that methods share:

        batch_size         images that pass through the image tower together
        image_size         side of the padded square in pixels, a multiple of the patch size below
                           the model's own: faster, and blind to smaller things. The positions are
                           the top left part of the model's grid
        nms_iou            boxes that overlap a better one of their query more than this are dropped
        nms_across_queries boxes of other queries count as well
    """

    def __init__(self, model: LoadedModel, functions: inference.Functions | None = None):
        """`functions` are those of an export; without them the model's modules run."""
        self.model = model
        self._functions = functions or inference.functions_of(model)
        self._tokenizer = tokenizer.build(model.model.text, model.tokenizer)
        self._encode = jax.jit(self._functions.encode_queries)
        self._embed = jax.jit(self._embed_and_keep, static_argnames="num_tokens")
        self._rank = jax.jit(self._rank_tokens, static_argnames="top_k")
        self._choose = jax.jit(inference.choose_query_token)
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

    # --- detection -------------------------------------------------------------------------------

    def detect(
        self,
        images: Sequence[ImageLike],
        queries: Sequence[str] | QueryEmbeddings,
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
        _require_positive(top_k)
        encoded, num_queries = self._encoded(queries, prompt_mode)
        padded, is_query = _pad_queries(encoded, num_queries)
        found: list[Detections] = []
        for batch in self._batches(images, batch_size, self._side(image_size)):
            # Apart, so that another number of queries compiles no image tower again.
            tokens = self._embed(self.model.params, batch.pixels)
            pairs = self._rank(tokens, padded, is_query, top_k=top_k)
            found += _detections(pairs, batch.sizes, num_queries, threshold, self._geometry)
        return [_suppress(x, nms_iou, nms_across_queries) for x in found]

    def propose(
        self,
        images: Sequence[ImageLike],
        *,
        top_k: int = 100,
        threshold: float = 0.0,
        batch_size: int = 8,
        image_size: int | None = None,
        nms_iou: float | None = None,
    ) -> list[Proposals]:
        """The `top_k` boxes of highest objectness of each image that score at least `threshold`.

        Without those that lie in the padding of an image that is no square.

        Raises `DataError` if the model has no objectness head; else as `detect`.
        """
        _require_positive(top_k)
        self._require_objectness("propose")
        proposals: list[Proposals] = []
        for batch in self._batches(images, batch_size, self._side(image_size)):
            tokens = self._embed(self.model.params, batch.pixels, num_tokens=top_k)
            proposals += _proposals(tokens, batch.sizes, threshold, self._geometry)
        return [_suppress(x, nms_iou, across_queries=True) for x in proposals]

    # --- queries ---------------------------------------------------------------------------------

    def encode_queries(
        self, queries: Sequence[str], prompt_mode: str | None = None
    ) -> QueryEmbeddings:
        """Texts as queries to keep, or to ask together with those of images."""
        encoded, _ = self._encoded(queries, prompt_mode)
        return QueryEmbeddings(embeddings=encoded, names=tuple(queries), checkpoint=self.checkpoint)

    def encode_image_queries(
        self,
        images: Sequence[ImageLike],
        boxes: Sequence[Box | None] | None = None,
        names: Sequence[str] | None = None,
        *,
        batch_size: int = 8,
        image_size: int | None = None,
    ) -> QueryEmbeddings:
        """Queries that look for what stands in the given box of each image (one-shot detection).

        `boxes` are in pixels of their images; where there is none, the query is the image's most
        prominent object, the token of highest objectness. Images that share a name are one query,
        the mean of their embeddings; without `names` each is its own. How the token of a box is
        found: `inference.choose_query_token`.

        Raises `DataError` where images, boxes and names do not go together, a box has no area
        inside its image, or an image has no box and the model no objectness head.
        """
        given = list(boxes) if boxes is not None else [None] * len(images)
        labels = tuple(names) if names is not None else _numbered(len(images))
        if not len(images) or not len(images) == len(given) == len(labels):
            raise DataError(
                f"image queries: {len(images)} images, {len(given)} boxes and {len(labels)} names; "
                "give as many of each, at least one"
            )
        if any(box is None for box in given):
            self._require_objectness("image queries without a box")
        chosen: list[Float32[np.ndarray, " e"]] = []
        for batch in self._batches(images, batch_size, self._side(image_size)):
            padded = np.zeros((len(batch.pixels), 4), np.float32)
            has_box = np.zeros(len(batch.pixels), bool)
            for row, (index, size) in enumerate(zip(batch.indices, batch.sizes, strict=True)):
                box = given[index]
                if box is not None:
                    padded[row] = _checked_box(box, size, self._geometry, f"box {index}")
                    has_box[row] = True
            tokens = self._embed(self.model.params, batch.pixels)
            token = np.asarray(self._choose(tokens, padded, has_box))
            rows = np.arange(len(batch.indices))
            chosen += list(np.asarray(tokens.class_embeddings)[rows, token[rows]])
        distinct = tuple(dict.fromkeys(labels))
        means = [
            np.mean([x for x, label in zip(chosen, labels, strict=True) if label == name], axis=0)
            for name in distinct
        ]
        return QueryEmbeddings(
            embeddings=np.stack(means)[None], names=distinct, checkpoint=self.checkpoint
        )

    # --- embed once, search later ----------------------------------------------------------------

    def embed_images(
        self,
        images: Sequence[ImageLike],
        names: Sequence[str] | None = None,
        *,
        num_tokens: int = 0,
        batch_size: int = 8,
        image_size: int | None = None,
        on_unreadable: Callable[[image_ops.UnreadableImage], None] | None = None,
    ) -> ImageEmbeddings:
        """All that `search` needs of the images, so that new queries need no image tower.

        With every token kept (`num_tokens` 0), search finds what `detect` finds. `num_tokens` > 0
        keeps so many of highest objectness in each image: smaller and faster, and boxes of the
        others are not found. An unreadable image is left out if `on_unreadable` takes its error.
        Raises as `detect`, and `DataError` if names are not as many as images
        or the model has no objectness head to choose tokens by.
        """
        labels = tuple(names) if names is not None else _numbered(len(images))
        if not len(images) or len(labels) != len(images):
            raise DataError(f"embed: {len(images)} images and {len(labels)} names")
        if num_tokens < 0:
            raise DataError(f"num_tokens: must be 0 (all) or positive, got {num_tokens}")
        if num_tokens:
            self._require_objectness("num_tokens")
        side = self._side(image_size)
        batches = list(self._embedded_batches(images, batch_size, side, num_tokens, on_unreadable))
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
        queries: Sequence[str] | QueryEmbeddings,
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
        _require_positive(top_k)
        embeddings.check_checkpoint(images.source, images.checkpoint, self.checkpoint)
        width = self.model.model.embedding_dim
        if images.tokens.class_embeddings.shape[2] != width:
            raise DataError(f"{images.source}: class embeddings are not {width} wide")
        encoded, num_queries = self._encoded(queries, prompt_mode)
        # Ranking compiles in no time: a few queries go as they are, and not with fillers.
        few = num_queries < QUERY_BUCKET
        padded, is_query = _pad_queries(encoded, num_queries, num_queries if few else None)
        num_tokens = images.tokens.logit_shift.shape[1]
        scores = num_tokens * min(padded.shape[1], inference.QUERY_CHUNK)
        chunk = max(1, min(len(images), SCORES_AT_ONCE // scores))
        found: list[Detections] = []
        for start in range(0, len(images), chunk):
            here = slice(start, start + chunk)
            tokens = jax.tree.map(lambda x, rows=here: _fill_up(x[rows], chunk), images.tokens)
            pairs = self._rank(tokens, padded, is_query, top_k=top_k)
            sizes = cast(list[tuple[int, int]], images.sizes[here].tolist())
            found += _detections(pairs, sizes, num_queries, threshold, self._geometry)
        return [_suppress(x, nms_iou, nms_across_queries) for x in found]

    def forget_texts(self) -> None:
        """Empties the memory of the last texts' embeddings, which spares the text tower."""
        self._texts.clear()

    # --- parts -----------------------------------------------------------------------------------

    def preprocess(
        self, image: Image.Image, image_size: int | None = None
    ) -> UInt8[np.ndarray, "H W 3"]:
        """Resizes and pads one image as the model was trained."""
        return image_ops.to_square(image, self._side(image_size), self.model.preprocess)

    def _prepared(
        self, given: ImageLike, image: Image.Image, side: int
    ) -> UInt8[np.ndarray, "H W 3"]:
        """As `preprocess`; an error names the file."""
        try:
            return self.preprocess(image, side)
        except image_ops.UnreadableImage as error:
            where = f"{given}: " if isinstance(given, (str, os.PathLike)) else ""
            raise image_ops.UnreadableImage(f"{where}{error}") from None

    @property
    def _geometry(self) -> Geometry:
        return self.model.preprocess.geometry

    # Compiled in __init__.

    def _embed_and_keep(self, params: Params, image: jax.Array, num_tokens: int = 0) -> Any:
        return inference.keep_tokens(self._functions.embed_tokens(params, image), num_tokens)

    def _rank_tokens(self, tokens: Any, queries: jax.Array, is_query: jax.Array, top_k: int) -> Any:
        dtype = jnp.dtype(self.model.model.dtype)
        return inference.rank(tokens, queries, is_query, top_k=top_k, dtype=dtype)

    def _side(self, image_size: int | None) -> int:
        full, patch = self.model.model.image_size, self.model.model.image.patch_size
        side = full if image_size is None else image_size
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
        images: Sequence[ImageLike],
        batch_size: int,
        side: int,
        on_unreadable: Callable[[image_ops.UnreadableImage], None] | None = None,
    ) -> Iterator[_ImageBatch]:
        """Batches are filled up to one shape, so that it is compiled already."""
        if batch_size < 1:
            raise DataError(f"batch_size: must be positive, got {batch_size}")
        for start in range(0, len(images), batch_size):
            pixels = np.zeros((min(batch_size, len(images)), side, side, 3), np.uint8)
            batch = _ImageBatch([], [], pixels)
            for index in range(start, min(start + batch_size, len(images))):
                try:
                    image = read_image(images[index])
                    square = self._prepared(images[index], image, side)
                except image_ops.UnreadableImage as error:
                    if on_unreadable is None:
                        raise
                    on_unreadable(error)
                    continue
                pixels[len(batch.indices)] = square
                batch.indices.append(index)
                batch.sizes.append((image.height, image.width))
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
        for batch in self._batches(images, batch_size, side, on_unreadable):
            tokens = self._embed(self.model.params, batch.pixels, num_tokens=num_tokens)
            count = len(batch.indices)
            yield batch, jax.tree.map(lambda x, count=count: np.asarray(x)[:count], tokens)

    def _encoded(
        self, queries: Sequence[str] | QueryEmbeddings, prompt_mode: str | None
    ) -> tuple[Float32[np.ndarray, "t q e"], int]:
        """Embeddings of the queries and their number."""
        if isinstance(queries, QueryEmbeddings):
            embeddings.check_checkpoint("queries", queries.checkpoint, self.checkpoint)
            return queries.embeddings, len(queries)
        if isinstance(queries, str) or not queries:
            raise DataError("queries: give a list of at least one text")
        mode = prompt_mode or self.model.eval_prompts
        return self._encode_texts(tuple(queries), mode), len(queries)

    def _encode_texts(self, queries: tuple[str, ...], mode: str) -> Float32[np.ndarray, "t q e"]:
        """Embeddings of texts, from memory if they were asked lately."""
        key = queries, mode
        if key not in self._texts:
            self._texts[key] = self._run_text_tower(queries, mode)
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


def read_image(image: ImageLike) -> Image.Image:
    """An upright RGB image. Raises `image_ops.UnreadableImage`, naming the file if it is one."""
    if isinstance(image, (str, os.PathLike)):
        path = Path(image)
        try:
            return image_ops.decode_image(path.read_bytes())
        except (OSError, image_ops.UnreadableImage) as error:
            raise image_ops.UnreadableImage(f"{path}: {error}") from None
    if isinstance(image, Image.Image):
        return image_ops.upright_rgb(image)
    if isinstance(image, np.ndarray) and image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    return image_ops.decode_image(image)


def _require_positive(top_k: int) -> None:
    if top_k < 1:
        raise DataError(f"top_k: must be positive, got {top_k}")


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"image {index}" for index in range(count))


def _bucket(count: int) -> int:
    return -(-count // QUERY_BUCKET) * QUERY_BUCKET


def _pad_queries(
    encoded: Float32[np.ndarray, "t q e"], num_queries: int, width: int | None = None
) -> tuple[Float32[np.ndarray, "t p e"], Bool[np.ndarray, " p"]]:
    width = width or _bucket(num_queries)
    padded = np.pad(encoded, ((0, 0), (0, width - num_queries), (0, 0)))
    return padded, np.arange(width) < num_queries


def _fill_up(rows: np.ndarray, count: int) -> np.ndarray:
    """Zero rows at the end, up to a shape that is compiled already."""
    if len(rows) == count:
        return rows
    return np.pad(rows, [(0, count - len(rows)), *[(0, 0)] * (rows.ndim - 1)])


def _checked_box(
    box: Box, size: tuple[int, int], geometry: Geometry, where: str
) -> Float32[np.ndarray, " 4"]:
    """Pixel corners → cxcywh relative to the padded square, clipped to the image."""
    height, width = size
    corners = np.asarray(box, np.float64)
    if corners.shape != (4,) or not np.isfinite(corners).all():
        raise DataError(f"image queries, {where}: give four numbers x0, y0, x1, y1 in pixels")
    corners = np.clip(corners, 0, [width, height, width, height])
    if not (corners[2:] > corners[:2]).all():
        raise DataError(
            f"image queries, {where}: {np.asarray(box).tolist()} has no area inside the image of "
            f"{width} x {height} pixels"
        )
    return image_ops.boxes_to_padded(corners, height, width, geometry)


def _detections(
    pairs: inference.TopPairs,
    sizes: Sequence[tuple[int, int]],
    num_queries: int,
    threshold: float,
    geometry: Geometry,
) -> list[Detections]:
    """Of each image (the rows beyond are fillers) what reaches the threshold, in its pixels."""
    boxes, scores, labels = (np.asarray(x)[: len(sizes)] for x in pairs)
    keep = (scores >= threshold) & (labels < num_queries)
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32)
    found = [Detections(*nothing)] * len(sizes)
    for row in np.flatnonzero(keep.any(axis=1)).tolist():
        here = keep[row]
        found[row] = Detections(
            inference.pixel_boxes(boxes[row, here], *sizes[row], geometry),
            scores[row, here],
            labels[row, here].astype(np.int32),
        )
    return found


def _proposals(
    tokens: TokenEmbeddings,
    sizes: Sequence[tuple[int, int]],
    threshold: float,
    geometry: Geometry,
) -> list[Proposals]:
    """All boxes of each image that reach the threshold, best first, in its pixels."""
    scores = np.asarray(jax.nn.sigmoid(tokens.objectness_logits))
    boxes = np.asarray(tokens.boxes)
    found: list[Proposals] = []
    for row, (height, width) in enumerate(sizes):
        order = np.argsort(-scores[row], kind="stable")
        order = order[scores[row, order] >= threshold]
        pixels = image_ops.boxes_from_padded(boxes[row, order], height, width, geometry)
        is_inside = (pixels[:, 2:] > pixels[:, :2]).all(axis=1)  # others lie in the padding
        found.append(Proposals(pixels[is_inside], scores[row, order][is_inside]))
    return found


_Found = TypeVar("_Found", Detections, Proposals)


def _suppress(found: _Found, nms_iou: float | None, across_queries: bool) -> _Found:
    """Greedy non-maximum suppression; None keeps everything."""
    if nms_iou is None or not len(found):
        return found
    if not 0 <= nms_iou <= 1:
        raise DataError(f"nms_iou: {nms_iou} is not in [0, 1]")
    with warnings.catch_warnings():
        # OpenCV is no dependency: supervision says at import that it works with NumPy instead.
        warnings.filterwarnings("ignore", message="OpenCV", category=UserWarning)
        from supervision import box_non_max_suppression
    columns: list[np.ndarray] = [found.boxes, found.scores[:, None]]
    if isinstance(found, Detections) and not across_queries:
        columns.append(found.labels[:, None])
    keep = box_non_max_suppression(np.concatenate(columns, axis=1), nms_iou)
    return dataclasses.replace(
        found, **{field.name: getattr(found, field.name)[keep] for field in fields(found)}
    )
