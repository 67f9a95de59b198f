"""Named regions of images: the ground truth for dense features (boxes, thing and stuff masks)."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

from data_pipelines import image_ops
from data_pipelines.features import Category, Names, Record
from data_pipelines.image_ops import Geometry
from data_pipelines.label_counts import LabelCounts
from data_pipelines.source import Source


@dataclass(frozen=True, kw_only=True)
class NamedRegions:
    """The regions of one image; each has one name and, where there are masks, at least a pixel."""

    size: tuple[int, int]  # height, width of the raw image
    boxes_xyxy: Float32[np.ndarray, "r 4"]  # its pixels
    names: Names
    is_thing: Bool[np.ndarray, " r"]  # False = stuff: no countable objects
    segments: Int32[np.ndarray, "h w"] | None  # region of each pixel, -1 = none; None = only boxes
    present: Names  # every name in the image, also of what is no region (crowds, specks)


class RegionSource(Source, Protocol):
    """A source that also knows regions. Its categories belong to the group "thing" or "stuff"."""

    def regions(self, index: int) -> NamedRegions:
        """Of the record at `index`. Raises `DataError` where its masks are malformed."""
        ...


class BoxRegions:
    """The boxes of any source as regions, all of them things, without masks.

    Crowds and instances of several names are left out. Implements `RegionSource`.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.name, self.version = source.name, source.version
        self.categories: tuple[Category, ...] = source.categories
        self.counts: LabelCounts | None = getattr(source, "counts", None)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        return self.source[index]

    def regions(self, index: int) -> NamedRegions:
        record = self.source[index]
        rows = [
            i for i, names in enumerate(record.names) if len(names) == 1 and not record.is_crowd[i]
        ]
        every = (name for names in (*record.names, record.not_exhaustive) for name in names)
        return NamedRegions(
            size=image_ops.image_size(record.image),
            boxes_xyxy=record.boxes_xyxy[rows],
            names=tuple(record.names[i][0] for i in rows),
            is_thing=np.ones(len(rows), bool),
            segments=None,
            present=tuple(dict.fromkeys(every)),
        )


def region_tokens(
    segments: Int32[np.ndarray, "h w"], num_regions: int, side: int, geometry: Geometry
) -> Bool[np.ndarray, "r n"]:
    """Which tokens of the square's grid, `side` x `side`, belong to each region.

    A token does if the region's mask, interpolated linearly at the token's centre, is above 0:
    if one of the pixels around that centre is the region's. So neighbours share tokens along their
    border. A region that holds no centre gets the token that most of its pixels lie in.
    """
    height, width = segments.shape
    across, down = image_ops.extent(height, width, geometry)
    is_inside = np.zeros((num_regions + 1, side, side), bool)  # the last: pixels of no region
    for y in _pixels_around(height, down, side):
        for x in _pixels_around(width, across, side):
            found = segments[y[:, None], x[None]]
            rows, columns = np.indices(found.shape)
            is_inside[found, rows, columns] = True
    is_inside = is_inside[:-1].reshape(num_regions, side * side)
    for region in np.flatnonzero(~is_inside.any(axis=1)):
        y, x = np.nonzero(segments == region)
        rows, columns = ((place + 0.5) * side / size for place, size in ((y, down), (x, across)))
        tokens = rows.astype(int) * side + columns.astype(int)
        is_inside[region, np.bincount(tokens).argmax()] = True
    return is_inside


def _pixels_around(
    size: int, extent: int, side: int
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """The pixels below and above the centre of each token that lies in the image, on one axis."""
    centre = (np.arange(side) + 0.5) * extent / side
    place = centre[centre < size] - 0.5
    low, high = (np.clip(f(place), 0, size - 1).astype(int) for f in (np.floor, np.ceil))
    return low, high
