"""One frozen model: where it comes from, and what it says of images and texts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from data_pipelines import tokenizer
from owl_det.checkpoints.identity import parameter_hash
from owl_det.checkpoints.image_size import resized
from owl_det.checkpoints.load import load_model
from owl_det.config import Config
from owl_det.distillation import branches, crops
from owl_det.errors import CheckpointError, ConfigError
from owl_det.modeling.build import call, detector_of
from owl_det.modeling.family import ContrastiveModel
from owl_det.modeling.region_pool import region_embeddings
from owl_det.modeling.resnet import ClipResNet
from owl_det.scoring import unit_length
from owl_det.types import LoadedModel, Params

_NAME_CHUNK = 256  # texts encoded at once


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen model: towers, or CLIP's ResNet-50. Forward passes take parameters as arguments."""

    loaded: LoadedModel
    # Of a ViT whose grid was resized to another side than the checkpoint's; it takes their place.
    positions: Array | None = None

    @property
    def is_resnet(self) -> bool:
        return self.loaded.is_resnet

    @property
    def module(self) -> ContrastiveModel:
        make = ClipResNet if self.is_resnet else detector_of
        return make(self.loaded.config, self.loaded.preprocess)

    @property
    def stride(self) -> int:
        """Pixels for each token, along an axis."""
        return self.loaded.config.image.stride

    def without_params(self) -> "Teacher":
        """The same for a step, which reads the parameters that were placed."""
        return dataclasses.replace(self, loaded=dataclasses.replace(self.loaded, params={}))

    def embed_boxes(
        self, params: Params, image: UInt8[Array, "b H W 3"], boxes_cxcywh: Float[Array, "b r 4"]
    ) -> Float[Array, "b r e"]:
        """Unit-length image embeddings of the boxes' crops, one box of every image at a time.

        Towers that pool by the mean take the mean of a crop's tokens without its padding.
        """
        side, preprocess = self.loaded.config.image_size, self.loaded.preprocess
        pools_by_mean = not self.is_resnet and self.loaded.config.vit.pooling == "mean"

        def embed(boxes: Array) -> Array:
            pixels = crops.crop_and_resize(image, boxes, side, preprocess)
            if pools_by_mean:
                size = image.shape[1], image.shape[2]
                content = crops.content_boxes(boxes, size, side, preprocess)
                towers = detector_of(self.loaded.config, preprocess)
                found = call(towers.embed_tiles, params, pixels, content[:, None])
            else:
                found = call(self.module.embed_image, params, pixels)
            return unit_length(found.reshape(pixels.shape[0], -1))

        found = jax.lax.map(embed, jnp.swapaxes(boxes_cxcywh, 0, 1))
        return jax.lax.stop_gradient(jnp.swapaxes(found, 0, 1))

    def embed_texts(self, params: Params, tokens: Int32[Array, "*b l"]) -> Float[Array, "*b e"]:
        """Unit-length text embeddings."""
        rows = tokens.reshape(-1, tokens.shape[-1])
        found = call(self.module.encode_text, params, rows)
        return jax.lax.stop_gradient(unit_length(found).reshape(*tokens.shape[:-1], -1))

    def embed_regions(
        self,
        params: Params,
        image: UInt8[Array, "b H W 3"],
        boxes_cxcywh: Float[Array, "b r 4"],
        side: int,
    ) -> Float[Array, "b r e"]:
        """Tokens in the texts' space, of the image at `side` pixels, pooled over boxes."""
        if image.shape[1] != side:
            whole = jnp.tile(jnp.array([[0.5, 0.5, 1.0, 1.0]]), (image.shape[0], 1))
            image = crops.crop_and_resize(image, whole, side, self.loaded.preprocess)
        level = call(self.module.patch_features, params, image).only_level
        found = region_embeddings(level.tokens, boxes_cxcywh, *level.grid)
        return jax.lax.stop_gradient(found)


