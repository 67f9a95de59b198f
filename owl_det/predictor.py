"""Detection for users: images of any size in, boxes in their own pixels out."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import jax
import numpy as np
from absl import logging
from jaxtyping import Float32, Int32, UInt8
from PIL import Image

from data_pipelines import image_ops, prompts, tokenizer
from owl_det import inference, stablehlo
from owl_det.errors import DataError
from owl_det.types import LoadedModel

# A file, its bytes, a Pillow image, or pixels [h, w, 3] or [h, w].
ImageLike: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | UInt8[np.ndarray, "..."]

QUERY_BUCKET = 16  # numbers of queries are rounded up to a multiple: fewer compilations


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first."""

    boxes: Float32[np.ndarray, "n 4"]  # x0, y0, x1, y1 in pixels of the image, inside it
    scores: Float32[np.ndarray, " n"]  # in (0, 1)
    labels: Int32[np.ndarray, " n"]  # index into the queries

    def __len__(self) -> int:
        return len(self.scores)


class Predictor:
    """A frozen detector. Preprocessing is that of training and evaluation."""

    def __init__(self, model: LoadedModel, functions: inference.Functions | None = None):
        """`functions` are those of an export; without them the model's modules run."""
        self.model = model
        functions = functions or inference.functions_of(model)
        self._tokenizer = tokenizer.build(model.model.text, model.tokenizer)
        self._encode = jax.jit(functions.encode_queries)
        self._detect = jax.jit(functions.detect, static_argnames="top_k")
        self._embeddings: dict[tuple[tuple[str, ...], str], jax.Array] = {}

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

    def detect(
        self,
        images: Sequence[ImageLike],
        queries: Sequence[str],
        *,
        threshold: float = 0.1,
        top_k: int = 300,
        batch_size: int = 8,
        prompt_mode: str | None = None,
    ) -> list[Detections]:
        """The best `top_k` query-box pairs of each image that score at least `threshold`.

        `prompt_mode` is "none", "clip" or "clip_best7" (probabilities are averaged over the
        prompts); by default the one the model was evaluated with. Raises `DataError` without
        queries and `image_ops.UnreadableImage`, naming the image, where one cannot be decoded.
        """
        embeddings = self.encode_queries(queries, prompt_mode)
        is_query = np.arange(embeddings.shape[1]) < len(queries)
        found: list[Detections] = []
        side = self.model.model.image_size
        for start in range(0, len(images), batch_size):
            chunk = [_decode(image) for image in images[start : start + batch_size]]
            # The last batch is filled up, so that it has the shape that is compiled already.
            pixels = np.zeros((min(batch_size, len(images)), side, side, 3), np.uint8)
            for row, image in enumerate(chunk):
                pixels[row] = self.preprocess(image)
            pairs = jax.tree.map(
                np.asarray,
                self._detect(self.model.params, pixels, embeddings, is_query, top_k=top_k),
            )
            for row, image in enumerate(chunk):
                boxes, scores, labels = (x[row] for x in pairs)
                keep = (scores >= threshold) & (labels < len(queries))
                found.append(
                    Detections(
                        inference.pixel_boxes(
                            boxes[keep],
                            image.height,
                            image.width,
                            self.model.preprocess.geometry,
                        ),
                        scores[keep],
                        labels[keep].astype(np.int32),
                    )
                )
        return found

    def encode_queries(self, queries: Sequence[str], prompt_mode: str | None = None) -> jax.Array:
        """Embeddings [t, q', e] of the queries in each prompt; q' is q rounded up. Cached."""
        if isinstance(queries, str) or not queries:
            raise DataError("queries: give a list of at least one text")
        mode = prompt_mode or self.model.eval_prompts
        key = (tuple(queries), mode)
        if key not in self._embeddings:
            self._embeddings[key] = self._encode(self.model.params, self._tokens(*key))
        return self._embeddings[key]

    def preprocess(self, image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
        """Resizes and pads one image as the model was trained."""
        return image_ops.to_square(image, self.model.model.image_size, self.model.preprocess)

    def _tokens(self, queries: tuple[str, ...], mode: str) -> Int32[np.ndarray, "t q l"]:
        padded = -(-len(queries) // QUERY_BUCKET) * QUERY_BUCKET
        length = self._tokenizer.num_positions
        templates = prompts.eval_prompts(mode)
        tokens = np.zeros((len(templates), padded, length), np.int32)
        for row, template in enumerate(templates):
            for column, query in enumerate(queries):
                text = prompts.apply_template(template, query)
                if not self._tokenizer.fits(text):
                    logging.warning("Query %r is cut: it is longer than %d tokens", text, length)
                tokens[row, column] = self._tokenizer.encode(text)
        return tokens


def _decode(image: ImageLike) -> Image.Image:
    if isinstance(image, (str, os.PathLike)):
        path = Path(image)
        try:
            return image_ops.decode_image(path.read_bytes())
        except (OSError, image_ops.UnreadableImage) as error:
            raise image_ops.UnreadableImage(f"{path}: {error}") from None
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, np.ndarray) and image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    return image_ops.decode_image(image)
