"""Teachers: what is opened, what is refused, what they look at."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from owl_det.checkpoints.load import load_model, save_model
from owl_det.config.resolve import resolve_model
from owl_det.distillation import crops, teachers
from owl_det.distillation.teacher import Teacher
from owl_det.errors import CheckpointError, ConfigError
from owl_det.modeling import resnet
from owl_det.types import LoadedModel
from tests import tiny, tiny_distillation


def test_a_teacher_is_asked_for_by_name(teacher_folder: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config.distill.teacher: the active branches need"):
        tiny_distillation.open_teaching(tiny_distillation.config("clipself"), "")
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        tiny_distillation.open_teaching(tiny_distillation.config("clipself"), str(tmp_path))
    made, teaching = tiny_distillation.open_teaching(
        tiny_distillation.config("clipself"), teacher_folder
    )
    assert teaching.embed_boxes is None and set(teaching.arrays) == {"image"}


def test_a_text_tower_of_another_checkpoint_is_refused(teacher_folder: str) -> None:
    made, teaching = tiny_distillation.open_teaching(
        tiny_distillation.config("gridclip_image", "clipself", distill={"require_same_text": True}),
        teacher_folder,
    )
    towers = load_model(teacher_folder).params
    shorter = {**towers["text"], "position_embedding": towers["text"]["position_embedding"][:4]}
    teachers.check_same_text(teaching, {"text": shorter}, made)
    other = jax.tree.map(lambda x: x + 1, towers)
    with pytest.raises(ConfigError, match="clipself: the student's text tower is not the teacher"):
        teachers.check_same_text(teaching, other, made)
    adapted, teaching = tiny_distillation.open_teaching(
        tiny_distillation.config("gridclip_image", distill={"require_same_text": True}),
        teacher_folder,
    )
    teachers.check_same_text(teaching, other, adapted)  # has an adapter: any teacher will do


@pytest.mark.nightly
def test_clips_resnet_is_a_teacher_of_images_and_of_tokens(tmp_path: Path) -> None:
    text = {"num_positions": 8, "width": 16, "num_layers": 1, "num_heads": 2, "mlp_width": 16}
    model, preprocess = resolve_model(
        {
            "image_size": 64,
            "embedding_dim": 24,
            "text": text,
            "image": {"kind": "resnet", "width": 4, "num_blocks": (1, 1, 1, 1), "num_heads": 2},
        },
        {},
    )
    shapes = resnet.parameter_shapes(model, preprocess)
    rng = np.random.default_rng(0)
    loaded = LoadedModel(
        kind="towers",
        params=jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes),
        config=model,
        preprocess=preprocess,
        eval_prompts="none",
        step=0,
    )
    save_model(tmp_path / "resnet", loaded)
    made, teaching = tiny_distillation.open_teaching(
        tiny_distillation.config("gridclip_image", "densevlm", distill={"dense_image_size": 96}),
        str(tmp_path / "resnet"),
    )
    assert teaching.teacher_dim == 24 and set(teaching.arrays) == {"image", "names"}
    np.testing.assert_allclose(np.linalg.norm(teaching.arrays["names"], axis=-1), 1, rtol=1e-3)
    signals = jax.eval_shape(teaching.signals, teaching.arrays, tiny.batch(made))
    assert signals["tiles"].shape == (4, 1, 24)
    assert signals["dense_regions"].shape == (4, 6, 24)
    with pytest.raises(ConfigError, match="dense_image_size: 80 is no multiple of the 32 pixels"):
        tiny_distillation.open_teaching(
            tiny_distillation.config("densevlm", distill={"dense_image_size": 80}),
            str(tmp_path / "resnet"),
        )


def test_dense_teachers_that_cannot_name_tokens_are_refused(
    teacher_folder: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="25 is no multiple of the 8 pixels of the dense teacher"):
        tiny_distillation.open_teaching(
            tiny_distillation.config("densevlm", distill={"dense_image_size": 25}), teacher_folder
        )
    pooled = {"model__image__pooling": "map", "model__image__projection": "none"}
    folder = tiny_distillation.save_towers(tmp_path / "siglip", **pooled, model__image__width=16)
    with pytest.raises(ConfigError, match="dense_teacher: .*siglip pools by attention"):
        tiny_distillation.open_teaching(tiny_distillation.config("densevlm"), folder)


def test_teachers_are_held_once(teacher_folder: str) -> None:
    """On the mesh, not on the first device too."""
    _, teaching = tiny_distillation.open_teaching(
        tiny_distillation.config("clipself", "densevlm"), teacher_folder
    )
    for name in ("image", "dense"):
        assert teaching.signals.keywords[name].loaded.params == {}
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in teaching.teacher_ids)


def test_vectors_of_another_width_are_refused(teacher_folder: str) -> None:
    made, teaching = tiny_distillation.open_teaching(
        tiny_distillation.config("clipself"), teacher_folder
    )
    wider = dataclasses.replace(teaching, teacher_dim=24)
    with pytest.raises(ConfigError, match="config.model.embedding_dim: 16, but distill.clipself"):
        teachers.check_same_text(wider, {}, made)


@pytest.mark.slow
def test_a_mean_pooled_teacher_sees_no_padding(tmp_path: Path) -> None:
    """Tokens of a crop's padding are no part of the mean: a loop over the others."""
    loaded = load_model(
        tiny_distillation.save_towers(tmp_path / "towers", model__image__pooling="mean")
    )
    teacher = Teacher(loaded)
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    box = np.array([[0.5, 0.25, 1.0, 0.5]], np.float32)
    found = teacher.embed_boxes(loaded.params, jnp.asarray(image), jnp.asarray(box)[:, None])
    pixels = crops.crop_and_resize(
        jnp.asarray(image), jnp.asarray(box), loaded.config.image_size, loaded.preprocess
    )
    _, tokens = teacher.module.apply(
        {"params": loaded.params}, pixels, method=lambda m, x: m.image.embed_all(x)
    )
    side = loaded.config.image_size // loaded.config.image.patch_size
    content = np.asarray(tokens).reshape(side, side, -1)[: side // 2].reshape(-1, tokens.shape[-1])
    wanted = content.mean(0) / np.linalg.norm(content.mean(0))
    np.testing.assert_allclose(found[0, 0], wanted, atol=1e-5)
