"""What training and inference ask of a detector, whatever its family.

Images become features once, and features meet queries afterwards, so that one image tower pass
serves any number of names. Boxes do not depend on the queries.
"""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from owl_det.config import ModelConfig, PreprocessConfig, SelectionConfig
from owl_det.types import Features, Predictions, TokenEmbeddings


@runtime_checkable
class ContrastiveModel(Protocol):
    """An image tower and a text tower that share a space; teachers are such models."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def preprocess(self) -> PreprocessConfig: ...

    @property
    def dtype(self) -> Any: ...  # of matrix work

    def encode_text(
        self, tokens: Int[Array, "u l"], row_keys: Key[Array, " u"] | None = None
    ) -> Float[Array, "u e"]:
        """Embeddings of texts, not of unit length; `row_keys` switch training noise on."""
        ...

    def embed_image(
        self, image: UInt8[Array, "b H W 3"], row_keys: Key[Array, " b"] | None = None
    ) -> Float[Array, "b e"]:
        """Embeddings of whole images, not of unit length."""
        ...

    def patch_features(
        self,
        image: UInt8[Array, "b H W 3"],
        selection: SelectionConfig | None = None,
        row_keys: Key[Array, " b"] | None = None,
    ) -> Features:
        """One embedding for each place of the image, in the space of the texts."""
        ...

    def embed_image_and_patches(
        self, image: UInt8[Array, "b H W 3"]
    ) -> tuple[Float[Array, "b e"], Float[Array, "b n e"]]:
        """`embed_image` and the tokens of `patch_features`, from one pass of the tower."""
        ...

    def similarity(
        self, image_embeddings: Float[Array, "b e"], text_embeddings: Float[Array, "u e"]
    ) -> Float[Array, "b u"]:
        """Contrastive logits."""
        ...


@runtime_checkable
class Detector(ContrastiveModel, Protocol):
    """A contrastive model with heads; its contrastive parameters may be missing."""

    def encode_image(
        self,
        image: UInt8[Array, "b H W 3"],
        selection: SelectionConfig | None = None,
        row_keys: Key[Array, " b"] | None = None,
    ) -> Features:
        """The features that heads read; `selection` and `row_keys` are for training."""
        ...

    def embed_tiles(
        self,
        image: UInt8[Array, "b H W 3"],
        tile_boxes: Float[Array, "b t 4"],
        selection: SelectionConfig | None = None,
        row_keys: Key[Array, " b"] | None = None,
    ) -> Float[Array, "b t e"]:
        """Embeddings of the tiles of mosaics, for contrastive training."""
        ...

    def predict(
        self,
        features: Features,
        query_embeddings: Float[Array, "b q e"],
        is_query: Bool[Array, "b q"],
        *,
        instance_top_k: int = 0,
    ) -> Predictions:
        """What losses read: boxes, and logits of the given queries."""
        ...

    def class_embeddings(self, features: Features) -> Features:
        """The features in the space of the texts, of unit length, as queries meet them."""
        ...

    def embed_tokens(self, features: Features) -> TokenEmbeddings:
        """The candidates for detections: what is needed to score them for any query later."""
        ...
