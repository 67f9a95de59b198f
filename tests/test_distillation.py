"""Distillation in a training step: what branches read, where gradients go, what inference holds."""

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors import safe_open

from data_pipelines.input import TrainInput
from data_pipelines.shapes_world import ShapesWorld
from owl_det import (
    cache_teacher,
    checkpoint,
    crops,
    inference,
    optim,
    sharding,
    teachers,
    train,
    train_step,
)
from owl_det import lesson as lesson_lib
from owl_det.config import Config, HierKdInstanceConfig, MeshConfig, ShapesWorldSource
from owl_det.errors import CheckpointError, ConfigError, DataError
from owl_det.losses import branch, branches, hierkd
from owl_det.modeling import resnet
from owl_det.modeling.detector import Detector
from owl_det.resolve import resolve_model
from owl_det.types import LoadedModel, Student, Targets, Teacher, TeacherSignals
from tests import tiny

KEY = jax.random.key(5)
THINGS, STUFF = ("red star", "blue ring", "green cross"), ("grey wall", "noise")

WEIGHTS: dict[str, Any] = {
    "gridclip_grid": {"weight": 1.0},
    "gridclip_image": {"weight": 10.0},
    "clipself": {"weight": 1.0},
    "densevlm": {"weight": 1.0, "things": THINGS, "stuff": STUFF, "threshold": 0.0},
    "hierkd_instance": {"weight": 1.0, "min_iou": 0.0, "max_crops": 3},
    "hierkd_global": {"weight": 1.0},
}


def config(*names: str, **changes: Any) -> Config:
    """A tiny detector with the named branches on (of `WEIGHTS`)."""
    distill = {name: WEIGHTS[name] for name in names}
    distill |= {
        "teacher": "given",
        "require_same_text": False,
        "dense_image_size": 24,
        "regions": {"max_regions": 6},
    }
    distill |= changes.pop("distill", {})
    base: dict[str, Any] = {"batch_size": 4, "data__with_captions": True}
    base |= {"model__image__num_layers": 1, "model__text__num_layers": 1}
    base["optimizer__clip"] = {"scope": "none"}
    return tiny.config(**(base | changes), distill=distill)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tiny towers of their own size, as a checkpoint."""
    return _save_towers(tmp_path_factory.mktemp("teacher") / "towers")


def _save_towers(folder: Path, **changes: Any) -> str:
    made = tiny.config(
        task="contrastive",
        model__contrastive="softmax",
        data__with_captions=True,
        optimizer__clip={"scope": "none"},
        model__image_size=16,
        model__image__num_layers=1,
        model__text__num_layers=1,
        **changes,
    )
    loaded = LoadedModel(
        kind="towers",
        params=tiny.params(made, 9),
        model=made.model,
        preprocess=made.preprocess,
        eval_prompts="none",
        step=0,
    )
    checkpoint.save_model(folder, loaded)
    return str(folder)


def open_teaching(config: Config, folder: str) -> tuple[Config, Any]:
    """The config with the teacher filled in, and its teachers on one device."""
    config = dataclasses.replace(
        config, distill=dataclasses.replace(config.distill, teacher=folder)
    )
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    return config, teachers.open_teachers(config, mesh)


def take(config: Config, teaching: Any, num_shards: int = 1) -> tuple[Any, Any]:
    """Gradients and metrics of the first batch from fresh parameters."""
    dim = teaching.teacher_dim if teaching else 0
    params = train_step.init_state(config, teacher_dim=dim).params

    @jax.jit
    def run(params: Any, batch: Any) -> Any:
        return train_step.loss_and_gradients(
            params, batch, KEY, config=config, num_shards=num_shards, teaching=teaching
        )

    return run(params, tiny.batch(config, num_shards))


@pytest.fixture(scope="module")
def documented_branch(repository_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The entry of the branch that docs/add_a_branch.md writes, importable."""
    page = (repository_root / "docs" / "add_a_branch.md").read_text()
    (code, _) = re.findall(r"```python\n(.*?)```", page, re.S)
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_branch.py").write_text(code)
    sys.path.insert(0, str(folder))
    yield {"module": "my_branch", "weight": 0.5, "options": {"margin": 0.9}}
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def all_at_once(teacher_folder: str, documented_branch: Any) -> tuple[Config, Any, Any, Any]:
    """One step's gradients with every branch on: config, teaching, gradients, metrics."""
    custom = {"custom": {"my_branch": documented_branch}}
    made, teaching = open_teaching(config(*WEIGHTS, distill=custom), teacher_folder)
    return made, teaching, *take(made, teaching)


