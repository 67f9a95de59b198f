"""Training that starts from converted towers or another detector, by one config."""

import dataclasses
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines import image_ops
from data_pipelines.shapes_world import ShapesWorld
from owl_det.checkpoints import run_file
from owl_det.checkpoints.adapt import adapt
from owl_det.checkpoints.inherited_model import take_model
from owl_det.checkpoints.load import load_model, save_model
from owl_det.config import Config, config_file
from owl_det.config.resolve import resolve
from owl_det.errors import CheckpointError, ConfigError
from owl_det.evaluation import comparison
from owl_det.inference.predictor import Predictor
from owl_det.modeling import build
from owl_det.modeling.owl import OwlDetector
from owl_det.modeling.towers import TOWERS
from owl_det.training import loop
from owl_det.types import LoadedModel
from tests import tiny

HEADS = {"merge_norm", "class_head", "box_head", "objectness_head"}


def _towers(seed: int = 3, **changes: Any) -> LoadedModel:
    """Towers as a converter makes them: 16 px, 10 text positions, contrastive parameters."""
    settings = {
        "model__image_size": 16,
        "model__contrastive": "softmax",
        "model__text__num_positions": 10,
        "model__activation": "gelu",
    }
    config = tiny.config(**(settings | changes))
    shapes = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), shapes)
    return LoadedModel(
        kind="towers",
        params={name: value for name, value in params.items() if name in TOWERS},
        config=config.model,
        preprocess=dataclasses.replace(config.preprocess, resize="bicubic", mean=(0.4, 0.4, 0.4)),
        eval_prompts="none",
        step=0,
    )


SIGLIP = {
    "model__contrastive": "sigmoid",
    "model__embedding_dim": 32,
    "model__image__pooling": "map",
    "model__image__pre_norm": False,
    "model__image__patch_bias": True,
    "model__image__projection": "none",
    "model__text__is_causal": False,
    "model__text__pooling": "last",
    "model__text__projection_bias": True,
}


@pytest.fixture(scope="module")
def towers() -> LoadedModel:
    return _towers()


@pytest.fixture(scope="module")
def saved(towers: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("towers") / "clip"
    save_model(path, towers, origin={"format": "test", "source": "test"})
    return path


def _finetune(init_from: Path, **changes: Any) -> Config:
    """A config that leaves the architecture to the checkpoint, but for what `changes` set."""
    noise = {"droplayer_rate": 0.0}
    return tiny.config(
        model={"image": {**noise}, "text": {**noise, "num_positions": 8}},
        checkpoint__init_from=str(init_from),
        checkpoint__model_from_init=True,
        **changes,
    )


# --- the model -----------------------------------------------------------------------------------


def test_the_architecture_comes_from_the_checkpoint(saved: Path, tmp_path: Path) -> None:
    config = _finetune(
        saved,
        model__image__droplayer_rate=0.25,
        model__remat="dots",
        checkpoint__image_size=32,
    )
    taken = take_model(config, tmp_path)
    assert taken.model.image.width == 32 and taken.model.activation == "gelu"
    assert taken.model.image_size == 32
    assert taken.preprocess.resize == "bicubic" and taken.preprocess.mean == (0.4, 0.4, 0.4)
    assert taken.model.contrastive == "none"
    assert (taken.model.image.droplayer_rate, taken.model.remat) == (0.25, "dots")
    assert taken.model.text.num_positions == 8, "the authors' choice for towers of 77 positions"
    kept = dataclasses.replace(
        taken, model=config.model, preprocess=config.preprocess, data=config.data
    )
    assert kept == config, "nothing else changes"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__image__width": 384},
            r"config.model.image.width: 384 would .* the 32 of the check",
        ),
        ({"model__activation": "gelu_tanh"}, "config.model.activation: 'gelu_tanh' would have no"),
        ({"model__image_size": 64}, "model.image_size: 64 .*; set config.checkpoint.image_size"),
    ],
)
def test_a_key_of_the_model_that_would_be_dropped_is_named(
    changes: dict[str, Any], message: str, saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        take_model(_finetune(saved, **changes), tmp_path)


def test_keys_of_the_model_that_are_the_checkpoints_may_stand_in_the_config(
    saved: Path, tmp_path: Path
) -> None:
    config = _finetune(saved, model__image__num_heads=2, model__activation="gelu")
    assert take_model(config, tmp_path).model == take_model(_finetune(saved), tmp_path).model
    larger = _finetune(saved, model__image_size=64, checkpoint__image_size=32)
    assert take_model(larger, tmp_path).model.image_size == 32
    head = _finetune(saved, model__head_activation="gelu", model__has_objectness_head=False)
    assert take_model(head, tmp_path).model.head_activation == "gelu", "towers have no heads"


@pytest.mark.parametrize("name", ["clipself_shapes", "densevlm_shapes", "distill_shapes"])
def test_shipped_configs_describe_the_towers_they_start_from(name: str, tmp_path: Path) -> None:
    """… that `teacher_shapes` (another image size) and `pretrain_shapes` train."""
    for start in ("teacher_shapes", "pretrain_shapes"):
        folder = tmp_path / start
        _write_run_file(folder, config_file.read(start))
        size = config_file.read(name).model.image_size
        changes = [
            f"--config.checkpoint.init_from={folder}",
            f"--config.checkpoint.image_size={size}",
        ]
        taken = take_model(config_file.read(name, changes), tmp_path / "none")
        assert taken.model.image_size == size


def _write_run_file(folder: Path, config: Config) -> None:
    """A checkpoint without its parameters: what it says of itself."""
    (folder / "params").mkdir(parents=True)
    (folder / "run").mkdir()
    (folder / "run" / "metadata").write_text(json.dumps(run_file.of_training(config, 1, "input")))


def test_without_model_from_init_the_config_stays(tmp_path: Path) -> None:
    config = tiny.config()
    assert take_model(config, tmp_path) is config


def test_model_from_init_needs_a_checkpoint(tmp_path: Path) -> None:
    config = tiny.config(checkpoint__model_from_init=True)
    with pytest.raises(ConfigError, match=r"config\.checkpoint\.init_from"):
        take_model(config, tmp_path)


def test_an_image_size_that_does_not_fit_is_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="image_size.*patch size 8"):
        take_model(_finetune(saved, checkpoint__image_size=30), tmp_path)


