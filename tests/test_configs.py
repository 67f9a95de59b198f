"""The shipped configs: the papers' numbers stand in them, and the command line can change them.

That each one resolves and its training step has shapes is in `test_config.py`.
"""

import ast
import dataclasses
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax
import pytest
from absl import flags
from ml_collections import config_flags

from configs import densevlm_b16
from owl_det import path_rules
from owl_det.config import Config
from owl_det.config.resolve import resolve
from owl_det.modeling import build
from owl_det.training import optim, train_step

NAMES = (
    *("quickstart", "selftrain_shapes", "bccd", "finetune"),
    *("owlvit_b32", "owlvit_b16", "owlvit_l14", "owlv2_b16", "owlv2_l14"),
    *("pretrain_clip_b16", "pretrain_siglip_b16", "pretrain_lit_b16"),
)


def _resolve(name: str) -> Config:
    module = importlib.import_module(f"configs.{name}")
    return resolve(module.get_config().to_dict())


def _imported(file: Path) -> set[str]:
    """The modules that a file imports anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{'.' * node.level}{node.module or ''}"}
    return found


def test_configs_import_nothing_from_each_other(repository_root: Path) -> None:
    """Each can be copied, read alone, and changed without changing another."""
    files = sorted((repository_root / "configs").glob("*.py"))
    assert len(files) > 20
    allowed = ("typing", "ml_collections", "owl_det.config", "owl_det.presets", "owl_det")
    for file in files:
        assert _imported(file) <= set(allowed), file.name


def test_few_modules_know_the_mutable_config(repository_root: Path) -> None:
    """Everything else reads the frozen dataclasses."""
    modules = [
        file.relative_to(repository_root).as_posix()
        for package in ("owl_det", "data_pipelines")
        for file in sorted((repository_root / package).rglob("*.py"))
        if any(name.split(".")[0] == "ml_collections" for name in _imported(file))
    ]
    assert modules == ["owl_det/config/config_file.py", "owl_det/presets/__init__.py"]


@pytest.mark.parametrize(
    ("name", "published"),
    [("owlvit_b32", 151_277_313), ("owlvit_b16", 149_620_737), ("owlvit_l14", 427_616_513)],
)
def test_towers_have_the_parameters_of_clip(name: str, published: int) -> None:
    """The published models hold 224 px, 77 positions, a visual projection and a logit scale."""
    config = _resolve(name)
    text = dataclasses.replace(config.model.text, num_positions=77)
    model = dataclasses.replace(config.model, image_size=224, text=text)
    config = dataclasses.replace(config, model=model)
    params = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    count = sum(x.size for x in jax.tree.leaves((params["image"], params["text"])))
    assert count + model.image.width * model.embedding_dim + 1 == published


# arXiv 2205.06230, A1.3 and table A3; arXiv 2306.09683, table A2 and A.1 to A.7.
V1: dict[str, Any] = {
    "model.has_objectness_head": False,
    "loss.objectness_weight": 0.0,
    "data.train.lvis.subset": "lvis_base",
    "data.eval.lvis.subset": "all",
    "optimizer.kind": "adam",
    "schedule.kind": "cosine",
    "schedule.warmup_steps": 1000,
    "data.augment.mosaic_sizes": (1, 2, 3),
    "data.augment.mosaic_probabilities": (0.4, 0.3, 0.3),
    "data.augment.merge_iou": 0.9,
    "data.augment.crop_min_area": 0.33,
    "data.augment.crop_keep": 0.6,
    "data.augment.flip": True,
    "data.train_prompts": "clip",
    "data.max_instances": 100,
    "data.max_queries": 100,
    "selection.token_drop_rate": 0.0,
    "selection.instance_top_k": 0,
}
V2: dict[str, Any] = {
    "optimizer.kind": "adafactor",
    "schedule.kind": "inverse_sqrt",
    "schedule.timescale": 10_000,
    "data.augment.mosaic_sizes": (1, 2, 3, 4, 6),
    "data.augment.mosaic_probabilities": (0.2,) * 5,
    "data.augment.tile_scale_min": 0.5,
    "data.augment.crop_probability": 0.0,
    "data.augment.flip": False,
    "data.train_prompts": "none",
    "selection.token_drop_rate": 0.5,
    "selection.token_drop_noise": 0.01,
}
BOTH: dict[str, Any] = {
    "batch_size": 256,
    "optimizer.text_learning_rate": 2e-6,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip.scope": "shared_text",
    "optimizer.clip.norm": 1.0,
    "loss.focal_alpha": 0.3,
    "loss.focal_gamma": 2.0,
    "loss.class_weight": 1.0,
    "loss.l1_weight": 1.0,
    "loss.giou_weight": 1.0,
    "model.text.num_positions": 16,
    "model.image.droplayer_rate": 0.2,
    "model.text.droplayer_rate": 0.1,
    "data.min_queries": 50,
    "data.eval_prompts": "clip_best7",
}
B_RATE: dict[str, Any] = {"optimizer.learning_rate": 5e-5}
L_RATE: dict[str, Any] = {"optimizer.learning_rate": 2e-5}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("owlvit_b32", V1 | B_RATE | {"model.image_size": 768, "num_steps": 140_000}),
        ("owlvit_b16", V1 | B_RATE | {"model.image_size": 768, "num_steps": 140_000}),
        ("owlvit_l14", V1 | L_RATE | {"model.image_size": 840, "num_steps": 70_000}),
        ("owlv2_b16", V2 | B_RATE | {"model.image_size": 960, "selection.instance_top_k": 256}),
        ("owlv2_l14", V2 | L_RATE | {"model.image_size": 1008, "selection.instance_top_k": 512}),
    ],
)
def test_hyper_parameters_are_those_of_the_papers(name: str, own: dict[str, Any]) -> None:
    config = _resolve(name)
    found = {key: _at(config, key) for key in BOTH | own}
    assert found == BOTH | own


# arXiv 2103.00020, tables 18 to 20; 2303.15343, sections 3.2 and 4; 2111.07991.
BIG_VISION: dict[str, Any] = {
    "optimizer.kind": "adafactor",
    "optimizer.learning_rate": 1e-3,
    "optimizer.text_learning_rate": 1e-3,
    "optimizer.b2": 0.95,
    "optimizer.clip.scope": "global",
    "optimizer.clip.norm": 1.0,
}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        (
            "pretrain_clip_b16",
            {
                "model.contrastive": "softmax",
                "model.image.pooling": "class_token",
                "model.text.num_positions": 77,
                "num_steps": 390_625,
                "optimizer.kind": "adam",
                "optimizer.learning_rate": 5e-4,
                "optimizer.text_learning_rate": 5e-4,
                "optimizer.b1": 0.9,
                "optimizer.b2": 0.98,
                "optimizer.epsilon": 1e-6,
                "optimizer.weight_decay": 0.2,
                "optimizer.frozen": (),
                "schedule.warmup_steps": 2000,
            },
        ),
        (
            "pretrain_siglip_b16",
            BIG_VISION
            | {
                "model.contrastive": "sigmoid",
                "model.image.pooling": "map",
                "model.text.tokenizer": "siglip",
                "model.text.num_positions": 64,
                "optimizer.frozen": (),
                "schedule.warmup_steps": 20_000,
            },
        ),
        (
            "pretrain_lit_b16",
            BIG_VISION
            | {
                "model.contrastive": "softmax",
                "model.image.pooling": "class_token",
                "optimizer.frozen": ("^image/",),
                "checkpoint.fresh": ("^text/", "^logit_scale$"),
            },
        ),
    ],
)
def test_pretraining_is_that_of_the_papers(name: str, own: dict[str, Any]) -> None:
    both = {
        "task": "contrastive",
        "model.image_size": 224,
        "model.image.droplayer_rate": 0.0,
        "model.text.droplayer_rate": 0.0,
        "data.with_captions": True,
        "data.augment.mosaic_sizes": (1,),
        "schedule.kind": "cosine",
    }
    config = _resolve(name)
    found = {key: _at(config, key) for key in both | own}
    assert found == both | own


def _at(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


@pytest.fixture
def override(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes a config as flags of the command line leave it."""

    def make(name: str, *arguments: str) -> Any:
        argv = ["main", *arguments]
        monkeypatch.setattr("sys.argv", argv)  # where ml_collections looks for overrides
        values = flags.FlagValues()
        config = importlib.import_module(f"configs.{name}").get_config()
        holder = config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, lock_config=True
        )
        values(argv)
        return holder.value

    return make


