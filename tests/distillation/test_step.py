"""Distillation in a training step: what branches read, where gradients go, what inference holds."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import quickstart
from data_pipelines.input import TrainInput
from owl_det import path_rules, sharding
from owl_det.checkpoints.load import load_detector, load_model, save_model
from owl_det.checkpoints.store import Checkpoints
from owl_det.config import Config, HierKdInstanceConfig, MeshConfig
from owl_det.config.resolve import resolve
from owl_det.distillation import branch, branches, hierkd, select, step_inputs, teachers
from owl_det.distillation.branch import BranchInputs
from owl_det.errors import CheckpointError, ConfigError
from owl_det.inference import ranking
from owl_det.modeling import build
from owl_det.modeling.owl import OwlDetector
from owl_det.training import loop, objectives, train_step
from owl_det.types import FeatureLevel, Features, Targets
from tests import tiny, tiny_distillation


@pytest.fixture(scope="module")
def documented_branch(repository_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The entry of the branch that docs/add_a_branch.md writes, importable."""
    page = (repository_root / "docs" / "add_a_branch.md").read_text()
    (code, entry) = re.findall(r"```python\n(.*?)```", page, re.S)
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_branch.py").write_text(code)
    sys.path.insert(0, str(folder))
    made: Any = quickstart.get_config()
    exec(entry, {"config": made})
    assert resolve(made.to_dict()).distill.teacher == "TOWERS"
    yield made.distill.custom.my_branch.to_dict()
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def all_at_once(teacher_folder: str, documented_branch: Any) -> tuple[Config, Any, Any, Any]:
    """One step's gradients with every branch on: config, teaching, gradients, metrics."""
    custom = {"custom": {"my_branch": documented_branch}}
    made, teaching = tiny_distillation.open_teaching(
        tiny_distillation.config(*tiny_distillation.WEIGHTS, distill=custom), teacher_folder
    )
    return made, teaching, *tiny_distillation.take(made, teaching)


@pytest.mark.nightly
def test_the_loss_is_the_weighted_sum_of_all_branches(all_at_once: Any) -> None:
    made, _, gradients, metrics = all_at_once
    total = sum(float(metrics[name]) for name in ("class", "l1", "giou", "objectness"))
    assert set(made.distill.active()) == {*tiny_distillation.WEIGHTS, "my_branch"}
    for name, entry in made.distill.active().items():
        value = float(metrics[f"distill/{name}"])
        assert np.isfinite(value) and value > 0, name
        total += entry.weight * value
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


@pytest.mark.nightly
def test_branch_parameters_learn_and_teachers_are_no_parameters(all_at_once: Any) -> None:
    _, teaching, gradients, _ = all_at_once
    added = gradients[build.BRANCHES]
    assert set(added) == {"gridclip_grid", "gridclip_image", "hierkd_global", "my_branch"}
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(added))
    names = {
        path_rules.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(gradients)
    }
    assert not any("visual_projection" in name for name in names)
    assert set(teaching.arrays) == {"image", "dense_positions", "names"}


