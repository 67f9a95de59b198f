"""Ground truth and detections of images, kept as rows in files and read image by image."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, Shaped

from owl_det.evaluation.rows import RowFile

TRUE_ROW = np.dtype(
    [
        ("image_id", "i8"),
        ("category", "i4"),
        ("box_xyxy", "f4", 4),
        ("area", "f4"),
        ("is_crowd", "?"),
    ]
)
FOUND_ROW = np.dtype(
    [
        ("image_id", "i8"),
        ("category", "i4"),
        ("box_xyxy", "f4", 4),
        ("score", "f4"),
        ("is_evaluated", "?"),
        ("is_exempt", "?"),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageResult:
    """What the evaluator keeps of one image."""

    image_id: int
    size: tuple[int, int]  # height, width
    true_boxes_xyxy: Float32[np.ndarray, "m 4"]
    true_categories: Int32[np.ndarray, " m"]
    true_areas: Float32[np.ndarray, " m"]  # pixels
    is_crowd: Bool[np.ndarray, " m"]
    boxes_xyxy: Float32[np.ndarray, "p 4"]
    scores: Float32[np.ndarray, " p"]
    categories: Int32[np.ndarray, " p"]
    is_evaluated: Bool[np.ndarray, " p"]  # False: nobody knows whether the category is present
    is_exempt: Bool[np.ndarray, " p"]  # no false positive: not every instance is annotated


class ImageResults(Sequence[ImageResult]):
    """The images that were added, in order; each is read from its rows when asked for."""

    def __init__(self) -> None:
        self.true, self.found = RowFile(TRUE_ROW), RowFile(FOUND_ROW)
        self._ids, self._heights, self._widths = array("q"), array("q"), array("q")
        self._true_ends, self._found_ends = array("q", [0]), array("q", [0])

    def append(
        self,
        image_id: int,
        size: tuple[int, int],
        true: Shaped[np.ndarray, " m"],
        found: Shaped[np.ndarray, " p"],
    ) -> None:
        self.true.append(true)
        self.found.append(found)
        self._ids.append(image_id)
        self._heights.append(size[0])
        self._widths.append(size[1])
        self._true_ends.append(len(self.true))
        self._found_ends.append(len(self.found))

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> ImageResult: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageResult]: ...
    def __getitem__(self, index: int | slice) -> ImageResult | list[ImageResult]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        true = self.true.read(self._true_ends[i], self._true_ends[i + 1])
        found = self.found.read(self._found_ends[i], self._found_ends[i + 1])
        return ImageResult(
            image_id=self._ids[i],
            size=(self._heights[i], self._widths[i]),
            true_boxes_xyxy=true["box_xyxy"],
            true_categories=true["category"],
            true_areas=true["area"],
            is_crowd=true["is_crowd"],
            boxes_xyxy=found["box_xyxy"],
            scores=found["score"],
            categories=found["category"],
            is_evaluated=found["is_evaluated"],
            is_exempt=found["is_exempt"],
        )


def xyxy_to_xywh(boxes_xyxy: Float[np.ndarray, "x 4"]) -> Float[np.ndarray, "x 4"]:
    """Left, top, width, height in 64 bits, as COCO's files and tools have boxes."""
    boxes = boxes_xyxy.astype(np.float64)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