def test_a_detector_starts_from_towers(
    saved: Path, towers: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = take_model(_finetune(saved, checkpoint__image_size=32), tmp_path)
    loaded = load_model(saved)
    with caplog.at_level("INFO"):
        params = adapt(loaded, config)
    assert set(params) == {"image", "text"} | HEADS
    assert "freshly initialised: box_head, class_head, merge_norm, objectness_head" in caplog.text
    theirs = towers.params
    jax.tree.map(
        np.testing.assert_array_equal,
        params["image"]["transformer"],
        theirs["image"]["transformer"],
    )
    np.testing.assert_array_equal(
        params["text"]["position_embedding"], theirs["text"]["position_embedding"][:8]
    )
    made = lambda: build.init_params(config, jax.random.key(config.seed))  # noqa: E731
    fresh = jax.jit(lambda: {name: made()[name] for name in HEADS})()
    for name in HEADS:
        jax.tree.map(np.testing.assert_array_equal, params[name], fresh[name])
    positions = np.asarray(params["image"]["position_embedding"])
    assert positions.shape == (17, 32)
    old = np.asarray(theirs["image"]["position_embedding"])
    np.testing.assert_array_equal(positions[0], old[0])
    # Corners of a 2 × 2 grid, stretched to 4 × 4 with half-pixel centres, stay where they are.
    np.testing.assert_allclose(positions[1:].reshape(4, 4, 32)[0, 0], old[1], atol=1e-6)
    np.testing.assert_allclose(positions[1:].reshape(4, 4, 32)[3, 3], old[4], atol=1e-6)


def test_towers_that_lack_a_parameter_are_refused(
    towers: LoadedModel, saved: Path, tmp_path: Path
) -> None:
    config = take_model(_finetune(saved), tmp_path)
    image = {key: x for key, x in towers.params["image"].items() if key != "norm_post"}
    broken = dataclasses.replace(towers, params={**towers.params, "image": image})
    with pytest.raises(CheckpointError, match="lacks image/norm_post"):
        adapt(broken, config)


def test_a_silent_difference_is_refused(towers: LoadedModel, saved: Path) -> None:
    """The activation shows in no shape."""
    config = tiny.config(checkpoint__init_from=str(saved))
    with pytest.raises(CheckpointError, match="model.activation is 'gelu' there"):
        adapt(towers, config)


def test_a_text_tower_that_pools_at_the_last_position_is_not_cut(tmp_path: Path) -> None:
    siglip = _towers(**SIGLIP)
    save_model(tmp_path / "siglip", siglip)
    config = take_model(_finetune(tmp_path / "siglip"), tmp_path)
    assert config.model.text.num_positions == 10
    text = dataclasses.replace(config.model.text, num_positions=8)
    cut = dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))
    with pytest.raises(CheckpointError, match="position_embedding"):
        adapt(siglip, cut)


