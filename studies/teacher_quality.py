"""What a teacher's image vectors know: crops of true boxes, and scenes by how much is in them.

    python -m studies.teacher_quality --checkpoint=TOWERS --out=FILE.json

On scenes of shapes world with stuff, or of its detection test split (`--split=test`). Crops are cut
and embedded as in distillation, at the teacher's own input size; `boxes_top1` is the share of
things whose name is the nearest of all, averaged over names. RC@k, of scenes with stuff, is
GridCLIP's category recall (arXiv 2303.09252, section 4.4): the share of a scene's names among the k
nearest to its embedding, averaged over scenes.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, UInt8

from data_pipelines import image_ops, tokenizer
from data_pipelines.panoptic_world import PanopticWorld
from data_pipelines.shapes_names import object_names
from data_pipelines.shapes_world import MAX_OBJECTS, ShapesWorld
from owl_det.checkpoints.load import load_model
from owl_det.distillation.teacher import Teacher
from owl_det.errors import UserError
from owl_det.evaluation.region_evaluation import CategoryRecall
from owl_det.evaluation.regions import NameAccuracy

BATCH = 64
PANOPTIC = "panoptic_test"
IMAGE_SIZE = 64  # of the scenes, pixels
BUCKETS = ((1, 4), (5, 6), (7, 99))  # numbers of names in a scene, both ends within
COMPARED_RANK = 10


class Scene(NamedTuple):
    image: UInt8[np.ndarray, "h w 3"]
    boxes_xyxy: Float32[np.ndarray, "m 4"]  # of the things, pixels
    names: list[str]  # of the things
    present: Sequence[str]  # all names, grounds too


def measure(path: str, num_images: int, split: str = PANOPTIC) -> dict[str, Any]:
    """All metrics of the teacher at `path`, in [0, 1].

    `boxes_top1`, `boxes_top5`, and the same by group of names; of scenes with stuff also
    `recall_at_<k>`; `recall` holds RC@k by number of names; and `recall_fall` is RC@10 of the
    scenes with fewest names less that of those with most.
    """
    loaded = load_model(path)
    teacher = Teacher(loaded)
    world = PanopticWorld if split == PANOPTIC else ShapesWorld
    source = world(split=split, image_size=IMAGE_SIZE, num_images=num_images)
    words = tokenizer.build(loaded.config.text, loaded.tokenizer)
    names = [category.name for category in source.categories]
    texts = np.asarray(teacher.embed_texts(loaded.params, jnp.asarray(words.encode_all(names))))
    accuracy = NameAccuracy(source.categories, texts[None], "boxes")
    recall = {bucket: CategoryRecall(texts, names) for bucket in (*BUCKETS, None)}
    embed = jax.jit(teacher.embed_boxes)
    for start in range(0, num_images, BATCH):
        scenes = [_scene(source, i) for i in range(start, min(start + BATCH, num_images))]
        images = np.stack([scene.image for scene in scenes])
        vectors = np.asarray(embed(loaded.params, images, _boxes(scenes)))
        for scene, (whole, *things) in zip(scenes, vectors, strict=True):
            accuracy.add_named(np.stack(things)[: len(scene.names)], scene.names)
            recall[None].add(whole, scene.present)
            recall[_bucket(len(scene.present))].add(whole, scene.present)
    boxes = {k: v for k, v in accuracy.scalars().items() if not k.endswith("_thing")}
    if split != PANOPTIC:
        return {**boxes, "num_images": num_images}
    if not all(recall[bucket].scalars() for bucket in BUCKETS):
        raise UserError(f"--num_images: {num_images} are too few for scenes of every kind")
    by_bucket = {bucket: recall[bucket].scalars() for bucket in BUCKETS}
    key = f"recall_at_{COMPARED_RANK}"
    return {
        **boxes,
        **recall[None].scalars(),
        "recall": {
            f"{low} names or more" if high == BUCKETS[-1][1] else f"{low} to {high} names": {
                k.removeprefix("recall_at_"): v for k, v in by_bucket[low, high].items()
            }
            for low, high in BUCKETS
        },
        "recall_fall": by_bucket[BUCKETS[0]][key] - by_bucket[BUCKETS[-1]][key],
        "num_images": num_images,
    }


def _scene(source: PanopticWorld | ShapesWorld, index: int) -> Scene:
    if isinstance(source, PanopticWorld):
        found, image = source.regions(index), source.scene(index).image
        names = [found.names[i] for i in np.flatnonzero(found.is_thing)]
        return Scene(image, found.boxes_xyxy[found.is_thing], names, found.present)
    drawn, known = source.scene(index), object_names()
    names = [known[item.category].name for item in drawn.objects]
    boxes = np.array([item.box for item in drawn.objects], np.float32).reshape(-1, 4)
    return Scene(drawn.image, boxes, names, sorted(set(names)))


def _boxes(scenes: Sequence[Scene]) -> np.ndarray:
    """The whole image, then its things, relative to the image; rows beyond are the whole again."""
    boxes = np.tile(np.array([0.5, 0.5, 1, 1], np.float32), (len(scenes), 1 + MAX_OBJECTS, 1))
    for row, scene in enumerate(scenes):
        height, width = scene.image.shape[:2]
        things = image_ops.boxes_to_padded(scene.boxes_xyxy, height, width, "pad")
        boxes[row, 1 : 1 + len(things)] = things
    return boxes


def _bucket(num_names: int) -> tuple[int, int]:
    return next((low, high) for low, high in BUCKETS if low <= num_names <= high)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m studies.teacher_quality", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="towers or a ResNet")
    parser.add_argument("--num_images", type=int, default=512)
    parser.add_argument("--split", choices=(PANOPTIC, "test"), default=PANOPTIC)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    arguments = parser.parse_args(argv)
    try:
        content = measure(arguments.checkpoint, arguments.num_images, arguments.split)
    except UserError as error:
        print(f"studies.teacher_quality: {error}", file=sys.stderr)
        return 2
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