@pytest.mark.slow
def test_the_loss_is_the_weighted_sum_of_all_branches(all_at_once: Any) -> None:
    made, _, gradients, metrics = all_at_once
    total = sum(float(metrics[name]) for name in ("class", "l1", "giou", "objectness"))
    assert set(made.distill.active()) == {*WEIGHTS, "my_branch"}
    for name, entry in made.distill.active().items():
        value = float(metrics[f"distill/{name}"])
        assert np.isfinite(value) and value > 0, name
        total += entry.weight * value
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


@pytest.mark.slow
def test_branch_parameters_learn_and_teachers_are_no_parameters(all_at_once: Any) -> None:
    _, teaching, gradients, _ = all_at_once
    added = gradients[lesson_lib.BRANCHES]
    assert set(added) == {"gridclip_grid", "gridclip_image", "hierkd_global", "my_branch"}
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(added))
    names = {optim.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(gradients)}
    assert not any("visual_projection" in name for name in names)
    assert set(teaching.arrays) == {"image", "dense_positions", "names"}


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["shared_text", "none", "exact"])
def test_predicted_boxes_are_cropped_inside_the_loss(scope: str, teacher_folder: str) -> None:
    """The one branch that runs a teacher there has a step under every clipping scope."""
    entry = {**WEIGHTS["hierkd_instance"], "boxes": "predicted", "crop_scale": 1.5}
    made, teaching = open_teaching(
        config(distill={"hierkd_instance": entry}, optimizer__clip={"scope": scope}),
        teacher_folder,
    )
    params = jax.eval_shape(
        lambda: train_step.init_state(made, teacher_dim=teaching.teacher_dim)
    ).params
    assert teaching.embed_boxes is not None
    gradients, metrics = jax.eval_shape(
        lambda p, b: train_step.loss_and_gradients(
            p, b, KEY, config=made, num_shards=1, teaching=teaching
        ),
        params,
        tiny.batch(made),
    )
    assert "distill/hierkd_instance" in metrics
    assert jax.tree.structure(gradients) == jax.tree.structure(params)


def test_shuffled_targets_are_another_images() -> None:
    """Of teacher and captions; what the student sees stays."""
    rng = np.random.default_rng(0)
    own = {
        "tile_boxes": rng.random((3, 1, 4)),
        "is_tile": np.ones((3, 1), bool),
        "region_boxes": rng.random((3, 2, 4)),
        "is_region": np.array([[True, False], [True, True], [False, False]]),
    }
    captions, is_caption = rng.integers(9, size=(3, 1, 5)), np.array([[True], [True], [False]])
    rows = np.arange(3)[:, None]
    tiles, regions = (rng.random((3, n, 6)).astype(np.float32) for n in (1, 2))
    is_instance = np.array([[True, True, True], [False, True, False], [False, False, True]])
    batch = SimpleNamespace(is_instance=jnp.asarray(is_instance))
    instances = rng.random((3, 2, 6)).astype(np.float32)
    lesson = lesson_lib.Lesson(
        **own,
        caption_tokens=jnp.asarray(captions),
        is_caption=jnp.asarray(is_caption),
        signals=TeacherSignals(
            tiles=jnp.asarray(tiles),
            regions=jnp.asarray(regions),
            instances=jnp.asarray(instances),
        ),
    )
    shuffled = lesson_lib.of_another_image(lesson, batch)  # pyright: ignore[reportArgumentType]
    before = [2, 0, 1]
    np.testing.assert_array_equal(shuffled.signals.tiles, tiles[before])
    # Image 0 has one region, so image 1 sees it twice; image 2 has none: its first row is a filler.
    np.testing.assert_array_equal(
        shuffled.signals.regions, regions[before][rows, [[0] * 2, [0] * 2, [0, 1]]]
    )
    # One object in images 1 and 2, three in image 0 of which two were chosen.
    np.testing.assert_array_equal(
        shuffled.signals.instances, instances[before][rows, [[0] * 2, [0, 1], [0] * 2]]
    )
    np.testing.assert_array_equal(shuffled.caption_tokens, captions[before])
    np.testing.assert_array_equal(shuffled.is_caption, is_caption[before])
    assert shuffled.signals.captions is None
    for name, array in own.items():
        np.testing.assert_array_equal(getattr(shuffled, name), array)


# --- what inference and checkpoints hold ---------------------------------------------------------


