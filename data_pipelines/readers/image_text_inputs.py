"""Image-text pairs in shards: what pseudo-annotation and contrastive pretraining take in.

    shapes_world:SPLIT:NUM[:SIZE]   images of the embedded data set with their captions
    a .tar file, or a folder of them   WebDataset (`tar_shards`)
    a .tfrecord file, or a folder of them   tf.train.Example (`tfrecord_shards`)
    a folder of images   with captions in a file, or beside each image (`folder_shards`)

Files keep their own shards; the first and the last kind are cut into contiguous shards. What cannot
be read is yielded as `Unreadable`, so that it can be counted.

Annotation reads shards front to back (`samples`). Training reads at random: `locate` goes through a
shard without its images, once, and `fetch` reads one sample from where it lies.
`image_text_reader` does that.
"""

from collections.abc import Iterator

from data_pipelines.features import Record
from data_pipelines.readers.image_text_shards import ImageTextShards, Sample, Unreadable, cut
from data_pipelines.shapes_world import SPLITS, ShapesWorld
from owl_det import files
from owl_det.errors import DataError


def open_shards(where: str, num_shards: int = 0) -> ImageTextShards:
    """Opens what `where` names (see the top of this file).

    `num_shards` > 0 cuts a folder or shapes world into so many, 0 into shards of a thousand images.
    Raises `UserError` if nothing is there, the kind is unknown, or files have shards of their own.
    """
    if where.startswith("shapes_world:"):
        return _ShapesWorldShards(where, num_shards)
    # Imported here: shapes world needs none of the readers of files.
    from data_pipelines.readers.image_text_files import open_files

    shards = open_files(files.local(where, "--input"), "--input", num_shards)
    if num_shards not in (0, len(shards)):
        raise DataError(
            f"--shards: {num_shards}, but {where} has {len(shards)} files, which are the shards; "
            "leave --shards out"
        )
    return shards


# --- shapes world --------------------------------------------------------------------------------


def shapes_world_key(index: int) -> str:
    """The key of the sample of an image of shapes world."""
    return f"{index:08d}"


def open_shapes_world(where: str) -> ShapesWorld:
    """What `shapes_world:SPLIT:NUM[:SIZE]` names. Raises `DataError` if it is not of this form."""
    kind, *parts = where.split(":")
    is_number = all(part.isdigit() and int(part) > 0 for part in parts[1:])
    is_known = kind == "shapes_world" and len(parts) in (2, 3) and parts[0] in SPLITS
    if not is_known or not is_number:
        raise DataError(
            f"{where}: expected shapes_world:SPLIT:NUM[:SIZE], such as shapes_world:train:2000, "
            f"with the splits {', '.join(SPLITS)}"
        )
    size = int(parts[2]) if len(parts) == 3 else 64
    return ShapesWorld(split=parts[0], num_images=int(parts[1]), image_size=size)


class _ShapesWorldShards:
    def __init__(self, where: str, num_shards: int):
        self._world = open_shapes_world(where)
        self._starts = cut(len(self._world), num_shards)
        self.name, self.version = where, f"{self._world.version}-{where}-{len(self)}"

    def __len__(self) -> int:
        return len(self._starts) - 1

    def samples(self, shard: int) -> Iterator[Sample | Unreadable]:
        for index in range(self._starts[shard], self._starts[shard + 1]):
            record: Record = self._world[index]
            yield Sample(key=shapes_world_key(index), image=record.image, texts=record.captions)
