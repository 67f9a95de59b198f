"""Embeddings that outlive the call that made them: of queries, and of images for later search."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32

from owl_det.errors import DataError
from owl_det.types import TokenEmbeddings


@dataclass(frozen=True, kw_only=True)
class QueryEmbeddings:
    """Queries as a model sees them; they go where texts go.

    `embeddings` hold each query in each of its t prompts, whose probabilities are averaged.
    """

    embeddings: Float32[np.ndarray, "t q e"]
    names: tuple[str, ...]
    checkpoint: str  # `identity.model_hash` of the model that made them

    def __len__(self) -> int:
        return len(self.names)

    def __add__(self, other: "QueryEmbeddings") -> "QueryEmbeddings":
        """These queries, then those of `other`: texts and images may be asked together.

        A single prompt stands beside several as their repetition, which leaves its scores as they
        are. Raises `DataError` if the checkpoints or the numbers of (several) prompts differ.
        """
        check_checkpoint("queries", other.checkpoint, self.checkpoint)
        prompts = {len(self.embeddings), len(other.embeddings)} - {1} or {1}
        if len(prompts) > 1:
            raise DataError(
                f"queries: {len(self.embeddings)} and {len(other.embeddings)} prompts cannot be "
                "averaged together; encode both with one prompt_mode"
            )
        (t,) = prompts
        parts = [np.broadcast_to(x, (t, *x.shape[1:])) for x in (self.embeddings, other.embeddings)]
        return QueryEmbeddings(
            embeddings=np.concatenate(parts, axis=1),
            names=self.names + other.names,
            checkpoint=self.checkpoint,
        )


@dataclass(frozen=True, kw_only=True)
class ImageEmbeddings:
    """What detection needs of i images once the image tower has run."""

    tokens: TokenEmbeddings  # NumPy arrays, [i, n, ...]; boxes relative to the padded square
    sizes: Int32[np.ndarray, "i 2"]  # height, width in pixels
    names: tuple[str, ...]  # files, or what the caller calls the images
    image_size: int  # side of the padded square, pixels
    checkpoint: str  # `identity.model_hash` of the model that made them
    source: str = "embeddings"  # file, for error messages

    def __len__(self) -> int:
        return len(self.names)


def check_checkpoint(what: str, made_with: str, checkpoint: str) -> None:
    """Raises `DataError` if embeddings come from another checkpoint than they meet."""
    if made_with != checkpoint:
        raise DataError(
            f"{what}: made with checkpoint {made_with}, and this is {checkpoint}; embed again with "
            "this checkpoint"
        )