@pytest.mark.parametrize("last_block", ["full", pytest.param("values", marks=pytest.mark.slow)])
def test_inference_is_the_plain_detectors(last_block: str, teacher_folder: str) -> None:
    block = {"model__image__last_block": last_block}
    distilled, teaching = open_teaching(config(*WEIGHTS, **block), teacher_folder)
    state = jax.eval_shape(
        lambda: train_step.init_state(distilled, teacher_dim=teaching.teacher_dim)
    )
    assert lesson_lib.BRANCHES in state.params
    plain = config(**block)
    wanted = jax.eval_shape(lambda: train_step.init_state(plain)).params
    ours = lesson_lib.model_params(state.params)
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    image = jnp.zeros((1, 32, 32, 3), jnp.uint8)

    def program(made: Config, params: Any) -> str:
        detector = Detector(made.model, made.preprocess)
        return str(jax.make_jaxpr(lambda p: inference.embed_tokens(detector, p, image))(params))

    assert program(distilled, ours) == program(plain, wanted)


@pytest.mark.slow
def test_checkpoints_keep_branch_parameters_out_of_the_model(
    teacher_folder: str, tmp_path: Path
) -> None:
    made, teaching = open_teaching(config("gridclip_image", "clipself"), teacher_folder)
    state = train_step.init_state(made, teacher_dim=teaching.teacher_dim)
    checkpoints = checkpoint.Checkpoints(tmp_path, made)
    checkpoints.save(dataclasses.replace(state, step=jnp.asarray(3, jnp.int32)), "v")
    checkpoints.wait()
    loaded = checkpoint.load_detector(tmp_path)
    assert set(loaded.params) == set(lesson_lib.model_params(state.params))
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        ),
        state,
    )
    restored = checkpoints.restore(template, "v")
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, b)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (
            ["hierkd_global"],
            {"optimizer__clip": {"scope": "shared_text"}},
            "hierkd_global contrasts the examples of a batch: none or global, not shared_text",
        ),
        (["hierkd_global"], {"data__with_captions": False}, "set config.data.with_captions"),
        (
            ["clipself"],
            {"distill": {"cache": "folder"}, "data__augment": {"flip": True}},
            "config.distill.cache knows whole images as they are",
        ),
        (
            ["clipself"],
            {"distill": {"densevlm": {"weight": 1.0, "things": ["a", "b"]}}},
            "contrast: decoupled needs both things and stuff",
        ),
        (["clipself"], {"task": "contrastive"}, "set config.task to distill"),
        ([], {"task": "distill", "model__contrastive": "softmax"}, "needs a branch whose weight"),
        (
            ["hierkd_instance"],
            {"task": "distill", "model__contrastive": "softmax"},
            "config.distill.hierkd_instance: needs a detector's heads",
        ),
        ([], {"distill": {"custom": {"mine": {"weight": 1.0}}}}, "name a module that defines"),
        ([], {"loss": {"negative_share": 0.0}}, "config.loss.negative_share"),
        (
            ["hierkd_global"],
            {"data__train": {"boxes": {"kind": "coco"}}},
            "with_captions: no source of config.data.train has captions; of a coco source",
        ),
        (
            ["clipself"],
            {"batch_size": 1, "distill": {"shuffle_targets": True}},
            "shuffle_targets: a batch of one image has no other",
        ),
        (
            [],
            {
                "distill": {
                    "shuffle_targets": True,
                    "hierkd_instance": {"weight": 1.0, "boxes": "predicted"},
                }
            },
            "shuffle_targets: the crops of predicted boxes",
        ),
    ],
)
def test_what_cannot_run_is_refused(names: list[str], changes: Any, message: str) -> None:
    changes = {"model__contrastive": "none", **changes}
    if changes.get("task") == "contrastive":
        changes["model__contrastive"] = "softmax"
    with pytest.raises(ConfigError, match=message):
        config(*names, **changes)