@pytest.mark.slow
def test_a_detector_with_attention_pooling_learns(tmp_path: Path) -> None:
    """No class token, no merging; every parameter of the detector gets a gradient."""
    siglip = _towers(**SIGLIP)
    save_model(tmp_path / "siglip", siglip)
    config = take_model(_finetune(tmp_path / "siglip"), tmp_path)
    params = adapt(siglip, config)
    assert set(params) == {"image", "text"} | HEADS - {"merge_norm"}
    detector = build.make_detector(config)
    image = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)), jnp.uint8)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 90, (2, 3, 10)))

    def loss_fn(params: Any) -> jax.Array:
        found = detector.apply({"params": params}, image, tokens, jnp.ones((2, 3), bool))
        parts = (found.boxes, found.class_logits, found.objectness_logits)
        return sum(jnp.square(x - 0.3).mean() for x in parts)

    loss, gradients = jax.jit(jax.value_and_grad(loss_fn))(params)
    assert np.isfinite(loss)
    silent = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
        if not np.abs(leaf).max() > 0
    ]
    assert not silent


LIT = SIGLIP | {"model__embedding_dim": 16, "model__image__projection": "affine"}


@pytest.mark.parametrize("bias", ["zeros", "projection"])
def test_the_class_head_may_start_from_the_visual_projection(bias: str, tmp_path: Path) -> None:
    towers = _towers() if bias == "zeros" else _towers(**LIT)
    save_model(tmp_path / "towers", towers)
    config = _finetune(tmp_path / "towers", checkpoint__class_head_from_projection=True)
    config = take_model(config, tmp_path / "new")
    params = adapt(towers, config)
    projection = towers.params["image"]["visual_projection"]
    embedding = params["class_head"]["embedding"]
    np.testing.assert_array_equal(embedding["kernel"], projection["kernel"])
    np.testing.assert_array_equal(embedding["bias"], projection.get("bias", np.zeros(16)))
    assert ("bias" in projection) == (bias == "projection")
    assert "visual_projection" not in params["image"]
    off = dataclasses.replace(config.checkpoint, class_head_from_projection=False)
    fresh = adapt(towers, dataclasses.replace(config, checkpoint=off))
    assert np.abs(fresh["class_head"]["embedding"]["kernel"] - projection["kernel"]).max() > 0.01
    del params["class_head"]["embedding"], fresh["class_head"]["embedding"]
    jax.tree.map(np.testing.assert_array_equal, params, fresh)


def test_without_a_class_token_class_embeddings_start_as_the_dense_ones(tmp_path: Path) -> None:
    towers = _towers(**LIT)
    save_model(tmp_path / "lit", towers)
    config = _finetune(tmp_path / "lit", checkpoint__class_head_from_projection=True)
    config = take_model(config, tmp_path / "new")
    image = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3)), jnp.uint8)
    contrastive, detector = (
        OwlDetector(towers.config, towers.preprocess),
        build.make_detector(config),
    )
    dense, ours = jax.jit(
        lambda theirs, params: (
            contrastive.apply({"params": theirs}, image, method="embed_patches"),
            detector.apply(
                {"params": params},
                image,
                method=lambda m, x: m.embed_tokens(m.encode_image(x)).class_embeddings,
            ),
        )
    )(towers.params, adapt(towers, config))
    length = np.linalg.norm(dense, axis=-1, keepdims=True)
    np.testing.assert_allclose(ours, dense / length, atol=1e-5)


def test_a_class_head_needs_towers_with_a_projection(tmp_path: Path) -> None:
    siglip = _towers(**SIGLIP)
    save_model(tmp_path / "siglip", siglip)
    config = _finetune(tmp_path / "siglip", checkpoint__class_head_from_projection=True)
    config = take_model(config, tmp_path / "new")
    with pytest.raises(CheckpointError, match="siglip.*have no visual projection; unset config"):
        adapt(siglip, config)
    detector = dataclasses.replace(siglip, kind="detector")
    with pytest.raises(CheckpointError, match="a detector has a class head of its own"):
        adapt(detector, config)
    with pytest.raises(ConfigError, match="class_head_from_projection: needs towers in config"):
        tiny.config(checkpoint__class_head_from_projection=True)


