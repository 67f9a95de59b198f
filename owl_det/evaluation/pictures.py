"""Pictures of an evaluation: detections beside the truth, precision and recall, confusions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

from data_pipelines import image_ops
from data_pipelines.features import Category, Record
from owl_det.evaluation.coco import CocoEvaluator
from owl_det.evaluation.confusion import confusion_matrix
from owl_det.evaluation.metrics import Metrics
from owl_det.viz.detections import MAX_BOXES, choose, draw_detections
from owl_det.viz.pictures import PAIR_SIDE, pair, picture_grid, save_png

SCORE = 0.2  # detections below are not drawn
CONFUSION_SCORE, CONFUSION_IOU = 0.3, 0.5  # what counts as a detection, and as found


def beside_truth(
    record: Record,
    categories: Sequence[Category],
    boxes_xyxy: Float[np.ndarray, "n 4"],
    scores: Float[np.ndarray, " n"],
    classes: Int[np.ndarray, " n"],
) -> UInt8[np.ndarray, "H W 3"]:
    """The best detections (pixels of the image, positions of categories) beside the true boxes."""
    image = np.asarray(image_ops.decode_image(record.image))
    is_good = scores >= SCORE
    boxes, scores, classes = boxes_xyxy[is_good], scores[is_good], classes[is_good]
    kept = choose(boxes, scores)
    predicted = draw_detections(
        image,
        boxes[kept],
        [categories[i].name for i in classes[kept]],
        scores[kept],
        classes=[int(i) for i in classes[kept]],
        side=PAIR_SIDE,
    )
    caption = f"prediction, scores from {SCORE:g}"
    if len(kept) < len(boxes):
        caption += f": {len(kept)} of {len(boxes)}"
    truth, all_or_some = _truth(image, record, categories)
    name = Path(record.source).name or f"image {record.image_id}"
    return pair(predicted, truth, title=name, captions=(caption, f"ground truth{all_or_some}"))


def _truth(
    image: UInt8[np.ndarray, "h w 3"], record: Record, categories: Sequence[Category]
) -> tuple[UInt8[np.ndarray, "H W 3"], str]:
    boxes = record.boxes_xyxy
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    largest = np.sort(np.argsort(-areas, kind="stable")[:MAX_BOXES])
    index = {category.name: i for i, category in enumerate(categories)}
    names = [record.names[i][0] for i in largest]
    picture = draw_detections(
        image, boxes[largest], names, classes=[index[name] for name in names], side=PAIR_SIDE
    )
    return picture, "" if len(largest) == len(
        boxes
    ) else f": {len(largest)} largest of {len(boxes)}"


def sheet(pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> UInt8[np.ndarray, "H W 3"]:
    """Pairs of `beside_truth`, two a row."""
    return picture_grid(pictures, columns=2)


def write(
    folder: Path,
    name: str,
    pairs: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    evaluator: CocoEvaluator,
    metrics: Metrics,
) -> None:
    """Writes `<name>.png`, the sheet of these pairs, and what `write_plots` does."""
    name = name.replace("/", "_")  # of data sets in folders of folders
    if pairs:
        save_png(folder / f"{name}.png", sheet(pairs))
    write_plots(folder, name, evaluator, metrics)


def write_plots(folder: Path, name: str, evaluator: CocoEvaluator, metrics: Metrics) -> None:
    """Writes `precision_recall_<name>.png` and `confusion_matrix_<name>.png`."""
    from owl_det.viz import plots

    plots.plot_precision_recall(
        folder / f"precision_recall_{name}.png",
        metrics.recall,
        [
            plots.PrecisionCurve(group, values.AP50, values.precision)
            for group, values in metrics.groups.items()
        ],
        plots.PrecisionCurve("all", metrics.AP50, metrics.precision),
        f"{metrics.num_images:,} images, {metrics.num_instances:,} instances",
    )
    plots.plot_confusion_matrix(
        folder / f"confusion_matrix_{name}.png",
        confusion_matrix(evaluator, CONFUSION_IOU, CONFUSION_SCORE),
        [category.name for category in evaluator.categories],
        score=CONFUSION_SCORE,
        iou=CONFUSION_IOU,
    )