def test_a_teacher_is_asked_for_by_name(teacher_folder: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config.distill.teacher: the active branches need"):
        open_teaching(config("clipself"), "")
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        open_teaching(config("clipself"), str(tmp_path))
    made, teaching = open_teaching(config("clipself"), teacher_folder)
    assert teaching.embed_boxes is None and set(teaching.arrays) == {"image"}


def test_a_text_tower_of_another_checkpoint_is_refused(teacher_folder: str) -> None:
    made, teaching = open_teaching(
        config("gridclip_image", "clipself", distill={"require_same_text": True}), teacher_folder
    )
    towers = checkpoint.load_model(teacher_folder).params
    shorter = {**towers["text"], "position_embedding": towers["text"]["position_embedding"][:4]}
    teachers.check_same_text(teaching, {"text": shorter}, made)
    other = jax.tree.map(lambda x: x + 1, towers)
    with pytest.raises(ConfigError, match="clipself: the student's text tower is not the teacher"):
        teachers.check_same_text(teaching, other, made)
    adapted, teaching = open_teaching(
        config("gridclip_image", distill={"require_same_text": True}), teacher_folder
    )
    teachers.check_same_text(teaching, other, adapted)  # has an adapter: any teacher will do


@pytest.mark.slow
def test_clips_resnet_is_a_teacher_of_images_and_of_tokens(tmp_path: Path) -> None:
    text = {"num_positions": 8, "width": 16, "num_layers": 1, "num_heads": 2, "mlp_width": 16}
    model, preprocess = resolve_model(
        {
            "image_size": 64,
            "embedding_dim": 24,
            "text": text,
            "resnet": {"width": 4, "num_blocks": (1, 1, 1, 1), "num_heads": 2},
        },
        {},
    )
    shapes = resnet.parameter_shapes(model, preprocess)
    rng = np.random.default_rng(0)
    loaded = LoadedModel(
        kind="resnet",
        params=jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes),
        model=model,
        preprocess=preprocess,
        eval_prompts="none",
        step=0,
    )
    checkpoint.save_model(tmp_path / "resnet", loaded)
    made, teaching = open_teaching(
        config("gridclip_image", "densevlm", distill={"dense_image_size": 96}),
        str(tmp_path / "resnet"),
    )
    assert teaching.teacher_dim == 24 and set(teaching.arrays) == {"image", "names"}
    np.testing.assert_allclose(np.linalg.norm(teaching.arrays["names"], axis=-1), 1, rtol=1e-3)
    signals = jax.eval_shape(teaching.signals, teaching.arrays, tiny.batch(made))
    assert signals.tiles.shape == (4, 1, 24) and signals.dense_regions.shape == (4, 6, 24)
    with pytest.raises(ConfigError, match="dense_image_size: 80 is no multiple of the 32 pixels"):
        open_teaching(
            config("densevlm", distill={"dense_image_size": 80}), str(tmp_path / "resnet")
        )


def test_dense_teachers_that_cannot_name_tokens_are_refused(
    teacher_folder: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="25 is no multiple of the dense teacher's patches of 8"):
        open_teaching(config("densevlm", distill={"dense_image_size": 25}), teacher_folder)
    pooled = {"model__image__pooling": "map", "model__image__projection": "none"}
    folder = _save_towers(tmp_path / "siglip", **pooled, model__image__width=16)
    with pytest.raises(ConfigError, match="dense_teacher: .*siglip pools by attention"):
        open_teaching(config("densevlm"), folder)


def test_teachers_are_held_once(teacher_folder: str) -> None:
    """On the mesh, not on the first device too."""
    _, teaching = open_teaching(config("clipself", "densevlm"), teacher_folder)
    for name in ("image", "dense"):
        assert teaching.signals.keywords[name].loaded.params == {}
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in teaching.teacher_ids)


def test_vectors_of_another_width_are_refused(teacher_folder: str) -> None:
    made, teaching = open_teaching(config("clipself"), teacher_folder)
    wider = dataclasses.replace(teaching, teacher_dim=24)
    with pytest.raises(ConfigError, match="config.model.embedding_dim: 16, but distill.clipself"):
        teachers.check_same_text(wider, {}, made)


# --- cached teachers -----------------------------------------------------------------------------


def _cached_config(
    folder: str, cache: Path | None, names: Sequence[str] = tuple(WEIGHTS), **regions: Any
) -> Config:
    distill = {"teacher": folder, "regions": {"max_regions": 6, **regions}}
    distill |= {"cache": str(cache)} if cache else {}
    source = {"kind": "shapes_world", "image_size": 32, "num_images": 6}
    return config(*names, data__train={"shapes": source}, distill=distill)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("patches", ("gridclip_image", "clipself")),
        *(
            pytest.param(kind, tuple(WEIGHTS), marks=pytest.mark.slow)
            for kind in ("patches", "proposals")
        ),
    ],
)
def test_a_cache_says_what_the_teacher_says(
    kind: str, names: tuple[str, ...], teacher_folder: str, tmp_path: Path
) -> None:
    online = _cached_config(teacher_folder, None, names, kind=kind)
    counts = cache_teacher.run(online, tmp_path / "cache", shard_size=4, batch_size=4)
    assert counts == {"images": 6, "unreadable": 0, "shards": 2, "shards_there": 0}
    cached = _cached_config(teacher_folder, tmp_path / "cache", names, kind=kind)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    signals = []
    for made in (online, cached):
        teaching, batch = teachers.open_teachers(made, mesh), tiny.batch(made)
        assert teaching is not None
        signals.append(jax.jit(lambda a, b, t=teaching: t.signals(a, b))(teaching.arrays, batch))
        assert ("image" in teaching.arrays) == (made is online)
    wanted = branches.needs(online.distill) & {f.name for f in dataclasses.fields(TeacherSignals)}
    for field in wanted:
        ours, theirs = (np.asarray(getattr(s, field)) for s in signals)
        is_real = _is_real(field, online)
        assert is_real.any() and ours.shape == theirs.shape, field
        # float16 holds eleven bits.
        np.testing.assert_allclose(ours[is_real], theirs[is_real], atol=1e-3, err_msg=field)