def open_teacher(config: Config) -> Teacher:
    """`distill.teacher`. Raises `UserError` if it is no checkpoint of towers or a ResNet."""
    return _open(config.distill.teacher, "teacher", config)


def open_dense_teacher(config: Config, image: Teacher | None) -> Teacher:
    """`distill.dense_teacher`, or `image` where that is unnamed, as it embeds every token.

    A ViT's position grid is resized linearly to `distill.dense_image_size`. Raises `UserError` if
    its patches do not divide that side, or if its tokens cannot be compared with texts.
    """
    distill, side = config.distill, dense_side(config)
    if distill.dense_teacher and distill.dense_teacher != distill.teacher:
        teacher = _open(distill.dense_teacher, "dense_teacher", config)
    else:
        teacher = image or open_teacher(config)
    if side % teacher.stride:
        raise ConfigError(
            f"config.distill.dense_image_size: {side} is no multiple of the {teacher.stride} "
            "pixels of the dense teacher's tokens"
        )
    if teacher.is_resnet:
        return teacher  # takes any size; its tokens are its values already
    model = teacher.loaded.config
    if model.vit.pooling == "map":
        raise ConfigError(
            f"config.distill.dense_teacher: {distill.dense_teacher or distill.teacher} pools by "
            "attention, so its tokens lie in no space of texts; take a CLIP, or towers that "
            "CLIPSelf has taught"
        )
    fitted = resized(teacher.loaded, side)
    is_same = fitted is teacher.loaded
    positions = None if is_same else fitted.params["image"]["position_embedding"]
    tower = dataclasses.replace(model.vit, last_block=distill.dense_last_block)
    model = dataclasses.replace(model, image_size=side, image=tower)
    return Teacher(dataclasses.replace(teacher.loaded, config=model), positions)


def dense_side(config: Config) -> int:
    """Pixels of the dense teacher's input, along an axis."""
    return config.distill.dense_image_size or config.model.image_size


def _open(path: str, key: str, config: Config) -> Teacher:
    where = f"config.distill.{key}"
    if not path:
        raise ConfigError(f"{where}: the active branches need a checkpoint of towers or a ResNet")
    loaded = load_model(path)
    if loaded.kind == "detector":
        raise CheckpointError(
            f"{path} ({where}): a detector embeds no images; a teacher is a checkpoint of kind "
            "towers or resnet"
        )
    # Precision and kernels are the training's.
    model = dataclasses.replace(
        loaded.config, dtype=config.model.dtype, attention=config.model.attention, remat="none"
    )
    return Teacher(dataclasses.replace(loaded, config=model))


def teacher_id(config: Config, path: str, key: str) -> str:
    """The hash of the checkpoint that `config.distill.<key>` names. Raises as `open_teacher`."""
    return parameter_hash(_open(path, key, config).loaded.params)


def text_id(params: Params) -> str:
    """The id of a text tower, without its positions: a student keeps only the first of them."""
    kept = {k: v for k, v in params["text"].items() if k != "position_embedding"}
    return parameter_hash(kept)


# --- names ---------------------------------------------------------------------------------------


def embed_names(dense: Teacher, config: Config) -> Float[np.ndarray, "c f"]:
    """The dense teacher's texts of the names that a branch provides, of unit length."""
    reader = tokenizer.build(dense.loaded.config.text, dense.loaded.tokenizer)
    tokens = reader.encode_all(branches.name_texts(config.distill))
    embed = jax.jit(dense.embed_texts)
    chunks = [
        embed(dense.loaded.params, jnp.asarray(tokens[start : start + _NAME_CHUNK]))
        for start in range(0, len(tokens), _NAME_CHUNK)
    ]
    return np.concatenate([np.asarray(chunk) for chunk in chunks])


def student_name_tokens(config: Config) -> Int32[np.ndarray, "c l"]:
    """The same texts for the student's text tower."""
    student = tokenizer.build(config.model.text, config.data.tokenizer)
    return student.encode_all(branches.name_texts(config.distill))