@pytest.mark.parametrize("name", NAMES)
def test_command_line_changes_what_every_run_changes(
    name: str, override: Callable[..., Any]
) -> None:
    arguments = ("--config.batch_size=4", "--config.num_steps=7", "--config.data.path=my/data")
    config = resolve(override(name, *arguments).to_dict())
    assert (config.batch_size, config.num_steps, config.data.path) == (4, 7, "my/data")


@pytest.mark.parametrize("name", NAMES)
def test_unknown_overrides_raise(name: str, override: Callable[..., Any]) -> None:
    with pytest.raises((AttributeError, KeyError), match="batchsize"):
        override(name, "--config.batchsize=4")
    with pytest.raises((flags.Error, TypeError, ValueError)):
        override(name, "--config.batch_size=many")


@pytest.mark.parametrize("name", NAMES)
def test_names_and_docstrings_are_of_the_file(name: str) -> None:
    """A copied config that still trains under another's name would overwrite its results."""
    module = importlib.import_module(f"configs.{name}")
    assert _resolve(name).name == name
    commands = re.findall(r"configs/(\w+)\.py", module.__doc__ or "")
    assert not commands or commands[0] == name


def test_bccd_fits_its_batches(shared_data: Path) -> None:
    """No image has more cells than instance slots, and every name in the files is asked for."""
    config = _resolve("bccd")
    folder = shared_data / "bccd"
    (source,) = config.data.train.values()
    asked = set(getattr(source, "names", ()))
    counts, found = [], set()
    for file in sorted((folder / "Annotations").glob("*.xml")):
        names = [entry.text for entry in ElementTree.parse(file).iterfind("object/name")]
        counts.append(len(names))
        found |= set(names)
    assert 0 < max(counts) <= config.data.max_instances
    assert found == asked
    for entry in (*config.data.train.values(), *config.data.eval.values()):
        assert (folder / getattr(entry, "split_list", "absent")).is_file()


