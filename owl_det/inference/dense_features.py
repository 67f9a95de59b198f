"""Token embeddings in the space of texts, of every kind of checkpoint; clusters and likenesses."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Float32, Int, Int32, UInt8
from PIL import Image

from data_pipelines import image_ops, prompts, tokenizer
from owl_det.errors import CheckpointError, UserError
from owl_det.inference import given_queries, ranking
from owl_det.modeling import resnet
from owl_det.modeling.build import call, detector_of
from owl_det.modeling.family import ContrastiveModel, Detector
from owl_det.modeling.resnet import ClipResNet
from owl_det.types import LoadedModel, Params


class Embedded(NamedTuple):
    """What a model makes of images, in the space of its texts; None = it has nothing such."""

    tokens: Float[Array, "b n e"] | None
    whole: Float[Array, "b e"] | None


@dataclass(frozen=True)
class Functions:
    """The pure functions of a model that are measured."""

    encode_texts: Callable[[Params, Int32[Array, "c l"]], Float[Array, "c e"]]
    embed: Callable[[Params, UInt8[Array, "b H W 3"]], Embedded]


def functions_of(model: LoadedModel) -> Functions:
    """Those of any kind of checkpoint.

    A detector has the class embeddings of its tokens, and an embedding of the whole image only if
    it kept its contrastive parameters. Towers have both, but the tokens of a tower with attention
    pooling lie in no space shared with texts. A ResNet has both.
    """
    if model.kind == "resnet":
        clip = ClipResNet(model.config, model.preprocess)
        return Functions(partial(call, clip.encode_text), partial(_embed_contrastive, clip))
    detector = detector_of(model.config, model.preprocess)
    embed = _embed_contrastive if model.kind == "towers" else _embed_detector
    return Functions(partial(call, detector.encode_text), partial(embed, detector))


def _embed_contrastive(model: ContrastiveModel, params: Params, image: Array) -> Embedded:
    whole, tokens = call(model.embed_image_and_patches, params, image)
    return Embedded(None if model.config.image.pooling == "map" else tokens, whole)


def _embed_detector(detector: Detector, params: Params, image: Array) -> Embedded:
    tokens = ranking.embed_tokens(detector, params, image).class_embeddings
    has_whole = detector.config.contrastive != "none"
    return Embedded(tokens, call(detector.embed_image, params, image) if has_whole else None)


def mean_of_prompts(texts: Float[np.ndarray, "t c e"]) -> Float32[np.ndarray, "c e"]:
    """Mean of the unit-length embeddings of each name in its t prompts, of unit length again."""
    unit = texts / np.linalg.norm(texts, axis=-1, keepdims=True)
    mean = unit.astype(np.float32).mean(axis=0)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


class DenseFeatures:
    """A frozen model that embeds images token by token, one image at a time."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        functions = functions_of(model)
        self._encode, self._embed = jax.jit(functions.encode_texts), jax.jit(functions.embed)

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
        patch = resnet.STRIDE if self.model.kind == "resnet" else self.model.config.image.patch_size
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
        queries = given_queries.texts(queries)
        words = tokenizer.build(self.model.config.text, self.model.tokenizer)
        given_queries.check_read(queries, words)
        given_queries.warn(queries)
        for query in queries:
            if not words.fits(query):
                logging.warning("Query %r is cut to %d tokens", query, words.num_positions)
        texts = [
            self._encode(
                self.model.params,
                words.encode_all([prompts.apply_template(template, query) for query in queries]),
            )
            for template in prompts.eval_prompts(prompt_mode or self.model.eval_prompts)
        ]
        return mean_of_prompts(np.stack([np.asarray(text) for text in texts]))


def cluster(
    grids: Sequence[Float32[np.ndarray, "h w e"]], num_clusters: int, seed: int = 0
) -> list[Int[np.ndarray, "h w"]]:
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
