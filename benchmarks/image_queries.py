"""Measures one-shot detection on shapes world: each name is asked by one image instead of a text.

    python -m benchmarks.image_queries --checkpoint WORKDIR

The query of a name is the first object of that name in test scenes beyond the evaluated ones, the
whole scene with the object's box. The same test images are searched with texts and with images,
and the AP50 of each group of names is printed as JSON. `--shots` N averages N images a name.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import command
from data_pipelines.features import Record
from data_pipelines.shapes_names import object_names
from data_pipelines.shapes_world import ShapesWorld
from owl_det.errors import DataError
from owl_det.evaluation.coco import CocoEvaluator
from owl_det.evaluation.metrics import Metrics
from owl_det.inference.embeddings import ImageEmbeddings, QueryEmbeddings
from owl_det.inference.predictor import Predictor

MAX_SCENES = 100_000  # looked through for query objects
TOP_K = 300


def query_objects(
    first: int, image_size: int, shots: int
) -> tuple[list[np.ndarray], list[tuple[float, float, float, float]], list[str]]:
    """Images, boxes and names: the first `shots` objects of every name from scene `first` on.

    Raises `DataError` if a name does not occur so often.
    """
    world = ShapesWorld(split="test", image_size=image_size, num_images=first + MAX_SCENES)
    found: dict[int, list[Any]] = {index: [] for index in range(len(object_names()))}
    for number in range(first, len(world)):
        scene = world.scene(number)
        for item in scene.objects:
            if len(found[item.category]) < shots:
                found[item.category].append((scene.image, item.box))
        if all(len(objects) == shots for objects in found.values()):
            break
    else:
        raise DataError(f"--shots: no {shots} objects of every name in {MAX_SCENES} scenes")
    names = [object_names()[category].name for category in found for _ in range(shots)]
    pairs = [pair for objects in found.values() for pair in objects]
    return [image for image, _ in pairs], [box for _, box in pairs], names


def evaluate(
    predictor: Predictor,
    world: ShapesWorld,
    images: ImageEmbeddings,
    queries: QueryEmbeddings,
) -> Metrics:
    """COCO metrics of the queries, whose names are those of the categories."""
    evaluator = CocoEvaluator(world.categories)
    ids = {category.name: category.id for category in world.categories}
    query_ids = np.array([ids[name] for name in queries.names])
    results = predictor.search(images, queries, threshold=0.0, top_k=TOP_K)
    for index, found in enumerate(results):
        record = world[index]
        evaluator.add(
            record.image_id,
            (world.image_size, world.image_size),
            (record.boxes_xyxy, _category_ids(record, ids), record.is_crowd),
            (found.boxes, found.scores, query_ids[found.labels]),
        )
    return evaluator.compute()


def _category_ids(record: Record, ids: dict[str, int]) -> np.ndarray:
    return np.array([ids[name] for (name,) in record.names], int)


def run(checkpoint: str, num_images: int, shots: int) -> dict[str, Any]:
    """AP50 of texts and of images, by group, and their ratios."""
    if num_images < 1 or shots < 1:
        raise DataError("--num_images and --shots: must be positive")
    predictor = Predictor.load(checkpoint)
    side = predictor.model.config.image_size
    world = ShapesWorld(split="test", image_size=side, num_images=num_images)
    pixels = [np.asarray(world[index].image) for index in range(num_images)]
    images = predictor.embed_images(pixels, batch_size=32)
    texts = predictor.encode_queries([category.name for category in world.categories])
    query_images, boxes, names = query_objects(num_images, side, shots)
    shown = predictor.encode_image_queries(query_images, boxes, names, batch_size=32)
    by_text = _groups(evaluate(predictor, world, images, texts))
    by_image = _groups(evaluate(predictor, world, images, shown))
    return {
        "checkpoint": predictor.checkpoint,
        "step": predictor.model.step,
        "num_images": num_images,
        "names": len(texts),
        "images_per_name": shots,
        "AP50_text": by_text,
        "AP50_image": by_image,
        "ratio": {name: round(by_image[name] / max(by_text[name], 1e-9), 4) for name in by_text},
    }


def _groups(metrics: Metrics) -> dict[str, float]:
    groups = {name: group.AP50 for name, group in metrics.groups.items()}
    return {name: round(value, 4) for name, value in {"all": metrics.AP50, **groups}.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the measurements. Returns 2, with one line on stderr, for arguments of no use."""
    parser = command.parser(__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="workdir or checkpoint")
    parser.add_argument("--num_images", type=int, default=1024, help="test images")
    parser.add_argument("--shots", type=int, default=1, help="query images of each name")
    command.add_out(parser)
    arguments = parser.parse_args(argv)
    return command.report(
        "image_queries",
        lambda: run(arguments.checkpoint, arguments.num_images, arguments.shots),
        arguments.out,
    )


if __name__ == "__main__":
    sys.exit(main())
