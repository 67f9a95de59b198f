"""Runs a detector over a source and measures it; training and `owl-det evaluate` share it."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from data_pipelines import image_ops, prompts, tokenizer, transforms
from data_pipelines.features import Category, Example, Record
from data_pipelines.image_ops import UnreadableImage
from data_pipelines.source import Source
from owl_det import inference, sharding, viz
from owl_det.config import EvaluationConfig
from owl_det.errors import DataError
from owl_det.evaluation.coco import CocoEvaluator, Metrics
from owl_det.modeling.detector import Detector
from owl_det.types import Params

PICTURE_SCORE = 0.2  # detections below are not drawn


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


class Evaluate:
    """Evaluates one source, with as many parameters as there are.

    All categories are asked together, in every prompt of `eval_prompts` (probabilities are
    averaged); each image keeps its `top_k` best query-box pairs. `settings.batch_size` must be
    positive; it is rounded up to a multiple of the mesh's data shards.
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
        functions: inference.Functions | None = None,
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
        shards = sharding.num_data_shards(mesh)
        self.batch_size = -(-settings.batch_size // shards) * shards
        whole = sharding.replicated(mesh)
        run = functions or inference.Functions(
            partial(inference.encode_queries, detector), partial(inference.embed_tokens, detector)
        )
        detect = partial(inference.detect, run, top_k=settings.top_k, dtype=detector.dtype)
        self._encode = jax.jit(run.encode_queries, out_shardings=whole)
        self._detect = jax.jit(detect, out_shardings=whole)

    def __call__(self, params: Params) -> Evaluation:
        """Detects in every readable image. Only process 0 collects results.

        Raises `DataError` if more than 1 % of the images cannot be read.
        """
        queries = self._encode(params, self.tokens)
        is_query = np.ones(self.tokens.shape[1], bool)
        evaluator = CocoEvaluator(self.source.categories, self.settings.protocol)
        pictures: list[np.ndarray] = []
        num_images = min(len(self.source), self.settings.max_images or len(self.source))
        unreadable = 0
        progress = tqdm(
            total=num_images,
            desc=f"evaluate {self.name}",
            unit="image",
            mininterval=1.0,
            leave=False,
            disable=not _is_first(),
        )
        for indices, images, examples in self._batches(num_images):
            found = jax.tree.map(np.asarray, self._detect(params, images, queries, is_query))
            readable = multihost_utils.process_allgather(
                np.array([example is not None for example in examples]), tiled=True
            )
            for i, index in enumerate(indices):
                if not readable[i]:
                    unreadable += 1
                elif _is_first():
                    picture = self._add(evaluator, index, Found(*(np.asarray(x[i]) for x in found)))
                    if len(pictures) < self.settings.num_pictures:
                        pictures.append(picture())
            progress.update(len(indices))
        progress.close()
        if unreadable > max(1, 0.01 * num_images):
            raise DataError(
                f"{self.source.name}: {unreadable} of {num_images} images cannot be read, more "
                "than 1 %; mend or remove those that the log names"
            )
        return Evaluation(evaluator, pictures, unreadable)

    def _batches(self, num_images: int) -> Iterator[tuple[range, Any, list[Example | None]]]:
        """(global indices, global image array, this process's examples) of each batch."""
        count, number = jax.process_count(), jax.process_index()
        local = self.batch_size // count
        placement = sharding.batch_sharding(self.mesh)
        side = self.detector.config.image_size
        # Decoding and resizing release the interpreter lock.
        with ThreadPoolExecutor() as pool:
            for start in range(0, num_images, self.batch_size):
                indices = range(start, min(start + self.batch_size, num_images))
                mine = range(start + number * local, start + (number + 1) * local)
                examples: list[Example | None] = [None] * local
                wanted = [i for i in mine if i < num_images]
                examples[: len(wanted)] = pool.map(self._example, wanted)
                pixels = np.zeros((local, side, side, 3), np.uint8)
                for row, example in enumerate(examples):
                    if example is not None:
                        pixels[row] = example.image
                images = jax.make_array_from_process_local_data(placement, pixels)
                yield indices, images, examples

    def _example(self, index: int) -> Example | None:
        try:
            return transforms.eval_example(
                self.source[index],
                image_size=self.detector.config.image_size,
                preprocess=self.detector.preprocess,
            )
        except UnreadableImage as error:
            logging.warning("Skipped image %d of %s: %s", index, self.source.name, error)
            return None

    def _add(self, evaluator: CocoEvaluator, index: int, found: Found) -> Callable[[], np.ndarray]:
        """Adds one image; returns a function that draws it."""
        record = self.source[index]
        height, width = image_ops.image_size(record.image)
        geometry = self.detector.preprocess.geometry
        boxes = inference.pixel_boxes(found.boxes_xyxy, height, width, geometry)
        categories = self.source.categories
        ids = {category.name: category.id for category in categories}
        rows = [(row, ids[name]) for row, names in enumerate(record.names) for name in names]
        take = np.array([row for row, _ in rows], int)
        federated: dict[str, Any] = {}
        if _is_federated(record, categories):
            federated = {
                "negatives": [ids[name] for name in record.negatives],
                "not_exhaustive": [ids[name] for name in record.not_exhaustive],
            }
        evaluator.add(
            record.image_id,
            (height, width),
            (record.boxes_xyxy[take], np.array([i for _, i in rows], int), record.is_crowd[take]),
            (boxes, found.scores, np.array([c.id for c in categories], int)[found.query]),
            true_areas=None if record.areas is None else record.areas[take],
            **federated,
        )
        return lambda: _draw(record, categories, boxes, found)


def summary(
    measure: Evaluate, result: Evaluation, metrics: Metrics, step: int, seconds: float
) -> dict[str, Any]:
    """What is written of one evaluation; metrics are in [0, 1], with 6 digits."""
    return {
        "step": step,
        **{key: round(value, 6) for key, value in metrics.scalars().items()},
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


def _draw(
    record: Record, categories: tuple[Category, ...], boxes: np.ndarray, found: Found
) -> np.ndarray:
    image = np.asarray(image_ops.decode_image(record.image))
    keep = found.scores >= PICTURE_SCORE
    labels = [categories[i].name for i in found.query[keep]]
    predicted = viz.draw_detections(image, boxes[keep], labels, found.scores[keep])
    truth = viz.draw_detections(
        image, record.boxes_xyxy, [names[0] for names in record.names], None
    )
    return viz.side_by_side(predicted, truth)
