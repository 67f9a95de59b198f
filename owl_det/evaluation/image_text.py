"""What a contrastive model knows: zero-shot classification, retrieval, region accuracy."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Float32, Int

from data_pipelines.features import Record
from data_pipelines.source import Source
from owl_det import sharding
from owl_det.config import EvaluationConfig
from owl_det.evaluation.loader import Loader
from owl_det.evaluation.regions import NameAccuracy, RegionAccuracy
from owl_det.inference import ranking
from owl_det.inference.text_encoder import TextEncoder
from owl_det.modeling.build import call
from owl_det.modeling.family import Detector
from owl_det.types import Params

RETRIEVAL_RANKS = (1, 5, 10)
_ROWS = 1024  # of a similarity matrix, or texts in the text tower, that exist at once


@dataclass(frozen=True)
class ImageTextMeasurement:
    """What one pass over a data set gave. Implements `evaluator.Measurement`."""

    values: dict[str, float]  # metrics by name; empty on every process but the first
    num_unreadable: int

    def scalars(self) -> dict[str, float]:
        return self.values

    def headline(self) -> str:
        chosen = (key for key in self.values if "top1" in key or "_r1" in key)
        return ", ".join(f"{key} {self.values[key]:.3f}" for key in chosen)

    def write(self, workdir: Path, name: str, step: int, *, with_plots: bool) -> None:
        """Nothing: there are no results of images, and nothing to draw."""


class ImageTextEvaluator:
    """Evaluates two towers on one source, by what its records hold.

    Boxes: region accuracy (not of towers with attention pooling, whose tokens lie in no space
    shared with texts). Images whose objects have one name: zero-shot classification among all
    categories, with the mean embedding of the prompts. Captions: retrieval, the first caption of
    each image; equal captions are one text. Without categories there is retrieval alone.
    """

    def __init__(
        self,
        detector: Detector,
        source: Source,
        mesh: Mesh,
        name: str,
        *,
        settings: EvaluationConfig,
        eval_prompts: str,
        tokenizer_file: str = "",
    ) -> None:
        self.source, self.name, self.detector = source, name, detector
        self.eval_prompts = eval_prompts
        self.loader = Loader(
            source,
            mesh,
            image_size=detector.config.image_size,
            preprocess=detector.preprocess,
            batch_size=settings.batch_size,
            max_images=settings.max_images,
        )
        whole = sharding.replicated(mesh)
        self._has_dense = detector.config.vit.pooling != "map" and bool(source.categories)
        self._embed = jax.jit(self._forward, out_shardings=whole)
        self._encoder = TextEncoder(
            jax.jit(partial(ranking.embed_prompts, detector), out_shardings=whole),
            detector.config,
            tokenizer_file,
            names_at_once=_ROWS,
        )

    def _forward(self, params: Params, images: Any) -> tuple[Any, Any]:
        if self._has_dense:
            return call(self.detector.embed_image_and_patches, params, images)
        return call(self.detector.embed_image, params, images), None

    def __call__(self, params: Params) -> ImageTextMeasurement:
        """All metrics, in [0, 1]. Every process computes, process 0 returns them (others nothing).

        `cut_captions` counts the distinct captions that are longer than the text tower's positions.

        Raises `DataError` if more than 1 % of the images cannot be read.
        """
        categories = self.source.categories
        names = [category.name for category in categories]
        prompted = _unit_length(self._encoder.embed(params, names, self.eval_prompts))
        zero_shot = NameAccuracy(categories, prompted, "zero_shot")
        regions = RegionAccuracy(categories, prompted)
        embeddings: list[np.ndarray] = []
        captions: list[str] = []
        for batch in self.loader.batches(f"evaluate {self.name}"):
            whole, dense = self._embed(params, batch.images)
            records = self.loader.records(batch)
            whole = _unit_length(np.asarray(whole))
            _add_single_named(zero_shot, whole, records)
            if dense is not None:
                regions.add(np.asarray(dense), records, self.detector.preprocess.geometry)
            for row, record in enumerate(records):
                if record is not None and record.captions:
                    embeddings.append(whole[row])
                    captions.append(record.captions[0])
        values = {**zero_shot.scalars(), **regions.scalars()}
        if captions:
            distinct = {text: i for i, text in enumerate(dict.fromkeys(captions))}
            truth = np.array([distinct[text] for text in captions])
            texts = _unit_length(self._encoder.embed_texts(params, list(distinct)))
            values |= retrieval(np.stack(embeddings), texts, truth)
            fits = self._encoder.tokenizer.fits
            values["cut_captions"] = float(sum(not fits(text) for text in distinct))
        values = values if jax.process_index() == 0 else {}
        return ImageTextMeasurement(values, self.loader.num_unreadable)


def retrieval(
    images: Float32[np.ndarray, "n e"],
    texts: Float32[np.ndarray, "u e"],
    truth: Int[np.ndarray, " n"],
) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions; `truth` is the row of each image's text.

    Image to text: the share of images whose text is among the best k. Text to image: the share of
    texts that have one of their images among the best k. Embeddings have unit length. A tie, or a
    score that is no number, counts against the truth: towers that have collapsed know nothing.
    """
    image_rank = np.empty(len(images), np.int64)
    best_of_text = np.full(len(texts), -np.inf, np.float32)
    for start in range(0, len(images), _ROWS):
        rows = slice(start, start + _ROWS)
        scores = images[rows] @ texts.T
        own = scores[np.arange(len(scores)), truth[rows]]
        image_rank[rows] = (~(scores < own[:, None])).sum(1) - 1
        np.maximum.at(best_of_text, truth[rows], np.where(np.isnan(own), -np.inf, own))
    text_rank = np.zeros(len(texts), np.int64)
    for start in range(0, len(images), _ROWS):
        rows = slice(start, start + _ROWS)
        is_other = truth[rows][:, None] != np.arange(len(texts))
        text_rank += (~(images[rows] @ texts.T < best_of_text[None]) & is_other).sum(0)
    return {
        f"{name}_r{k}": float((rank < k).mean())
        for name, rank in (("image_to_text", image_rank), ("text_to_image", text_rank))
        for k in RETRIEVAL_RANKS
    }


def _add_single_named(
    zero_shot: NameAccuracy, embeddings: Float[np.ndarray, "b e"], records: list[Record | None]
) -> None:
    rows, names = [], []
    for row, record in enumerate(records):
        present = {name for group in record.names for name in group} if record else set()
        if len(present) == 1:
            rows.append(row)
            names.append(present.pop())
    zero_shot.add_named(embeddings[rows], names)


def _unit_length(x: Float[np.ndarray, "*b e"]) -> Float32[np.ndarray, "*b e"]:
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
