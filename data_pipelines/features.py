"""Records and examples: what flows through the input pipeline on its way to a batch.

A reader yields `Record`s (one raw image with its labels, pixels still encoded); transforms turn
them into `Example`s (pixels at their place in the padded square); `batching` packs examples into
the arrays that `owl_det.types.Batch` documents. Names are text all the way to the batch: data sets
with different vocabularies mix without a table of ids.
"""

import dataclasses
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

Names = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Category:
    """A name that a data set evaluates, with the groups it is reported under."""

    id: int  # of 32 bits; as in the data set's own files (COCO ids have gaps)
    name: str
    groups: tuple[str, ...] = ()  # for instance ("novel", "novel_word"), ("rare",)
    frequency: float = 1.0  # relative; pseudo-negatives are drawn in proportion
    # In those files, where it cannot be `id`. Hashes of data sets are made of the other fields.
    given_id: int | float | str | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One raw image and its labels. Boxes are clipped to the image and not degenerate."""

    image: bytes | UInt8[np.ndarray, "h w 3"]  # an encoded file, or pixels
    image_id: int  # of 31 bits
    boxes_xyxy: Float32[np.ndarray, "m 4"]  # pixels of the raw image
    names: tuple[Names, ...]  # m entries; an instance may have several names
    is_crowd: Bool[np.ndarray, " m"]
    scores: Float32[np.ndarray, " m"]  # 1 for human boxes
    negatives: Names = ()  # names known to be absent, or annotated exhaustively
    not_exhaustive: Names = ()  # present, but not every instance is annotated
    captions: tuple[str, ...] = ()
    areas: Float32[np.ndarray, " m"] | None = None  # of the masks, pixels; None = of the boxes
    source: str = ""  # file, for error messages
    # In the data set's own files, where it is not `image_id`.
    given_id: int | float | str | None = None

    def lowered(self) -> "Record":
        """The same with names in lower case, each once: as the text tower sees them."""

        def lower(names: Names) -> Names:
            return tuple(dict.fromkeys(name.lower() for name in names))

        return dataclasses.replace(
            self,
            names=tuple(lower(names) for names in self.names),
            negatives=lower(self.negatives),
            not_exhaustive=lower(self.not_exhaustive),
        )


@dataclass(frozen=True, kw_only=True)
class Example:
    """One network input (a single image or a mosaic), before queries become tokens."""

    image: UInt8[np.ndarray, "H W 3"]
    image_id: int
    original_size: tuple[int, int]  # height, width; of a mosaic: its own side, twice
    boxes_cxcywh: Float32[np.ndarray, "m 4"]  # relative to the padded square
    names: tuple[Names, ...]
    is_crowd: Bool[np.ndarray, " m"]
    scores: Float32[np.ndarray, " m"]
    negatives: Names
    excluded: Names  # in the picture but not (or not all) boxed: never asked as a negative
    tile_boxes_cxcywh: Float32[np.ndarray, "t 4"]
    tile_of_instance: Int32[np.ndarray, " m"]
    tile_image_id: Int32[np.ndarray, " t"]
    tile_captions: tuple[tuple[str, ...], ...] = ()  # of each tile; empty = of none
    counts: dict[str, int] = field(default_factory=dict)  # of what was skipped or left out
