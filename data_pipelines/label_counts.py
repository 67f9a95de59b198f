"""How many boxes a source holds, by name, and how many of those in its files are not used."""

from collections.abc import Mapping
from dataclasses import dataclass, field

_SHOWN = 5  # classes with the most boxes, and as many with the fewest
_SHOWN_ABSENT = 10  # classes without a box


@dataclass(frozen=True, kw_only=True)
class LabelCounts:
    """Counts over all images of a source."""

    num_images: int
    num_empty: int  # images without a usable box
    boxes: Mapping[str, int]  # usable ones by name; a category without a box counts 0
    num_crowd: int = 0  # regions of many objects: they only say what not to judge
    dropped: Mapping[str, int] = field(default_factory=dict)  # reason → boxes
    num_negatives: int = 0  # pairs of an image and a name that is known to be absent from it
    is_federated: bool = False  # each image says which names are absent

    @property
    def num_boxes(self) -> int:
        """Usable ones: neither crowds nor dropped."""
        return sum(self.boxes.values())

    @property
    def num_dropped(self) -> int:
        return sum(self.dropped.values())

    @property
    def num_read(self) -> int:
        """All boxes that the files hold."""
        return self.num_boxes + self.num_crowd + self.num_dropped

    def lines(self, name: str) -> list[str]:
        """What the log says of the source called `name`, a line each."""
        used = {key: count for key, count in self.boxes.items() if count}
        lines = [
            f"{name}: {self.num_images} images ({self.num_empty} without a usable box), "
            f"{self.num_boxes} boxes of {len(used)} names"
            + (f", {self.num_crowd} crowd regions" if self.num_crowd else "")
        ]
        # Equal counts keep the order of the categories.
        ranked = sorted(used.items(), key=lambda item: -item[1])
        most, fewest = ranked[:_SHOWN], ranked[_SHOWN:][-_SHOWN:]
        if most:
            lines.append(f"{name}: most boxes: {_listed(most)}")
        if fewest:
            lines.append(f"{name}: fewest boxes: {_listed(fewest)}")
        absent = [key for key, count in self.boxes.items() if not count]
        if absent:
            more = ", …" if len(absent) > _SHOWN_ABSENT else ""
            shown = ", ".join(absent[:_SHOWN_ABSENT])
            lines.append(
                f"{name}: {len(absent)} of {len(self.boxes)} names have no box: {shown}{more}"
            )
        if self.num_dropped:
            lines.append(f"{name}: {dropped_text(self.dropped, self.num_read)}")
        kind = "each image names its own" if self.is_federated else "every name without a box"
        lines.append(f"{name}: {self.num_negatives} negatives of images ({kind})")
        return lines


def dropped_text(dropped: Mapping[str, int], num_read: int) -> str:
    """`3 of 42 boxes dropped: 2 without area, 1 not finite`."""
    reasons = sorted(dropped.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons if count)
    return f"{sum(dropped.values())} of {num_read} boxes dropped: {listed}"


def _listed(counts: list[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts)