@pytest.mark.nightly
@pytest.mark.parametrize("scope", ["shared_text", "none", "exact"])
def test_predicted_boxes_are_cropped_inside_the_loss(scope: str, teacher_folder: str) -> None:
    """The one branch that runs a teacher there has a step under every clipping scope."""
    entry = {
        **tiny_distillation.WEIGHTS["hierkd_instance"],
        "boxes": "predicted",
        "crop_scale": 1.5,
    }
    made, teaching = tiny_distillation.open_teaching(
        tiny_distillation.config(
            distill={"hierkd_instance": entry}, optimizer__clip={"scope": scope}
        ),
        teacher_folder,
    )
    params = jax.eval_shape(
        lambda: train_step.init_state(made, teacher_dim=teaching.teacher_dim)
    ).params
    assert teaching.embed_boxes is not None
    gradients, metrics = jax.eval_shape(
        lambda p, b: train_step.loss_and_gradients(
            p, b, tiny_distillation.KEY, config=made, num_data_shards=1, teachers=teaching
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
    inputs = BranchInputs(
        **own,
        is_example=jnp.ones(3, bool),
        caption_tokens=jnp.asarray(captions),
        is_caption=jnp.asarray(is_caption),
        signals={
            "tiles": jnp.asarray(tiles),
            "regions": jnp.asarray(regions),
            "instances": jnp.asarray(instances),
        },
    )
    shuffled = step_inputs.shuffle_targets(inputs, batch)  # pyright: ignore[reportArgumentType]
    before = [2, 0, 1]
    np.testing.assert_array_equal(shuffled.signals["tiles"], tiles[before])
    # Image 0 has one region, so image 1 sees it twice; image 2 has none: its first row is a filler.
    np.testing.assert_array_equal(
        shuffled.signals["regions"], regions[before][rows, [[0] * 2, [0] * 2, [0, 1]]]
    )
    # One object in images 1 and 2, three in image 0 of which two were chosen.
    np.testing.assert_array_equal(
        shuffled.signals["instances"], instances[before][rows, [[0] * 2, [0, 1], [0] * 2]]
    )
    np.testing.assert_array_equal(shuffled.caption_tokens, captions[before])
    np.testing.assert_array_equal(shuffled.is_caption, is_caption[before])
    assert "captions" not in shuffled.signals
    for name, array in own.items():
        np.testing.assert_array_equal(getattr(shuffled, name), array)


# --- what inference and checkpoints hold ---------------------------------------------------------


@pytest.mark.parametrize("last_block", ["full", pytest.param("values", marks=pytest.mark.nightly)])
def test_inference_is_the_plain_detectors(last_block: str, teacher_folder: str) -> None:
    block = {"model__image__last_block": last_block}
    distilled, teaching = tiny_distillation.open_teaching(
        tiny_distillation.config(*tiny_distillation.WEIGHTS, **block), teacher_folder
    )
    state = jax.eval_shape(
        lambda: train_step.init_state(distilled, teacher_dim=teaching.teacher_dim)
    )
    assert build.BRANCHES in state.params
    plain = tiny_distillation.config(**block)
    wanted = jax.eval_shape(lambda: train_step.init_state(plain)).params
    ours = build.model_params(state.params)
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    image = jnp.zeros((1, 32, 32, 3), jnp.uint8)

    def program(made: Config, params: Any) -> str:
        detector = OwlDetector(made.model, made.preprocess)
        return str(jax.make_jaxpr(lambda p: ranking.embed_image_tokens(detector, p, image))(params))

    assert program(distilled, ours) == program(plain, wanted)


@pytest.mark.slow
def test_checkpoints_keep_branch_parameters_out_of_the_model(
    teacher_folder: str, tmp_path: Path
) -> None:
    made, teaching = tiny_distillation.open_teaching(
        tiny_distillation.config("gridclip_image", "clipself"), teacher_folder
    )
    state = train_step.init_state(made, teacher_dim=teaching.teacher_dim)
    checkpoints = Checkpoints(tmp_path, made)
    checkpoints.save(dataclasses.replace(state, step=jnp.asarray(3, jnp.int32)), "v")
    checkpoints.wait()
    loaded = load_detector(tmp_path)
    assert set(loaded.params) == set(build.model_params(state.params))
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
            "hierkd_global couples the examples of a batch: none or global, not shared_text",
        ),
        (["hierkd_global"], {"data__with_captions": False}, "hierkd_global needs captions"),
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
        branches.check(tiny_distillation.config(*names, **changes))


# --- whole steps ---------------------------------------------------------------------------------


@pytest.mark.nightly
def test_all_branches_train_on_eight_devices(teacher_folder: str) -> None:
    """With mosaics, token dropping, instance selection and few negatives besides."""
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    made = tiny_distillation.config(
        *tiny_distillation.WEIGHTS,
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
    batches = TrainInput(made).batches(0, num_data_shards=4)
    for _ in range(50):
        batch = jax.device_put(tiny.to_batch(next(batches)), sharding.batch_sharding(mesh))
        state, metrics = step(state, batch)
        for name in tiny_distillation.WEIGHTS:
            assert np.isfinite(metrics[f"distill/{name}"]), name
        assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["gradient_norm"])
    batches.close()
    assert int(state.step) == 50


@pytest.mark.nightly
@pytest.mark.parametrize("names", [("clipself", "densevlm"), ("hierkd_global",)])
def test_two_data_shards_take_the_gradients_of_one_device(
    names: tuple[str, ...], teacher_folder: str
) -> None:
    """Of branches that look at an image by itself, and of the one that compares the batch."""
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    entry = {**tiny_distillation.WEIGHTS["hierkd_instance"], "boxes": "predicted"}
    distill = {"teacher": teacher_folder, "hierkd_instance": entry}
    made = tiny_distillation.config(*names, distill=distill, optimizer__clip={"scope": "global"})
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2])
    teaching = teachers.open_teachers(made, mesh)
    _, held = tiny_distillation.open_teaching(made, teacher_folder)
    assert teaching is not None
    params = train_step.init_state(made, teacher_dim=teaching.teacher_dim).params
    placed = jax.device_put(params, sharding.parameter_shardings(params, mesh))
    batch = tiny.batch(made, num_shards=2)
    split = jax.device_put(batch, sharding.batch_sharding(mesh))

    def run(params: Any, batch: Any, teaching: Any, mesh: Any) -> Any:
        return jax.jit(
            lambda p, b, t: train_step.loss_and_gradients(
                p, b, tiny_distillation.KEY, config=made, num_data_shards=2, mesh=mesh, teachers=t
            )
        )(params, batch, teaching)

    ours, metrics = run(placed, split, teaching, mesh)
    theirs, wanted = run(params, batch, held, None)
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.nightly
def test_a_run_resumes_with_its_branches_and_leaves_a_plain_checkpoint(
    teacher_folder: str, tmp_path: Path
) -> None:
    """Through the loop: teachers opened, towers as the start, branch parameters saved and found."""
    made = tiny_distillation.config(
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
    loop.run(made, str(tmp_path))
    measured = json.loads((tmp_path / "eval" / "summary.json").read_text())["datasets"]["shapes"]
    assert measured["step"] == 1 and any("region" in key for key in measured)
    first = load_model(tmp_path)
    assert (first.kind, first.step) == ("towers", 1)
    loop.run(dataclasses.replace(made, num_steps=2), str(tmp_path))
    second = load_model(tmp_path)
    assert second.step == 2 and set(second.params) == {"image", "text", "logit_scale"}
    other = tmp_path / "other"
    changed = jax.tree.map(lambda x: x * 1.5, second.params)
    save_model(other, dataclasses.replace(second, params=changed))
    of_other = dataclasses.replace(made.distill, teacher=str(other))
    with pytest.raises(CheckpointError, match="with other teachers"):
        loop.run(dataclasses.replace(made, num_steps=3, distill=of_other), str(tmp_path))
    teacher = load_model(teacher_folder)
    for name, is_moved in (("image", True), ("text", False)):
        pairs = zip(*(jax.tree.leaves(m.params[name]) for m in (teacher, second)), strict=True)
        assert any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs) == is_moved
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"train/distill/gridclip_image", "train/distill/clipself"} <= set().union(*logged)


