"""Token embeddings in the space of texts, of every kind of checkpoint; clusters and likenesses."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, UInt8
from PIL import Image

from data_pipelines import image_ops
from owl_det.errors import CheckpointError, UserError
from owl_det.inference import ranking, text_queries
from owl_det.inference.text_encoder import TextEncoder, mean_of_prompts
from owl_det.modeling.build import call, detector_of
from owl_det.modeling.family import ContrastiveModel, Detector
from owl_det.modeling.resnet import ClipResNet
from owl_det.types import LoadedModel, Params


class Embedded(NamedTuple):
    """What a model makes of images, in the space of its texts; None = it has nothing such."""

    tokens: Float[Array, "b n e"] | None
    whole: Float[Array, "b e"] | None


@dataclass(frozen=True)
class EmbeddingFunctions:
    """The pure functions of a model that are measured."""

    embed_prompts: Callable[[Params, Int32[Array, "t c l"]], Float[Array, "t c e"]]
    embed_image: Callable[[Params, UInt8[Array, "b H W 3"]], Embedded]


def embedding_functions(model: LoadedModel) -> EmbeddingFunctions:
    """The functions of a checkpoint of any kind.

    A detector has the class embeddings of its tokens, and an embedding of the whole image only if
    it kept its contrastive parameters. Towers have both, but the tokens of a tower with attention
    pooling lie in no space shared with texts. A ResNet has both.
    """
    if model.is_resnet:
        clip = ClipResNet(model.config, model.preprocess)
        return EmbeddingFunctions(
            partial(ranking.embed_prompts, clip), partial(_embed_contrastive, clip)
        )
    detector = detector_of(model.config, model.preprocess)
    embed = _embed_contrastive if model.kind == "towers" else _embed_detector
    return EmbeddingFunctions(partial(ranking.embed_prompts, detector), partial(embed, detector))


def _embed_contrastive(model: ContrastiveModel, params: Params, image: Array) -> Embedded:
    whole, tokens = call(model.embed_image_and_patches, params, image)
    tower = model.config.image
    has_patches = tower.kind == "resnet" or tower.pooling != "map"
    return Embedded(tokens if has_patches else None, whole)


def _embed_detector(detector: Detector, params: Params, image: Array) -> Embedded:
    tokens = ranking.embed_image_tokens(detector, params, image).class_embeddings
    has_whole = detector.config.contrastive != "none"
    return Embedded(tokens, call(detector.embed_image, params, image) if has_whole else None)


class DenseFeatures:
    """A frozen model that embeds images token by token, one image at a time."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        functions = embedding_functions(model)
        self._embed = jax.jit(functions.embed_image)
        self._encoder = TextEncoder(jax.jit(functions.embed_prompts), model.config, model.tokenizer)

    def embed(self, image: Image.Image) -> Float32[np.ndarray, "h w e"]:
        """The tokens that show the image, of unit length, as a grid; padding is cut off.

        Raises `CheckpointError` if the tokens lie in no space shared with texts, or are NaN.
        """
        side, preprocess = self.model.config.image_size, self.model.preprocess
        pixels = image_ops.to_square(image, side, preprocess)
        tokens = self._embed(self.model.params, pixels[None]).tokens
        if tokens is None:
            raise CheckpointError(
                "towers with attention pooling have no dense features: their tokens lie in no "
                "space shared with texts"
            )
        size = math.isqrt(tokens.shape[1])
        height, width = image_ops.fit_size(image.height, image.width, side, preprocess.geometry)
        grid = np.asarray(tokens[0], np.float32).reshape(size, size, -1)
        ranking.require_finite("features", grid)
        # A token that shows some of the image is kept.
        grid = grid[: math.ceil(height * size / side), : math.ceil(width * size / side)]
        return grid / np.maximum(np.linalg.norm(grid, axis=-1, keepdims=True), 1e-12)

    def extent(self, image: Image.Image) -> tuple[float, float]:
        """Height and width of `embed`'s grid in pixels of the image; whole tokens may exceed it."""
        side, geometry = self.model.config.image_size, self.model.preprocess.geometry
        patch = self.model.config.image.stride
        height, width = image_ops.fit_size(image.height, image.width, side, geometry)
        across, down = image_ops.extent(image.height, image.width, geometry)
        rows, columns = math.ceil(height / patch), math.ceil(width / patch)
        return rows * patch * down / side, columns * patch * across / side

    def encode(
        self, queries: str | Sequence[str], prompt_mode: str = ""
    ) -> Float32[np.ndarray, "q e"]:
        """Unit-length embeddings of texts; `prompt_mode` "" is that of the checkpoint.

        Raises `DataError` for a query of no use.
        """
        texts, mode = text_queries.texts(queries), prompt_mode or self.model.eval_prompts
        text_queries.check_read(texts, self._encoder.tokenizer)
        text_queries.warn(texts)
        self._encoder.warn_of_cut(texts, mode)
        return mean_of_prompts(self._encoder.embed(self.model.params, texts, mode))


def cluster(
    grids: Sequence[Float32[np.ndarray, "_ _ e"]], num_clusters: int, seed: int = 0
) -> list[Int[np.ndarray, "_ _"]]:
    """k-means over the tokens of all images together: the cluster of every token.

    Clusters are numbered by size, largest first. Raises `UserError` if there are fewer tokens.
    """
    from scipy.cluster import vq

    tokens = np.concatenate([grid.reshape(-1, grid.shape[-1]) for grid in grids])
    if not 1 <= num_clusters <= len(tokens):
        raise UserError(f"--num_clusters: from 1 to the {len(tokens)} tokens there are")
    _, labels = vq.kmeans2(tokens, num_clusters, minit="++", rng=np.random.default_rng(seed))
    order = np.argsort(-np.bincount(labels, minlength=num_clusters), kind="stable")
    labels = np.argsort(order)[labels]
    ends = np.cumsum([grid.shape[0] * grid.shape[1] for grid in grids])
    parts = np.split(labels, ends[:-1])
    return [part.reshape(grid.shape[:2]) for part, grid in zip(parts, grids, strict=True)]