def test_a_student_starts_from_a_detector_of_another_size(
    saved: Path, towers: LoadedModel, tmp_path: Path
) -> None:
    """Self-training from the annotator: all parameters are its own, positions are resized."""
    config = take_model(_finetune(saved), tmp_path / "annotator")
    annotator = dataclasses.replace(
        towers,
        kind="detector",
        params=adapt(towers, config),
        config=config.model,
        preprocess=config.preprocess,
    )
    save_model(tmp_path / "annotator", annotator)
    student = _finetune(tmp_path / "annotator", checkpoint__image_size=32)
    student = take_model(student, tmp_path / "student")
    params = adapt(load_model(tmp_path / "annotator"), student)
    assert params["image"]["position_embedding"].shape == (17, 32)
    first = annotator.params["image"]["position_embedding"][0]
    np.testing.assert_array_equal(params["image"]["position_embedding"][0], first)
    for tree in (params, annotator.params):
        tree["image"] = {k: x for k, x in tree["image"].items() if k != "position_embedding"}
    jax.tree.map(np.testing.assert_array_equal, params, annotator.params)


def test_a_student_gets_the_objectness_head_that_its_annotator_lacks(
    saved: Path, towers: LoadedModel, tmp_path: Path
) -> None:
    """OWL-ViT has none, OWLv2 has: it starts anew where `checkpoint.fresh` names it."""
    plain = {"model__has_objectness_head": False, "loss__objectness_weight": 0.0}
    config = take_model(_finetune(saved, **plain), tmp_path / "annotator")
    params = adapt(towers, config)
    assert "objectness_head" not in params
    annotator = dataclasses.replace(
        towers, kind="detector", params=params, config=config.model, preprocess=config.preprocess
    )
    save_model(tmp_path / "annotator", annotator)
    fresh = ("^objectness_head/",)
    student = _finetune(tmp_path / "annotator", checkpoint__fresh=fresh)
    student = take_model(student, tmp_path / "student")
    assert student.model.has_objectness_head
    found = adapt(load_model(tmp_path / "annotator"), student)
    assert jax.tree.leaves(found.pop("objectness_head"))
    jax.tree.map(np.testing.assert_array_equal, found, annotator.params)


def test_tokens_of_a_detector_without_class_token_are_the_towers() -> None:
    siglip = _towers(**SIGLIP)
    detector = OwlDetector(siglip.config, siglip.preprocess)
    image = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3)), jnp.uint8)
    features, tokens = jax.jit(
        lambda p: (
            detector.apply({"params": p}, image, method="encode_image").tokens,
            detector.apply({"params": p}, image, method=lambda m, x: m.image(x)[1].tokens),
        )
    )(siglip.params)
    np.testing.assert_array_equal(features, tokens)


# --- the tokeniser -------------------------------------------------------------------------------


def test_the_tokeniser_travels_with_the_checkpoint(towers: LoadedModel, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    model = dataclasses.replace(towers, tokenizer=str(file))
    save_model(tmp_path / "one", model)
    copy = tmp_path / "one" / "tokenizer" / "tokenizer.json"
    assert copy.read_text() == "{}"
    taken = take_model(_finetune(tmp_path / "one"), tmp_path / "new")
    assert taken.data.tokenizer == str(copy)
    copy.write_text("[]")
    with pytest.raises(CheckpointError, match="not the tokeniser of this checkpoint"):
        load_model(tmp_path / "one")
    copy.unlink()
    with pytest.raises(CheckpointError, match="tokenizer.json is not there"):
        load_model(tmp_path / "one")


def test_a_run_file_cannot_name_another_file(towers: LoadedModel, tmp_path: Path) -> None:
    save_model(tmp_path / "one", towers)
    file = tmp_path / "one" / "run" / "metadata"
    run = json.loads(file.read_text())
    file.write_text(json.dumps(run | {"tokenizer": {"file": "../../etc/passwd", "sha256": ""}}))
    with pytest.raises(CheckpointError, match="is no known file"):
        load_model(tmp_path / "one")


# --- one run -------------------------------------------------------------------------------------


def _write_coco(root: Path) -> None:
    """Sixteen images of shapes world, and their boxes, as train.json and val.json."""
    world = ShapesWorld(split="train", image_size=32, num_images=16)
    ids = {category.name: category.id for category in world.categories}
    images, annotations = [], []
    (root / "images").mkdir(parents=True)
    for i in range(len(world)):
        record = world[i]
        image_ops.decode_image(record.image).save(root / "images" / f"{i}.png")
        images.append({"id": i + 1, "file_name": f"{i}.png", "height": 32, "width": 32})
        for (x0, y0, x1, y1), names in zip(record.boxes_xyxy.tolist(), record.names, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": ids[names[0]],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
            )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
    }
    for name in ("train", "val"):
        (root / f"{name}.json").write_text(json.dumps(content))


