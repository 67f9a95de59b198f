"""Contrastive training: small versions of the configs at full size learn, on any mesh."""

import dataclasses
import importlib
from typing import Any

import jax
import numpy as np
import pytest

from owl_det import path_rules, sharding
from owl_det.checkpoints.adapt import adapt
from owl_det.config import Config, MeshConfig
from owl_det.config.resolve import resolve
from owl_det.errors import CheckpointError, ConfigError
from owl_det.modeling import build
from owl_det.training import train_step
from owl_det.types import LoadedModel
from tests import tiny

CONFIGS = ("pretrain_clip_b16", "pretrain_siglip_b16", "pretrain_lit_b16")
NUM_STEPS = 10
KEY = jax.random.key(7)


def _small(name: str, **changes: Any) -> Config:
    """A shipped config with towers of one small layer, on captions of shapes world."""
    tree: Any = importlib.import_module(f"configs.{name}").get_config().to_dict()
    tree["model"] |= {"image_size": 32, "embedding_dim": 32, "dtype": "float32", "remat": "none"}
    tower = {"width": 32, "num_layers": 1, "num_heads": 2, "mlp_width": 64}
    tree["model"]["image"] |= tower | {"patch_size": 8}
    # SigLIP's tokeniser is a file: the small tower reads CLIP's ids.
    words = {"num_positions": 12, "tokenizer": "clip", "vocabulary_size": 49408}
    tree["model"]["text"] |= tower | words
    source = {"kind": "shapes_world", "split": "image_text", "image_size": 32, "num_images": 64}
    tree["data"] |= {"train": {"shapes": source}, "eval": {}}
    # Adam in all of them: Adafactor takes long to compile, and has its own tests.
    rates = {"learning_rate": 1e-2, "text_learning_rate": 1e-2}
    tree["optimizer"] |= rates | {"kind": "adam"}
    tree["schedule"] |= {"kind": "constant", "warmup_steps": 0}
    tree["checkpoint"] |= {"init_from": "", "fresh": ()}
    return resolve(tree | {"batch_size": 8, "num_steps": NUM_STEPS} | changes)


def _init(config: Config, seed: int = 0) -> Any:
    return jax.jit(lambda: build.init_params(config, jax.random.key(seed)))()


@pytest.mark.parametrize(
    "name",
    ["pretrain_clip_b16", *(pytest.param(name, marks=pytest.mark.nightly) for name in CONFIGS[1:])],
)
def test_the_loss_of_a_batch_falls(name: str) -> None:
    config = _small(name)
    batch = tiny.batch(config)
    state = jax.jit(lambda: train_step.init_state(config))()
    before = jax.device_get(state.params)
    step = jax.jit(lambda s, b: train_step.train_step(s, b, config=config, num_data_shards=1))
    losses = []
    for _ in range(NUM_STEPS):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0], losses
    assert np.isfinite(losses).all()
    for path, is_same in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(np.array_equal, before, jax.device_get(state.params))
    ):
        place = path_rules.path_name(path)
        assert is_same == (place.startswith("image/") and name == "pretrain_lit_b16"), place


def test_siglip_starts_from_its_scale_and_bias() -> None:
    params = _init(_small("pretrain_siglip_b16"))
    np.testing.assert_allclose(np.exp(params["logit_scale"]), 10.0, rtol=1e-6)
    assert params["logit_bias"] == -10.0


def test_only_a_softmax_has_a_bounded_scale() -> None:
    """SigLIP So400m at 384 px is published with a scale of 112.3."""
    params = {"logit_scale": np.log(np.float32(112.3))}
    clip, siglip = _small("pretrain_clip_b16"), _small("pretrain_siglip_b16")
    bounded = np.exp(train_step.bound_scale(params, clip)["logit_scale"])
    np.testing.assert_allclose(bounded, 100.0, rtol=1e-3)
    assert train_step.bound_scale(params, siglip) is params


@pytest.mark.nightly
@pytest.mark.parametrize("name", CONFIGS)
def test_eight_devices_contrast_the_whole_batch(name: str) -> None:
    """With losses of each device's own pairs, loss and gradients would be others."""
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    config = _small(name, batch_size=16)
    params, batch = _init(config), tiny.batch(config)

    def gradients(mesh: Any) -> Any:
        return jax.jit(
            lambda p, b: train_step.loss_and_gradients(
                p, b, KEY, config=config, num_data_shards=1 if mesh is None else 4, mesh=mesh
            )
        )

    wanted, metrics = gradients(None)(params, batch)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(params, sharding.parameter_shardings(params, mesh))
    split = jax.device_put(tiny.batch(config, 4), sharding.batch_sharding(mesh))
    ours, again = gradients(mesh)(placed, split)
    np.testing.assert_allclose(again["loss"], metrics["loss"], rtol=1e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=path_rules.path_name(path))


# --- starting from another model's image tower ---------------------------------------------------


@pytest.fixture(scope="module")
def clip() -> LoadedModel:
    config = _small("pretrain_clip_b16")
    return LoadedModel(
        kind="towers",
        params=_init(config, seed=5),
        config=config.model,
        preprocess=config.preprocess,
        eval_prompts="none",
        step=0,
    )


def _from_clip(fresh: tuple[str, ...], **text: Any) -> Config:
    config = _small("pretrain_lit_b16")
    start = dataclasses.replace(config.checkpoint, init_from="clip", fresh=fresh)
    model = dataclasses.replace(config.model, text=dataclasses.replace(config.model.text, **text))
    return dataclasses.replace(config, checkpoint=start, model=model)


def test_what_is_fresh_comes_from_the_seed(clip: LoadedModel) -> None:
    """The image tower is the checkpoint's; the text tower is new, and of another size."""
    config = _from_clip(("^text/", "^logit_scale$"), width=16, num_positions=6, is_causal=False)
    params = adapt(clip, config)
    new = _init(config, config.seed)
    for name, expected in (("image", clip.params), ("text", new), ("logit_scale", new)):
        jax.tree.map(np.testing.assert_array_equal, params[name], expected[name])


def test_what_is_not_fresh_must_fit(clip: LoadedModel) -> None:
    with pytest.raises(CheckpointError, match="another architecture"):
        adapt(clip, _from_clip((), width=16))
    with pytest.raises(CheckpointError, match=r"model\.text\.is_causal"):
        adapt(clip, _from_clip(("^text/norm_final/",), is_causal=False))
    with pytest.raises(ConfigError, match="'^txt/' fits no parameter".replace("^", r"\^")):
        adapt(clip, _from_clip(("^txt/",)))


@pytest.mark.parametrize(
    ("fresh", "message"),
    [(("^text/",), "config.checkpoint.fresh: needs"), (("(",), "fresh: '.' is no regular")],
)
def test_fresh_patterns_are_checked(fresh: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.config(checkpoint__fresh=fresh)
