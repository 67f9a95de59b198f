"""Detection for users: images of any size in, boxes in their own pixels out."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from data_pipelines import image_ops
from data_pipelines.image_ops import UnreadableImage
from owl_det.errors import DataError
from owl_det.inference import (
    detections,
    image_inputs,
    ranges,
    ranking,
    suppression,
)
from owl_det.inference.detections import Detections, Proposals
from owl_det.inference.embeddings import ImageEmbeddings, QueryEmbeddings, check_checkpoint
from owl_det.inference.export_folder import is_export
from owl_det.inference.image_encoder import ImageBatch, ImageEncoder
from owl_det.inference.image_inputs import Box, ImageLike, Images
from owl_det.inference.query_encoder import QUERY_BUCKET, EncodedQueries, QueryEncoder
from owl_det.types import LoadedModel

__all__ = ["Detections", "ImageLike", "Predictor", "Proposals"]

Queries: TypeAlias = str | Sequence[str] | QueryEmbeddings

SCORES_AT_ONCE = 2**24  # of a search: 64 MiB


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

    def __init__(self, model: LoadedModel, functions: ranking.DetectorFunctions | None = None):
        """`functions` are those of an export; without them the model's modules run."""
        self.model = model
        functions = functions or ranking.DetectorFunctions.of_model(model)
        self._queries = QueryEncoder(model, jax.jit(functions.embed_prompts))
        self._images = ImageEncoder(model, functions)
        geometry, dtype = model.preprocess.geometry, jnp.dtype(model.config.dtype)
        rank = partial(ranking.rank, dtype=dtype, geometry=geometry)
        self._rank = jax.jit(rank, static_argnames="top_k")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Predictor":
        """From a workdir (its latest checkpoint), one checkpoint directory, or a StableHLO export.

        Raises `CheckpointError` if there is none or it has no detection heads. An export needs
        neither Flax nor Orbax.
        """
        if is_export(path):
            from owl_det.inference import stablehlo

            return cls(*stablehlo.load(path))
        from owl_det.checkpoints.load import load_detector

        return cls(load_detector(path))

    @cached_property
    def checkpoint(self) -> str:
        """`identity.model_hash` of the model, which embeddings carry."""
        from owl_det.checkpoints import identity

        return identity.model_hash(self.model)

    @cached_property
    def _choose(self) -> Callable[..., jax.Array]:
        from owl_det.inference.query_token import choose_query_token

        return jax.jit(choose_query_token, static_argnames="geometry")

    @cached_property
    def _former_checkpoint(self) -> str:
        from owl_det.checkpoints import identity

        return identity.former_model_hash(self.model)

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
        self._queries.prompt_mode(prompt_mode)
        side, pictures = self._images.side(image_size), _each_image(images)
        asked = self._encoded(queries, prompt_mode)
        padded, is_query = asked.padded()
        found: list[Detections] = []
        for batch in self._images.batches(pictures, batch_size, side):
            # Apart, so that another number of queries compiles no image tower again.
            tokens = self._images.embed(batch)
            pairs = self._rank(tokens, padded, is_query, batch.all_sizes(), top_k=top_k)
            found += self._detections(pairs, batch.sizes, asked, threshold)
        return [suppression.suppress(x, nms_iou, nms_across_queries) for x in found]

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
        side, pictures = self._images.side(image_size), _each_image(images)
        proposals: list[Proposals] = []
        for batch in self._images.batches(pictures, batch_size, side):
            tokens = self._images.embed(batch, num_tokens=top_k)
            proposals += detections.of_tokens(tokens, batch.sizes, threshold, self._images.geometry)
        return [suppression.suppress(x, nms_iou, across_queries=True) for x in proposals]

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
        """Queries that look for what the box of each image shows (one-shot detection).

        `boxes` are in pixels of their images; where there is none, the query is the image's most
        prominent object, the token of highest objectness. Images that share a name are one query,
        the mean of their embeddings; without `names` each is its own. How the token of a box is
        found: `query_token.choose_query_token`.

        Raises `DataError` where images, boxes and names do not go together, a box is none in
        pixels of its image, or an image has no box and the model no objectness head.
        """
        from owl_det.inference import query_boxes

        _check(batch_size=batch_size)
        side, pictures = self._images.side(image_size), list(_each_image(images))
        each_box = query_boxes.each(boxes, len(pictures))
        # One text is the name of what all the images show.
        several = [names] * len(pictures) if isinstance(names, str) else names
        labels = image_inputs.names(several, len(pictures), "image queries")
        if not pictures or not len(pictures) == len(each_box) == len(labels):
            raise DataError(
                f"image queries: {len(pictures)} images, {len(each_box)} boxes and {len(labels)} "
                "names; give as many of each, at least one"
            )
        if any(box is None for box in each_box):
            self._require_objectness("image queries without a box")
        chosen: list[Float32[np.ndarray, " e"]] = []
        for batch in self._images.batches(iter(pictures), batch_size, side):
            chosen += self._chosen_tokens(batch, each_box, pictures)
        distinct = tuple(dict.fromkeys(labels))
        means = [
            np.mean([x for x, label in zip(chosen, labels, strict=True) if label == name], axis=0)
            for name in distinct
        ]
        return QueryEmbeddings(
            embeddings=np.stack(means)[None], names=distinct, checkpoint=self.checkpoint
        )

    def _chosen_tokens(
        self, batch: ImageBatch, boxes: Sequence[Any], images: Sequence[ImageLike]
    ) -> list[Float32[np.ndarray, " e"]]:
        """The class embedding of the token that stands for each image's box."""
        from owl_det.inference import query_boxes

        geometry = self._images.geometry
        padded, has_box = query_boxes.of_batch(boxes, images, batch, geometry)
        sizes, tokens = batch.all_sizes(), self._images.embed(batch)
        token = np.asarray(self._choose(tokens, padded, has_box, sizes, geometry=geometry))
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
        on_unreadable: Callable[[UnreadableImage], None] | None = None,
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
        side, pictures = self._images.side(image_size), list(_each_image(images))
        several = [names] if isinstance(names, str) else names
        labels = image_inputs.names(several, len(pictures), "embed")
        if not pictures or len(labels) != len(pictures):
            raise DataError(f"embed: {len(pictures)} images and {len(labels)} names")
        read = self._images.batches(iter(pictures), batch_size, side, on_unreadable)
        batches = list(self._images.embed_all(read, num_tokens))
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
                "after the other what embedding_files.read does"
            )
        self._check_checkpoint(images.source, images.checkpoint)
        width = self.model.config.embedding_dim
        if images.tokens.class_embeddings.shape[2] != width:
            raise DataError(f"{images.source}: class embeddings are not {width} wide")
        asked = self._encoded(queries, prompt_mode)
        # Ranking compiles in no time: a few queries go as they are, and not with fillers.
        few = len(asked.names) < QUERY_BUCKET
        padded, is_query = asked.padded(1 if few else QUERY_BUCKET)
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
            pixels = [(height, width) for height, width in sizes.tolist()]
            found += self._detections(pairs, pixels, asked, threshold)
        return [suppression.suppress(x, nms_iou, nms_across_queries) for x in found]

    def forget_texts(self) -> None:
        """Empties the memory of the last texts' embeddings, which spares the text tower."""
        self._queries.forget()

    # --- parts -----------------------------------------------------------------------------------

    def preprocess(
        self, image: Image.Image, image_size: int | None = None
    ) -> UInt8[np.ndarray, "H W 3"]:
        """Resizes and pads one image as the model was trained."""
        return image_ops.to_square(image, self._images.side(image_size), self.model.preprocess)

    def _detections(
        self,
        pairs: ranking.TopPairs,
        sizes: Sequence[tuple[int, int]],
        asked: EncodedQueries,
        threshold: float,
    ) -> list[Detections]:
        return detections.of_pairs(
            pairs, sizes, asked.names, asked.is_asked, threshold, self._images.geometry
        )

    def _require_objectness(self, what: str) -> None:
        if "objectness_head" not in self.model.params:
            raise DataError(
                f"{what}: this model has no objectness head (OWL-ViT has none, OWLv2 has); query "
                "images need a box, and tokens cannot be chosen"
            )

    def _encoded(self, queries: Queries, prompt_mode: str | None) -> EncodedQueries:
        mode = self._queries.prompt_mode(prompt_mode)
        if not isinstance(queries, QueryEmbeddings):
            return self._queries.encode(queries, mode)
        self._check_checkpoint("queries", queries.checkpoint)
        return EncodedQueries(queries.embeddings, queries.names, np.ones(len(queries), bool))

    def _check_checkpoint(self, what: str, made_with: str) -> None:
        """Raises `DataError` if embeddings come from another model than this one."""
        if made_with != self.checkpoint and made_with != self._former_checkpoint:
            check_checkpoint(what, made_with, self.checkpoint)


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


def _fill_up(rows: np.ndarray, count: int) -> np.ndarray:
    """Zero rows at the end, up to a shape that is compiled already."""
    if len(rows) == count:
        return rows
    return np.pad(rows, [(0, count - len(rows)), *[(0, 0)] * (rows.ndim - 1)])