@pytest.mark.slow
def test_a_mosaic_finds_the_vectors_of_its_tiles(teacher_folder: str, tmp_path: Path) -> None:
    """Of each tile its image's, of each object that of its box, whatever the order."""
    names, cache = ("gridclip_image", "hierkd_instance"), tmp_path / "cache"
    made = _cached_config(teacher_folder, None, names)
    cache_teacher.run(made, cache, shard_size=8, batch_size=8)
    mosaics = dataclasses.replace(made.data.augment, mosaic_sizes=(2,), mosaic_probabilities=(1.0,))
    cached = dataclasses.replace(
        made,
        data=dataclasses.replace(made.data, augment=mosaics),
        distill=dataclasses.replace(made.distill, cache=str(cache)),
    )
    batch = jax.tree.map(np.asarray, tiny.batch(cached))
    assert batch.teacher is not None
    with safe_open(cache / "shapes" / "000000.safetensors", "numpy") as file:
        tiles, instances, start = map(file.get_tensor, ("tiles", "instances", "box_start"))
    world = ShapesWorld(image_size=32, num_images=6)
    compared = 0
    for b, t in np.argwhere(batch.tile_image_id >= 0):
        image = int(batch.tile_image_id[b, t])
        np.testing.assert_allclose(batch.teacher["tiles"][b, t], tiles[image], atol=1e-3)
        x, y, w, h = batch.tile_boxes[b, t]
        corners = world[image].boxes_xyxy / 32 * [w, h, w, h] + [x - w / 2, y - h / 2] * 2
        centres = (corners[:, :2] + corners[:, 2:]) / 2
        for slot in np.flatnonzero(batch.is_instance[b]):
            distance = np.abs(centres - batch.boxes[b, slot, :2]).max(-1, initial=0)
            for row in np.flatnonzero(distance < 0.005):
                expected = instances[start[image] + row]
                np.testing.assert_allclose(batch.teacher["instances"][b, slot], expected, atol=1e-3)
                compared += 1
    assert compared >= batch.is_instance.sum() > 4


def _is_real(field: str, made: Config) -> np.ndarray:
    """Which rows of a signal stand for something, by the batch alone."""
    batch = tiny.batch(made)
    chosen = hierkd.some_instances(
        batch.boxes, batch.is_instance, made.distill.hierkd_instance.max_crops
    )
    masks: dict[str, Any] = {
        "tiles": batch.tile_image_id >= 0,
        "instances": hierkd.at(batch.is_instance, chosen),
        "captions": batch.is_caption,
        "regions": batch.is_region,
        "dense_regions": batch.is_region,
    }
    return np.asarray(masks[field])


def test_a_cache_goes_on_where_it_stopped_and_fits_nothing_else(
    teacher_folder: str, tmp_path: Path
) -> None:
    made = _cached_config(teacher_folder, None, ["gridclip_image"])
    folder = tmp_path / "cache"
    cache_teacher.run(made, folder, shard_size=4, batch_size=2, shard_index=1, shard_step=2)
    cached = _cached_config(teacher_folder, folder, ["gridclip_image"])
    with pytest.raises(DataError, match="000000.safetensors: is missing; run the same"):
        TrainInput(cached)
    before = (folder / "shapes" / "000001.safetensors").read_bytes()
    counts = cache_teacher.run(made, folder, shard_size=4, batch_size=2)
    assert counts["shards"] == 1 and counts["shards_there"] == 1
    assert (folder / "shapes" / "000001.safetensors").read_bytes() == before
    TrainInput(cached)
    other = dataclasses.replace(cached, model=dataclasses.replace(cached.model, image_size=16))
    with pytest.raises(DataError, match="was made with another image_size: 32 there, 16 in"):
        TrainInput(other)
    source = dataclasses.replace(cached.data.train["shapes"], num_images=11)
    more = dataclasses.replace(cached.data, train={"shapes": source})
    with pytest.raises(DataError, match="another data set shapes"):
        TrainInput(dataclasses.replace(cached, data=more))
    # Vectors of another checkpoint under the folder's name.
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(
        re.sub('"teacher_id": "[0-9a-f]*"', '"teacher_id": "0000"', manifest, count=1)
    )
    with pytest.raises(DataError, match="vectors of two checkpoints do not mix"):
        TrainInput(cached).example(0)


