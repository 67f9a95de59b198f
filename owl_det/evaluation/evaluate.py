"""Runs a detector over a source and measures it; training and `owl-det evaluate` share it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from data_pipelines import image_ops, prompts, tokenizer
from data_pipelines.features import Category, Record
from data_pipelines.image_ops import UnreadableImage
from data_pipelines.source import Source
from owl_det import sharding
from owl_det.config import EvaluationConfig
from owl_det.evaluation.coco import CocoEvaluator, Metrics
from owl_det.evaluation.loader import Loader
from owl_det.evaluation.pictures import beside_truth
from owl_det.evaluation.regions import RegionAccuracy
from owl_det.inference import ranking
from owl_det.modeling.family import Detector
from owl_det.types import Params


class Found(NamedTuple):
    """`inference.TopPairs` of one image, on the host."""

    boxes_xyxy: np.ndarray
    scores: np.ndarray
    query: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """What one pass over a data set gave."""

    evaluator: CocoEvaluator
    pictures: list[np.ndarray]
    num_unreadable: int
    regions: RegionAccuracy | None = None


def pairs_kept(settings: EvaluationConfig) -> int:
    """Query-box pairs kept per image. "fixed" has no limit per image: 3,000 come close to that."""
    return settings.top_k or (3000 if settings.protocol == "fixed" else 300)


class Evaluate:
    """Evaluates one source, with as many parameters as there are.

    All categories are asked together, in every prompt of `eval_prompts` (probabilities are
    averaged); each image keeps its `pairs_kept` best query-box pairs, without boxes that lie in
    its padding. `settings.batch_size` must be
    positive; it is rounded up to a multiple of the mesh's data shards. With
    `settings.region_accuracy` the tokens' embeddings are measured too (`regions.RegionAccuracy`).
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
        functions: ranking.Functions | None = None,
    ) -> None:
        """`functions` are those of an export; without them the detector runs."""
        self.source, self.name, self.settings, self.mesh = source, name, settings, mesh
        self.detector = detector
        words = tokenizer.build(detector.config.text, tokenizer_file)
        templates = prompts.eval_prompts(eval_prompts)
        self.tokens = np.stack(
            [
                words.encode_all([prompts.apply_template(t, c.name) for c in source.categories])
                for t in templates
            ]
        )
        self.loader = Loader(
            source,
            mesh,
            image_size=detector.config.image_size,
            preprocess=detector.preprocess,
            batch_size=settings.batch_size,
            max_images=settings.max_images,
        )
        whole = sharding.replicated(mesh)
        run = functions or ranking.Functions(
            partial(ranking.encode_queries, detector), partial(ranking.embed_tokens, detector)
        )
        self._encode = jax.jit(run.encode_queries, out_shardings=whole)
        self._detect = jax.jit(partial(self._forward, run), out_shardings=whole)

    def _forward(
        self,
        run: ranking.Functions,
        params: Params,
        images: Any,
        sizes: Any,
        queries: Any,
        is_query: Any,
    ) -> tuple[ranking.TopPairs, jax.Array | None]:
        """The best pairs and, where regions are measured, the class embeddings of all tokens."""
        tokens = run.embed_tokens(params, images)
        found = ranking.rank(
            tokens,
            queries,
            is_query,
            sizes,
            top_k=pairs_kept(self.settings),
            dtype=self.detector.dtype,
            geometry=self.detector.preprocess.geometry,
        )
        return found, tokens.class_embeddings if self.settings.region_accuracy else None

    def __call__(self, params: Params) -> Evaluation:
        """Detects in every readable image. Only process 0 collects results.

        Raises `DataError` if more than 1 % of the images cannot be read, `CheckpointError` if the
        model computes NaN.
        """
        queries = self._encode(params, self.tokens)
        is_query = np.ones(self.tokens.shape[1], bool)
        evaluator = CocoEvaluator(self.source.categories, self.settings.protocol)
        regions = None
        if self.settings.region_accuracy:
            regions = RegionAccuracy(self.source.categories, np.asarray(queries))
        pictures: list[np.ndarray] = []
        for loaded in self.loader.batches(f"evaluate {self.name}"):
            found, embeddings = self._detect(params, loaded.images, loaded.sizes, queries, is_query)
            found = jax.tree.map(np.asarray, found)
            ranking.require_finite(self.name, found.scores, found.boxes_xyxy)
            if not _is_first():
                continue
            records = [
                self._record(index) if loaded.is_readable[i] else None
                for i, index in enumerate(loaded.indices)
            ]
            for i, record in enumerate(records):
                if record is not None:
                    of_image = Found(*(np.asarray(x[i]) for x in found))
                    picture = self._add(evaluator, record, of_image)
                    if len(pictures) < self.settings.num_pictures:
                        pictures.append(picture())
            if regions is not None:
                regions.add(np.asarray(embeddings), records, self.detector.preprocess.geometry)
        return Evaluation(evaluator, pictures, self.loader.num_unreadable, regions)

    def _record(self, index: int) -> Record | None:
        """The labels of an image that the loader has read; None if it is gone since."""
        try:
            return self.source[index]
        except UnreadableImage as error:
            logging.warning("Skipped image %d of %s: %s", index, self.name, error)
            self.loader.num_unreadable += 1
            return None

    def _add(
        self, evaluator: CocoEvaluator, record: Record, found: Found
    ) -> Callable[[], np.ndarray]:
        """Adds one image; returns a function that draws it."""
        height, width = image_ops.image_size(record.image)
        geometry = self.detector.preprocess.geometry
        boxes = ranking.pixel_boxes(found.boxes_xyxy, height, width, geometry)
        is_shown = found.scores != ranking.OUTSIDE
        boxes, found = boxes[is_shown], Found(*(x[is_shown] for x in found))
        categories = self.source.categories
        ids = {category.name: category.id for category in categories}
        rows = [(row, ids[name]) for row, names in enumerate(record.names) for name in names]
        take = np.array([row for row, _ in rows], int)
        federated: dict[str, Any] = {}
        if _is_federated(record, categories):
            federated = {
                "negatives": [ids[name] for name in record.negatives],
                "not_exhaustive": [ids[name] for name in record.not_exhaustive if name in ids],
            }
        evaluator.add(
            record.image_id,
            (height, width),
            (record.boxes_xyxy[take], np.array([i for _, i in rows], int), record.is_crowd[take]),
            (boxes, found.scores, np.array([c.id for c in categories], int)[found.query]),
            true_areas=None if record.areas is None else record.areas[take],
            given_id=record.given_id,
            **federated,
        )
        return lambda: beside_truth(record, categories, boxes, found.scores, found.query)


def summary(
    measure: Evaluate, result: Evaluation, metrics: Metrics, step: int, seconds: float
) -> dict[str, Any]:
    """What is written of one evaluation; metrics are in [0, 1], with 6 digits."""
    return {
        "step": step,
        **{key: round(value, 6) for key, value in metrics.scalars().items()},
        **(
            {key: round(value, 6) for key, value in result.regions.scalars().items()}
            if result.regions
            else {}
        ),
        "unreadable_images": result.num_unreadable,
        "dataset": measure.source.version,
        "seconds": round(seconds, 1),
    }


def _is_first() -> bool:
    return jax.process_index() == 0


def _is_federated(record: Record, categories: tuple[Category, ...]) -> bool:
    """True if some categories are neither present nor known to be absent."""
    known = {name for names in record.names for name in names} | set(record.negatives)
    return bool(record.not_exhaustive) or len(known) < len(categories)
