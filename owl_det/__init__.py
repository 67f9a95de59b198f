"""owl_det: open-vocabulary object detection, trained and run in JAX.

`from owl_det import Predictor` is the inference entry point; it is imported on first use, so that
`import owl_det` costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from owl_det.inference.predictor import Detections, Predictor

__version__ = "0.1.0"
__all__ = ["Detections", "Predictor", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("Predictor", "Detections"):
        from owl_det.inference import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module 'owl_det' has no attribute {name!r}")