def test_the_command_reads_configs_and_changes(repository_root: Path, tmp_path: Path) -> None:
    file = str(repository_root / "configs" / "distill_shapes.py")
    made = cache_teacher.read_config(
        file, ["distill.teacher=some/folder", "config.data.train.shapes.num_images=12"]
    )
    assert made.distill.teacher == "some/folder"
    source = made.data.train["shapes"]
    assert isinstance(source, ShapesWorldSource) and source.num_images == 12
    with pytest.raises(ConfigError, match="distill.teachr: no such key; did you mean"):
        cache_teacher.read_config(file, ["distill.teachr=x"])
    with pytest.raises(ConfigError, match="--set: 'seed' is not key=value"):
        cache_teacher.read_config(file, ["seed"])
    with pytest.raises(ConfigError, match="cannot be read"):
        cache_teacher.read_config(str(tmp_path / "absent.py"), [])
    plain = config()
    with pytest.raises(ConfigError, match="no active branch has teacher outputs to cache"):
        cache_teacher.run(plain, tmp_path / "cache")


# --- whole steps ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_branches_train_on_eight_devices(teacher_folder: str) -> None:
    """With mosaics, token dropping, instance selection and few negatives besides."""
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    made = config(
        *WEIGHTS,
        batch_size=8,
        distill={"teacher": teacher_folder},
        optimizer__clip={"scope": "global"},
        optimizer__learning_rate=1e-3,
        selection={"token_drop_rate": 0.5, "instance_top_k": 6},
        loss={"negative_share": 0.1},
        data__augment={"mosaic_sizes": [1, 2], "mosaic_probabilities": [0.5, 0.5]},
    )
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    teaching = teachers.open_teachers(made, mesh)
    assert teaching is not None
    state = train_step.init_state(made, teacher_dim=teaching.teacher_dim)
    placement = sharding.state_shardings(state, state.params, mesh)
    kernel = teaching.arrays["image"]["image"]["transformer"]["blocks"]["mlp_in"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    state = jax.device_put(state, placement)
    step = train_step.jit_train_step(made, mesh, state, teaching)
    batches = TrainInput(made).batches(0, num_shards=4)
    for _ in range(50):
        batch = jax.device_put(tiny.to_batch(next(batches)), sharding.batch_sharding(mesh))
        state, metrics = step(state, batch)
        for name in WEIGHTS:
            assert np.isfinite(metrics[f"distill/{name}"]), name
        assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["gradient_norm"])
    batches.close()
    assert int(state.step) == 50


@pytest.mark.slow
@pytest.mark.parametrize("names", [("clipself", "densevlm"), ("hierkd_global",)])
def test_two_data_shards_take_the_gradients_of_one_device(
    names: tuple[str, ...], teacher_folder: str
) -> None:
    """Of branches that look at an image by itself, and of the one that compares the batch."""
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    entry = {**WEIGHTS["hierkd_instance"], "boxes": "predicted"}
    distill = {"teacher": teacher_folder, "hierkd_instance": entry}
    made = config(*names, distill=distill, optimizer__clip={"scope": "global"})
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2])
    teaching = teachers.open_teachers(made, mesh)
    _, held = open_teaching(made, teacher_folder)
    assert teaching is not None
    params = train_step.init_state(made, teacher_dim=teaching.teacher_dim).params
    placed = jax.device_put(params, sharding.parameter_shardings(params, mesh))
    batch = tiny.batch(made, num_shards=2)
    split = jax.device_put(batch, sharding.batch_sharding(mesh))

    def run(params: Any, batch: Any, teaching: Any, mesh: Any) -> Any:
        return jax.jit(
            lambda p, b, t: train_step.loss_and_gradients(
                p, b, KEY, config=made, num_shards=2, mesh=mesh, teaching=t
            )
        )(params, batch, teaching)

    ours, metrics = run(placed, split, teaching, mesh)
    theirs, wanted = run(params, batch, held, None)
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_run_resumes_with_its_branches_and_leaves_a_plain_checkpoint(
    teacher_folder: str, tmp_path: Path
) -> None:
    """Through the loop: teachers opened, towers as the start, branch parameters saved and found."""
    made = config(
        "gridclip_image",
        "clipself",
        task="distill",
        model__contrastive="softmax",
        model__image_size=16,
        batch_size=8,
        num_steps=1,
        distill={"teacher": teacher_folder, "require_same_text": True},
        checkpoint={"init_from": teacher_folder},
        optimizer__frozen=("^text/", "^logit_scale$"),
        data__eval={
            "shapes": {"kind": "shapes_world", "image_size": 32, "num_images": 8, "split": "test"}
        },
    )
    train.run(made, str(tmp_path))
    measured = json.loads((tmp_path / "eval" / "summary.json").read_text())["datasets"]["shapes"]
    assert measured["step"] == 1 and any("region" in key for key in measured)
    first = checkpoint.load_model(tmp_path)
    assert (first.kind, first.step) == ("towers", 1)
    train.run(dataclasses.replace(made, num_steps=2), str(tmp_path))
    second = checkpoint.load_model(tmp_path)
    assert second.step == 2 and set(second.params) == {"image", "text", "logit_scale"}
    other = tmp_path / "other"
    changed = jax.tree.map(lambda x: x * 1.5, second.params)
    checkpoint.save_model(other, dataclasses.replace(second, params=changed))
    of_other = dataclasses.replace(made.distill, teacher=str(other))
    with pytest.raises(CheckpointError, match="with other teachers"):
        train.run(dataclasses.replace(made, num_steps=3, distill=of_other), str(tmp_path))
    teacher = checkpoint.load_model(teacher_folder)
    for name, is_moved in (("image", True), ("text", False)):
        pairs = zip(*(jax.tree.leaves(m.params[name]) for m in (teacher, second)), strict=True)
        assert any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs) == is_moved
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"train/distill/gridclip_image", "train/distill/clipself"} <= set().union(*logged)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["shared_text", "exact"])
def test_per_example_clipping_with_a_large_limit_is_the_plain_mean(
    scope: str, teacher_folder: str
) -> None:
    names = [name for name in WEIGHTS if name != "hierkd_global"]
    made = []
    for clip in ({"scope": scope, "norm": 1e6}, {"scope": "none"}):
        each, teaching = open_teaching(
            config(*names, batch_size=2, optimizer__clip=clip), teacher_folder
        )
        made.append(take(each, teaching))
    (ours, metrics), (theirs, wanted) = made
    np.testing.assert_allclose(metrics["loss"], wanted["loss"], rtol=1e-4)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_cache_trains_as_its_teacher(teacher_folder: str, tmp_path: Path) -> None:
    online = _cached_config(teacher_folder, None)
    cache_teacher.run(online, tmp_path / "cache", shard_size=16, batch_size=2)
    cached = _cached_config(teacher_folder, tmp_path / "cache")
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    found = [take(made, teachers.open_teachers(made, mesh))[1] for made in (online, cached)]
    for name in ("loss", *(f"distill/{name}" for name in WEIGHTS)):
        np.testing.assert_allclose(found[1][name], found[0][name], rtol=2e-3, err_msg=name)


