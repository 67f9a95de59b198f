"""Counts the labels of a source while its images become known."""

from collections import Counter
from collections.abc import Mapping, Sequence

from data_pipelines.label_counts import LabelCounts
from data_pipelines.readers.labelled_image import LabelledImage, Proper


class Tally:
    """Counts of labels, image by image; what was counted can be taken back."""

    def __init__(self, names: Sequence[str], dropped: Mapping[str, int], odd: Mapping[str, int]):
        """`dropped` and `odd` are of the images to come, by reason."""
        self.dropped, self.odd = Counter(dropped), Counter(odd)
        self._names = names
        self._boxes: Counter[str] = Counter()
        self._num_images = self._num_empty = self._num_crowd = self._num_negatives = 0
        self._is_federated = False

    def add(self, image: LabelledImage, sign: int = 1) -> None:
        crowd = image.is_crowd.tolist()
        usable = [name for name, is_crowd in zip(image.names, crowd, strict=True) if not is_crowd]
        for name in usable:
            self._boxes[name] += sign
        self._num_images += sign
        self._num_empty += sign * (not usable)
        self._num_crowd += sign * (len(image.names) - len(usable))
        self._is_federated |= image.negatives is not None
        if image.negatives is not None:
            self._num_negatives += sign * len(image.negatives)
        else:
            present = {*image.names, *image.not_exhaustive}
            self._num_negatives += sign * (len(self._names) - len(present))

    def replace(self, old: tuple[LabelledImage, Proper], new: tuple[LabelledImage, Proper]) -> None:
        """Counts an image that was counted as `old` as `new`."""
        for (image, proper), sign in ((old, -1), (new, 1)):
            self.add(image, sign)
            for reason, count in proper.dropped.items():
                self.dropped[reason] += sign * count
            for what, count in proper.odd.items():
                self.odd[what] += sign * count

    def counts(self) -> LabelCounts:
        return LabelCounts(
            num_images=self._num_images,
            num_empty=self._num_empty,
            boxes={name: self._boxes[name] for name in self._names},
            num_crowd=self._num_crowd,
            dropped={reason: count for reason, count in self.dropped.items() if count > 0},
            num_negatives=self._num_negatives,
            is_federated=self._is_federated,
        )