def _sentencepiece(folder: Path) -> Path:
    library = pytest.importorskip("sentencepiece", reason="needs the extra siglip")
    names = [category.name for category in ShapesWorld(split="train").categories]
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(names * 20),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return folder / "spiece.model"


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_config_fine_tunes_from_any_checkpoint(family: str, tmp_path: Path) -> None:
    """configs/finetune.py, made small: runs, compares before and after, goes on, predicts."""
    towers = _towers()
    if family == "siglip":
        towers = _towers(
            **SIGLIP, model__text__tokenizer="siglip", model__text__vocabulary_size=100
        )
        towers = dataclasses.replace(towers, tokenizer=str(_sentencepiece(tmp_path)))
    save_model(tmp_path / "towers", towers)
    _write_coco(tmp_path / "data")
    tree: Any = importlib.import_module("configs.finetune").get_config().to_dict()
    tree["data"] |= {
        "path": str(tmp_path / "data"),
        "max_instances": 6,
        "max_queries": 10,
        "max_distinct_queries": 16,
        "min_queries": 0,
        "eval_prompts": "none",
        "num_workers": 1,
    }
    tree["data"]["augment"]["crop_probability"] = 0.0
    tree["checkpoint"] |= {"init_from": str(tmp_path / "towers"), "every_steps": 100}
    tree["model"]["text"]["num_positions"] = 8
    tree["optimizer"] |= {"learning_rate": 1e-3, "clip": {"scope": "global"}}
    tree["schedule"]["warmup_steps"] = 0
    tree |= {"batch_size": 8, "num_steps": 2}
    workdir = tmp_path / "w"
    config = take_model(resolve(tree), workdir)
    assert config.model.image.width == 32 and config.model.text.tokenizer == family
    loop.run(config, str(workdir))
    before = json.loads((workdir / "eval" / "before.json").read_text())["val"]
    after = json.loads((workdir / "eval" / "summary.json").read_text())
    rows = json.loads((workdir / "eval" / "before_after.json").read_text())
    assert before["step"] == 0 and after["step"] == 2
    assert before["num_instances"] == after["num_instances"] > 0
    (row,) = (row for row in rows if row["metric"] == "AP50")
    assert (row["before"], row["after"]) == (before["AP50"], after["AP50"])
    # The model of a run that goes on is its own, tokeniser and all: the start may be gone.
    tree["checkpoint"]["init_from"] = str(tmp_path / "gone")
    shutil.rmtree(tmp_path / "towers")
    again = take_model(resolve(tree), workdir)
    assert again.model == config.model
    found = Predictor.load(workdir).detect(
        [tmp_path / "data" / "images" / "0.png"], ["red circle", "zebra"], threshold=0.0, top_k=5
    )
    assert len(found[0]) == 5


def test_the_comparison_has_a_row_for_each_metric_of_both() -> None:
    before = {"val": {"step": 0, "AP": 0.1, "AP50": 0.25, "num_images": 4, "seconds": 1.0}}
    after = {
        "val": {"step": 9, "AP": 0.3, "AP50": 0.2, "AP_new": 0.5, "num_images": 4, "seconds": 2.0},
        "other": {"AP": 0.4},
    }
    rows = comparison.compare(before, after)
    assert [(r["metric"], r["before"], r["after"], r["change"]) for r in rows] == [
        ("AP", 0.1, 0.3, 0.2),
        ("AP50", 0.25, 0.2, -0.05),
    ]
    assert comparison.table(rows)[-1] == "| val | AP50 | 0.250 | 0.200 | -0.050 |"


def test_values_in_the_last_block_may_be_asked_of_any_checkpoint(tmp_path: Path) -> None:
    """… and are kept where the checkpoint has them."""
    for saved, asked, wanted in (
        ("full", "full", "full"),
        ("full", "values", "values"),
        ("values", "full", "values"),
    ):
        folder = tmp_path / f"{saved}_{asked}"
        save_model(folder, _towers(model__image__last_block=saved))
        config = _finetune(folder, model__image__last_block=asked)
        taken = take_model(config, tmp_path / "none")
        assert taken.model.image.last_block == wanted