@pytest.mark.slow
def test_towers_learn_from_themselves_and_the_teacher_does_not(teacher_folder: str) -> None:
    towers = checkpoint.load_model(teacher_folder)
    made, teaching = open_teaching(
        config(
            "clipself",
            "densevlm",
            "gridclip_image",
            task="distill",
            model__contrastive="softmax",
            distill={"require_same_text": True},
            model__image_size=16,
            optimizer__frozen=("^text/", "^logit_scale$"),
        ),
        teacher_folder,
    )
    state = train_step.init_state(made, towers.params, teaching.teacher_dim)
    teachers.check_same_text(teaching, state.params, made)
    batch = tiny.batch(made)

    def loss(params: Any, arrays: Any) -> Any:
        held = dataclasses.replace(teaching, arrays=arrays)
        return train_step.tower_losses(
            params,
            train_step.split_batch(batch, KEY)[0]._replace(
                lesson=lesson_lib.lesson_of(batch, held)
            ),
            made,
            lesson_lib.Shared(held, lesson_lib.student_names(params, held, made)),
        )[0].mean()

    of_student, of_teacher = jax.jit(jax.grad(loss, argnums=(0, 1)))(state.params, teaching.arrays)
    for path, leaf in jax.tree_util.tree_leaves_with_path(of_teacher):
        assert not np.asarray(leaf).any(), optim.path_name(path)
    assert np.abs(of_student["image"]["patch_kernel"]).max() > 0
    assert not np.asarray(of_student["text"]["projection"]["kernel"]).any()


def _student(**fields: Any) -> Student:
    given: dict[str, Any] = {field.name: None for field in dataclasses.fields(Student)}
    return Student(**(given | fields))


def test_centres_are_those_of_the_grid() -> None:
    index = jnp.array([[0, 4, 5, 14, 7]])
    centres = _student(token_index=index, grid=(3, 5)).centres
    wanted = [[0.1, 1 / 6], [0.9, 1 / 6], [0.1, 0.5], [0.9, 5 / 6], [0.5, 0.5]]
    np.testing.assert_allclose(centres[0], wanted, rtol=1e-6)