@pytest.mark.nightly
@pytest.mark.parametrize("scope", ["shared_text", "exact"])
def test_per_example_clipping_with_a_large_limit_is_the_plain_mean(
    scope: str, teacher_folder: str
) -> None:
    names = [name for name in tiny_distillation.WEIGHTS if name != "hierkd_global"]
    made = []
    for clip in ({"scope": scope, "norm": 1e6}, {"scope": "none"}):
        each, teaching = tiny_distillation.open_teaching(
            tiny_distillation.config(*names, batch_size=2, optimizer__clip=clip), teacher_folder
        )
        made.append(tiny_distillation.take(each, teaching))
    (ours, metrics), (theirs, wanted) = made
    np.testing.assert_allclose(metrics["loss"], wanted["loss"], rtol=1e-4)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.nightly
def test_towers_learn_from_themselves_and_the_teacher_does_not(teacher_folder: str) -> None:
    towers = load_model(teacher_folder)
    made, teaching = tiny_distillation.open_teaching(
        tiny_distillation.config(
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
        examples, text_key = objectives.split_batch(batch, tiny_distillation.KEY)
        examples = examples._replace(branch_inputs=step_inputs.of_batch(batch, held))
        read = step_inputs.of_step(params, held, made)
        context = objectives.context_of(made, batch, text_key, teachers=read)
        return objectives.tower_losses(params, batch, examples, context)[0].mean()

    of_student, of_teacher = jax.jit(jax.grad(loss, argnums=(0, 1)))(state.params, teaching.arrays)
    for path, leaf in jax.tree_util.tree_leaves_with_path(of_teacher):
        assert not np.asarray(leaf).any(), path_rules.path_name(path)
    assert np.abs(of_student["image"]["patch_kernel"]).max() > 0
    assert not np.asarray(of_student["text"]["projection"]["kernel"]).any()


@pytest.mark.nightly
def test_no_gradient_of_a_detectors_loss_reaches_its_teachers(teacher_folder: str) -> None:
    """Of all branches, with crops of predicted boxes too; and those boxes learn nothing from it."""
    entry = {**tiny_distillation.WEIGHTS["hierkd_instance"], "boxes": "predicted"}
    found = []
    for names in (tuple(tiny_distillation.WEIGHTS), ("hierkd_instance",), ()):
        distill = {"hierkd_instance": entry} if names else {}
        made, teaching = tiny_distillation.open_teaching(
            tiny_distillation.config(*names, distill=distill), teacher_folder
        )
        found.append((made, teaching))
    made, teaching = found[0]
    params = train_step.init_state(made, teacher_dim=teaching.teacher_dim).params
    batch = tiny.batch(made)

    @jax.jit
    @jax.grad
    def of_teacher(arrays: Any) -> Any:
        held = dataclasses.replace(teaching, arrays=arrays)
        _, metrics = train_step.loss_and_gradients(
            params, batch, tiny_distillation.KEY, config=made, num_data_shards=1, teachers=held
        )
        return metrics["loss"]

    for path, leaf in jax.tree_util.tree_leaves_with_path(of_teacher(teaching.arrays)):
        assert not np.asarray(leaf).any(), path_rules.path_name(path)

    taught, plain = (tiny_distillation.take(*each)[0] for each in found[1:])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        taught["box_head"],
        plain["box_head"],
    )
    moved = np.abs(taught["image"]["patch_kernel"] - plain["image"]["patch_kernel"])
    assert moved.max() > 1e-5


def _inputs(**fields: Any) -> BranchInputs:
    given: dict[str, Any] = {field.name: None for field in dataclasses.fields(BranchInputs)}
    return BranchInputs(**(given | fields))


def test_centres_are_those_of_the_grid() -> None:
    index = jnp.array([[0, 4, 5, 14, 7]])
    level = FeatureLevel(tokens=jnp.zeros((1, 5, 2)), token_index=index, grid=(3, 5), stride=1)
    centres = _inputs(features=Features(levels=(level,))).centres
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
    inputs = _inputs(
        signals={"instances": jnp.asarray(wanted)},
        targets=targets,
        instance_tokens=jnp.asarray(tokens),
        instance_boxes=jnp.asarray(predicted),
        is_matched=jnp.array([[True, True, False, True]]),
    )
    entry = HierKdInstanceConfig(weight=1.0, max_crops=4)
    found = hierkd.INSTANCE_BRANCH.loss(entry, {}, inputs)
    counted = [np.abs(tokens[0, i] - wanted[0, i]).sum() for i in (0, 3)]
    np.testing.assert_allclose(found, [np.mean(counted)], rtol=1e-5)


def test_every_object_is_chosen_alike() -> None:
    """Of twelve in random places; fillers only where there are no more."""
    rng = np.random.default_rng(0)
    counts = np.zeros(12)
    for _ in range(100):
        boxes = jnp.asarray(rng.random((1, 16, 4)), jnp.float32)
        chosen = np.asarray(select.choose_instances(boxes, jnp.arange(16)[None] < 12, 3))[0]
        assert len(set(chosen)) == 3
        counts[chosen] += 1
    assert counts.min() > 10 and counts.max() < 45
    assert np.array_equal(
        select.choose_instances(boxes, jnp.arange(16)[None] < 2, 99)[0], range(16)
    )
    all_of_two = select.choose_instances(boxes, jnp.arange(16)[None] < 2, 5)
    assert set(np.asarray(all_of_two)[0, :2]) == {0, 1}


@pytest.mark.parametrize(
    ("needs", "changes", "message"),
    [
        (("tile",), {}, "mine: needs 'tile'; known are captions,"),
        (("captions",), {"data__with_captions": False}, "config.data.with_captions: distill"),
        (("names",), {}, "config.distill.densevlm: distill.mine needs its things or stuff"),
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
    made = tiny_distillation.config(distill=entry, **changes)
    with pytest.raises(ConfigError, match=message):
        branches.check(made)
