"""What an evaluator is: one evaluation set, measured with as many parameters as there are."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from data_pipelines.source import Source
from owl_det.evaluation.loader import Loader
from owl_det.types import Params


class Measurement(Protocol):
    """What one pass over an evaluation set measured; complete on process 0 alone."""

    @property
    def num_unreadable(self) -> int:
        """Images that could not be read."""
        ...

    def scalars(self) -> dict[str, float]:
        """All metrics, in [0, 1], and counts."""
        ...

    def headline(self) -> str:
        """The metrics that matter most, for one line of a log."""
        ...

    def write(
        self, workdir: Path, name: str, step: int, *, with_plots: bool
    ) -> UInt8[np.ndarray, "H W 3"] | None:
        """Writes results and pictures of the set `name`; returns a picture to log, if any."""
        ...


class Evaluator(Protocol):
    """Measures parameters on one evaluation set."""

    name: str  # of the set
    source: Source
    loader: Loader

    def __call__(self, params: Params) -> Measurement:
        """Measures all readable images.

        Raises `DataError` if more than 1 % of the images cannot be read.
        """
        ...


def summary(
    evaluator: Evaluator, measurement: Measurement, step: int, seconds: float
) -> dict[str, Any]:
    """What is written of one evaluation; metrics are in [0, 1], with 6 digits."""
    return {
        "step": step,
        **{key: round(value, 6) for key, value in measurement.scalars().items()},
        "unreadable_images": measurement.num_unreadable,
        "dataset": evaluator.source.version,
        "seconds": round(seconds, 1),
    }