def test_instances_count_where_the_matched_token_has_their_box() -> None:
    """Of four instances the second is predicted too far off and the third has no token."""
    rng = np.random.default_rng(0)
    tokens, wanted = (rng.normal(size=(1, 4, 8)).astype(np.float32) for _ in range(2))
    tokens, wanted = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (tokens, wanted))
    truth = np.tile(np.array([0.5, 0.5, 0.4, 0.4], np.float32), (1, 4, 1))
    predicted = truth.copy()
    predicted[0, 1, 0] += 0.2  # an IoU of 1/3
    predicted[0, 3, 0] += 0.1  # of 0.6
    targets = Targets(
        boxes=jnp.asarray(truth),
        is_instance=jnp.ones((1, 4), bool),
        is_crowd=jnp.zeros((1, 4), bool),
        labels=jnp.ones((1, 4, 2), bool),
        is_query=jnp.ones((1, 2), bool),
    )
    student = _student(
        targets=targets,
        instance_tokens=jnp.asarray(tokens),
        instance_boxes=jnp.asarray(predicted),
        is_matched=jnp.array([[True, True, False, True]]),
    )
    teacher = Teacher(signals=TeacherSignals(instances=jnp.asarray(wanted)))
    entry = HierKdInstanceConfig(weight=1.0, max_crops=4)
    found = hierkd.INSTANCE_BRANCH.loss(entry, {}, student, teacher)
    counted = [np.abs(tokens[0, i] - wanted[0, i]).sum() for i in (0, 3)]
    np.testing.assert_allclose(found, [np.mean(counted)], rtol=1e-5)


def test_a_mean_pooled_teacher_sees_no_padding(tmp_path: Path) -> None:
    """Tokens of a crop's padding are no part of the mean: a loop over the others."""
    loaded = checkpoint.load_model(_save_towers(tmp_path / "towers", model__image__pooling="mean"))
    tower = teachers.Tower("towers", loaded.model, loaded.preprocess)
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    box = np.array([[0.5, 0.25, 1.0, 0.5]], np.float32)
    found = tower.embed_boxes(loaded.params, jnp.asarray(image), jnp.asarray(box)[:, None])
    pixels = crops.crop_and_resize(
        jnp.asarray(image), jnp.asarray(box), loaded.model.image_size, loaded.preprocess
    )
    _, tokens = tower.module.apply(
        {"params": loaded.params}, pixels, method=lambda m, x: m.image.embed_all(x)
    )
    side = loaded.model.image_size // loaded.model.image.patch_size
    content = np.asarray(tokens).reshape(side, side, -1)[: side // 2].reshape(-1, tokens.shape[-1])
    wanted = content.mean(0) / np.linalg.norm(content.mean(0))
    np.testing.assert_allclose(found[0, 0], wanted, atol=1e-5)


def test_a_cache_of_drawings_of_another_size_is_refused(
    teacher_folder: str, tmp_path: Path
) -> None:
    cache_teacher.run(_cached_config(teacher_folder, None, ["clipself"]), tmp_path / "cache")
    made = _cached_config(teacher_folder, tmp_path / "cache", ["clipself"])
    TrainInput(made)
    ((name, entry),) = made.data.train.items()
    assert isinstance(entry, ShapesWorldSource)
    smaller = dataclasses.replace(entry, image_size=entry.image_size // 2)
    changed = dataclasses.replace(made, data=dataclasses.replace(made.data, train={name: smaller}))
    with pytest.raises(DataError, match="another data set"):
        TrainInput(changed)


def test_every_object_is_chosen_alike() -> None:
    """Of twelve in random places; fillers only where there are no more."""
    rng = np.random.default_rng(0)
    counts = np.zeros(12)
    for _ in range(100):
        boxes = jnp.asarray(rng.random((1, 16, 4)), jnp.float32)
        chosen = np.asarray(hierkd.some_instances(boxes, jnp.arange(16)[None] < 12, 3))[0]
        assert len(set(chosen)) == 3
        counts[chosen] += 1
    assert counts.min() > 10 and counts.max() < 45
    assert np.array_equal(hierkd.some_instances(boxes, jnp.arange(16)[None] < 2, 99)[0], range(16))
    all_of_two = hierkd.some_instances(boxes, jnp.arange(16)[None] < 2, 5)
    assert set(np.asarray(all_of_two)[0, :2]) == {0, 1}


@pytest.mark.parametrize(
    ("needs", "changes", "message"),
    [
        (("tile",), {}, "mine: needs 'tile'; known are captions,"),
        (("captions",), {"data__with_captions": False}, "config.data.with_captions: distill"),
        (("names",), {}, "config.distill.densevlm: distill.mine needs its things"),
    ],
)
def test_what_a_custom_branch_cannot_have_is_named(
    needs: tuple[str, ...],
    changes: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = ModuleType("custom_branch_of_a_test")
    module.BRANCH = branch.Branch(loss=lambda *_: jnp.zeros(1), needs=needs)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    entry = {"custom": {"mine": {"module": module.__name__, "weight": 1.0}}}
    made = config(distill=entry, **changes)
    with pytest.raises(ConfigError, match=message):
        branches.check(made)
