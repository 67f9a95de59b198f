"""Runs a detector over a source and measures it; training and `owl-det evaluate` share it."""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from data_pipelines import image_ops
from data_pipelines.features import Category, Record
from data_pipelines.source import Source
from owl_det import sharding
from owl_det.config import EvaluationConfig
from owl_det.evaluation.coco import CocoEvaluator
from owl_det.evaluation.loader import Loader
from owl_det.evaluation.metrics import Metrics
from owl_det.inference import ranking
from owl_det.inference.text_encoder import TextEncoder
from owl_det.modeling.family import Detector
from owl_det.types import Params

if TYPE_CHECKING:
    from owl_det.evaluation.regions import RegionAccuracy


class HostPairs(NamedTuple):
    """`ranking.TopPairs` of one image, on the host."""

    boxes_xyxy: np.ndarray
    scores: np.ndarray
    query: np.ndarray


@dataclass(frozen=True)
class DetectionMeasurement:
    """What one pass over a data set gave. Implements `evaluator.Measurement`."""

    evaluator: CocoEvaluator
    pictures: list[np.ndarray]  # predictions beside the truth
    num_unreadable: int
    regions: "RegionAccuracy | None" = None

    @cached_property
    def metrics(self) -> Metrics:
        """Raises `DataError` without any ground truth."""
        return self.evaluator.compute()

    def scalars(self) -> dict[str, float]:
        regions = self.regions.scalars() if self.regions else {}
        return {**self.metrics.scalars(), **regions}

    def headline(self) -> str:
        return f"AP {self.metrics.AP:.3f}, AP50 {self.metrics.AP50:.3f}"

    def write(
        self, workdir: Path, name: str, step: int, *, with_plots: bool
    ) -> UInt8[np.ndarray, "H W 3"] | None:
        """Writes `eval/results_<name>.json`, the pictures of this step and, if asked, plots."""
        from owl_det.evaluation import pictures
        from owl_det.viz.pictures import save_png

        self.evaluator.write_results(workdir / "eval" / f"results_{name}.json")
        if with_plots:
            pictures.write_plots(workdir / "pictures", name, self.evaluator, self.metrics)
        if not self.pictures:
            return None
        sheet = pictures.sheet(self.pictures)
        save_png(workdir / "pictures" / f"{name}_{step:07d}.png", sheet)
        return sheet


def pairs_kept(settings: EvaluationConfig) -> int:
    """Query-box pairs kept per image. "fixed" has no limit per image: 3,000 come close to that."""
    return settings.top_k or (3000 if settings.protocol == "fixed" else 300)


class DetectionEvaluator:
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
        functions: ranking.DetectorFunctions | None = None,
    ) -> None:
        """`functions` are those of an export; without them the detector runs."""
        self.source, self.name, self.settings, self.mesh = source, name, settings, mesh
        self.detector, self.eval_prompts = detector, eval_prompts
        self.loader = Loader(
            source,
            mesh,
            image_size=detector.config.image_size,
            preprocess=detector.preprocess,
            batch_size=settings.batch_size,
            max_images=settings.max_images,
        )
        whole = sharding.replicated(mesh)
        run = functions or ranking.DetectorFunctions.of_detector(detector)
        self._encoder = TextEncoder(
            jax.jit(run.embed_prompts, out_shardings=whole), detector.config, tokenizer_file
        )
        self._detect = jax.jit(partial(self._forward, run), out_shardings=whole)

    def _forward(
        self,
        run: ranking.DetectorFunctions,
        params: Params,
        images: Any,
        sizes: Any,
        queries: Any,
        is_query: Any,
    ) -> tuple[ranking.TopPairs, jax.Array | None]:
        """The best pairs and, where regions are measured, the class embeddings of all tokens."""
        tokens = run.embed_image_tokens(params, images)
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

    def __call__(self, params: Params) -> DetectionMeasurement:
        """Detects in every readable image. Only process 0 collects results.

        Raises `DataError` if more than 1 % of the images cannot be read, `CheckpointError` if the
        model computes NaN.
        """
        names = [category.name for category in self.source.categories]
        embedded = self._encoder.embed(params, names, self.eval_prompts)
        queries = jax.device_put(embedded, sharding.replicated(self.mesh))
        is_query = np.ones(len(names), bool)
        evaluator = CocoEvaluator(self.source.categories, self.settings.protocol)
        regions = None
        if self.settings.region_accuracy:
            from owl_det.evaluation.regions import RegionAccuracy

            regions = RegionAccuracy(self.source.categories, embedded)
        pictures: list[np.ndarray] = []
        for batch in self.loader.batches(f"evaluate {self.name}"):
            found, embeddings = self._detect(params, batch.images, batch.sizes, queries, is_query)
            found = jax.tree.map(np.asarray, found)
            ranking.require_finite(self.name, found.scores, found.boxes_xyxy)
            if not _is_first():
                continue
            records = self.loader.records(batch)
            for i, record in enumerate(records):
                if record is not None:
                    detected = self._in_pixels(
                        record, HostPairs(*(np.asarray(x[i]) for x in found))
                    )
                    self._add(evaluator, record, detected)
                    if len(pictures) < self.settings.num_pictures:
                        pictures.append(self._picture(record, detected))
            if regions is not None:
                regions.add(np.asarray(embeddings), records, self.detector.preprocess.geometry)
        return DetectionMeasurement(evaluator, pictures, self.loader.num_unreadable, regions)

    def _in_pixels(self, record: Record, found: HostPairs) -> HostPairs:
        """The pairs whose box is in the image, with boxes in its pixels."""
        height, width = image_ops.image_size(record.image)
        geometry = self.detector.preprocess.geometry
        boxes = ranking.pixel_boxes(found.boxes_xyxy, height, width, geometry)
        is_shown = found.scores != ranking.OUTSIDE
        return HostPairs(boxes[is_shown], found.scores[is_shown], found.query[is_shown])

    def _add(self, evaluator: CocoEvaluator, record: Record, found: HostPairs) -> None:
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
            image_ops.image_size(record.image),
            (record.boxes_xyxy[take], np.array([i for _, i in rows], int), record.is_crowd[take]),
            (
                found.boxes_xyxy,
                found.scores,
                np.array([c.id for c in categories], int)[found.query],
            ),
            true_areas=None if record.areas is None else record.areas[take],
            given_id=record.given_id,
            **federated,
        )

    def _picture(self, record: Record, found: HostPairs) -> UInt8[np.ndarray, "H W 3"]:
        from owl_det.evaluation.pictures import beside_truth

        return beside_truth(record, self.source.categories, *found)


def _is_first() -> bool:
    return jax.process_index() == 0


def _is_federated(record: Record, categories: tuple[Category, ...]) -> bool:
    """True if some categories are neither present nor known to be absent."""
    known = {name for names in record.names for name in names} | set(record.negatives)
    return bool(record.not_exhaustive) or len(known) < len(categories)