DISTILLATION: dict[str, dict[str, Any]] = {
    # arXiv 2310.01403, sections 3.2 and 4.1, and the published code.
    "clipself_b16": {
        "task": "distill",
        "batch_size": 16,
        "checkpoint.image_size": 1024,
        "distill.clipself.weight": 1.0,
        "distill.regions.max_regions": 20,
        "optimizer.learning_rate": 1e-5,
        "optimizer.weight_decay": 0.1,
        "schedule.warmup_steps": 1000,
        "model.image.last_block": "values",
    },
    # arXiv 2412.06244, section 4.2, and the published code.
    "densevlm_b16": {
        "task": "distill",
        "batch_size": 64,
        "checkpoint.image_size": 512,
        "distill.densevlm.weight": 1.0,
        "distill.densevlm.threshold": 0.3,
        "distill.densevlm.temperature": 0.01,
        "distill.regions.grids": "densevlm",
        "distill.regions.max_regions": 36,
        "optimizer.learning_rate": 1e-5,
    },
    # arXiv 2203.10593, sections 3.2 to 3.4 and 4.2.
    "hierkd_b16": {
        "task": "detection",
        "distill.hierkd_instance.weight": 1.0,
        "distill.hierkd_instance.norm": "l1",
        "distill.hierkd_instance.min_iou": 0.5,
        "distill.hierkd_global.weight": 1.0,
        "distill.hierkd_global.grid_side": 3,
        "loss.negative_share": 0.1,
    },
    # arXiv 2303.09252, sections 3.3 and 4.1.
    "gridclip_b16": {
        "task": "detection",
        "distill.gridclip_grid.weight": 1.0,
        "distill.gridclip_image.weight": 10.0,
    },
    "clipself_shapes": {"task": "distill"},
    "densevlm_shapes": {"task": "distill"},
    "distill_shapes": {
        "task": "detection",
        "distill.gridclip_image.weight": 10.0,
        "checkpoint.class_head_from_projection": True,
    },
}


@pytest.mark.parametrize("name", DISTILLATION)
def test_distillation_configs_train_what_they_say(name: str) -> None:
    config = _resolve(name)
    own = DISTILLATION[name]
    assert {key: _at(config, key) for key in own} == own
    shapes = jax.eval_shape(lambda: train_step.init_state(config, teacher_dim=16)).params
    groups = jax.tree_util.tree_leaves_with_path(optim.groups(shapes, config.optimizer))
    moving = {path_rules.path_name(path) for path, group in groups if group != "frozen"}
    assert moving
    if config.task == "distill":
        assert all(name.startswith("image/") for name in moving)
    else:
        assert any(name.startswith("class_head/") for name in moving)
    if name in ("clipself_b16", "densevlm_b16"):  # the papers train the blocks alone
        assert all(name.startswith("image/transformer/blocks/") for name in moving)
    assert len(set(densevlm_b16.THINGS)) == 80 and len(set(densevlm_b16.STUFF)) == 53
