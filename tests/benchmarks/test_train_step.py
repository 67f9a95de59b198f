"""The benchmark of the training step: its arithmetic and its command."""

import dataclasses
import importlib
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import train_step as benchmark
from owl_det.assigners.hungarian import match
from owl_det.config import SelectionConfig
from owl_det.config.resolve import resolve
from owl_det.training import flops
from owl_det.types import Targets


@pytest.mark.parametrize("variant", benchmark.VARIANTS)
def test_formula_agrees_with_xla(variant: str) -> None:
    config = benchmark.make_config("tiny", variant)
    formula = flops.flops_per_image(config, flops.texts_per_image(config))
    assert flops.xla_flops_per_image(config) == pytest.approx(formula, rel=0.1)


def test_formula_of_contrastive_mosaics_agrees_with_xla() -> None:
    tree = importlib.import_module("configs.pretrain_shapes").get_config().to_dict()
    config = resolve({**tree, "batch_size": 8})
    formula = flops.flops_per_image(config, flops.texts_per_image(config))
    assert flops.xla_flops_per_image(config) == pytest.approx(formula, rel=0.1)


def test_xla_counts_a_loop_body_once() -> None:
    """Why the layers are unrolled for the count."""
    config = benchmark.make_config("tiny", "dense", batch_size=4)
    rolled = dataclasses.replace(config, model=dataclasses.replace(config.model, scan_unroll=1))
    assert flops.xla_flops(rolled) < 0.5 * flops.xla_flops(flops.countable(config))


def test_formula_agrees_with_the_paper() -> None:
    """CLIP L/14 at 840 px: 11,945 GFLOPs an example, 5,358 with dropping and selection.

    arXiv 2306.09683, section 3.2. The paper names neither the number of queries nor what it counts,
    so a tenth is as near as a formula can be held to it.
    """
    config = resolve(importlib.import_module("configs.owlvit_l14").get_config().to_dict())
    dropped = SelectionConfig(token_drop_rate=0.5, instance_top_k=512)
    for selection, published in ((SelectionConfig(), 11_945e9), (dropped, 5_358e9)):
        case = dataclasses.replace(config, selection=selection)
        ours = flops.flops_per_image(case, texts_per_image=config.data.max_queries)
        assert ours == pytest.approx(published, rel=0.1)


def test_formula_of_one_layer_by_hand() -> None:
    """One layer, widths 4, two patches a side, no text: counted product by product."""
    base = benchmark.make_config("tiny", "dense")
    tower = dataclasses.replace(
        base.model.image, patch_size=2, width=4, num_layers=1, num_heads=1, mlp_width=8
    )
    model = dataclasses.replace(base.model, image=tower, image_size=4, embedding_dim=3)
    data = dataclasses.replace(base.data, max_queries=6)
    config = dataclasses.replace(base, model=model, data=data)
    n, d, f, e, q = 5, 4, 8, 3, 6
    products = [(4, 12, d), (n, d, 3 * d), (n, d, n), (n, n, d), (n, d, d), (n, d, f), (n, f, d)]
    heads = [(4, d, d)] * 4 + [(4, d, 1), (4, d, 4), (4, d, e), (4, d, 2), (4, e, q)]
    found = flops.forward_flops(config, texts_per_image=0.0)
    assert found["image_tower"] == sum(2 * math.prod(p) for p in products)
    assert found["heads"] == sum(2 * math.prod(p) for p in heads)
    assert found["text_tower"] == 0


@pytest.mark.parametrize(
    ("model", "name"), [("tiny", "quickstart"), ("b16", "owlv2_b16"), ("l14", "owlv2_l14")]
)
def test_models_are_those_of_the_configs(model: str, name: str) -> None:
    shipped = resolve(importlib.import_module(f"configs.{name}").get_config().to_dict())
    ours = benchmark.make_config(model, "dropped", dtype=shipped.model.dtype)
    assert ours.model == shipped.model
    # The quickstart itself keeps all tokens.
    assert ours.selection == shipped.selection or model == "tiny"
    assert ours.data.max_instances == shipped.data.max_instances
    assert ours.data.max_queries == shipped.data.max_queries
    assert ours.optimizer.kind == shipped.optimizer.kind
    assert ours.optimizer.clip == shipped.optimizer.clip


def test_clipping_can_be_chosen() -> None:
    config = benchmark.make_config("tiny", "dense", clip_scope="exact", clip_microbatch=4)
    assert (config.optimizer.clip.scope, config.optimizer.clip.microbatch) == ("exact", 4)
    kept = benchmark.make_config("tiny", "dense")
    assert kept.optimizer.clip == benchmark.TINY.optimizer.clip


def test_xla_counts_attention_of_many_tokens() -> None:
    """Attention in chunks is a loop, whose body XLA counts once: the count leaves it out."""
    config = benchmark.make_config("tiny", "dense", batch_size=4, image_size=128)
    tower = dataclasses.replace(config.model.image, num_layers=1)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, image=tower))
    formula = flops.flops_per_image(config, flops.texts_per_image(config))
    assert flops.xla_flops_per_image(config) == pytest.approx(formula, rel=0.1)


def test_batch_is_one_that_training_could_meet() -> None:
    config = benchmark.make_config("tiny", "dense", batch_size=2)
    batch = benchmark.synthetic_batch(config)
    rows = np.asarray(batch.query_table)
    assert (rows.argmax(-1) == rows.shape[1] - 1).all()
    for index in np.asarray(batch.query_index):
        assert len(set(index)) == config.data.max_queries
    has_label = np.asarray(batch.instance_labels).any(-1)
    assert (has_label == np.asarray(batch.is_instance)).all() and has_label.any()
    corners = np.asarray(batch.boxes)
    assert (corners[..., :2] >= corners[..., 2:] / 2 - 1e-6).all()
    assert (corners[..., :2] + corners[..., 2:] / 2 <= 1 + 1e-6).all()


def test_predictions_are_clustered() -> None:
    """Several tokens lie on each matched instance, so that the solver has ties to break."""
    config = benchmark.make_config("tiny", "dense", batch_size=2)
    batch = benchmark.synthetic_batch(config)
    predictions = benchmark.clustered_predictions(config, batch)
    targets = Targets(
        boxes=batch.boxes,
        is_instance=batch.is_instance,
        is_crowd=batch.is_crowd,
        labels=batch.instance_labels,
        is_query=batch.is_query,
    )
    assignment = jax.jit(lambda p, t: match(p, t, config.loss))(predictions, targets)
    assert (np.asarray(assignment.is_matched) == np.asarray(batch.is_instance)).all()
    distance = np.abs(
        np.asarray(predictions.boxes)[:, :, None] - np.asarray(batch.boxes)[:, None]
    ).max(-1)
    near = (distance < 0.1).sum(1)
    assert (near[np.asarray(batch.is_instance)] > 1).mean() > 0.5


@pytest.mark.nightly
def test_command_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    flags = ["--steps", "2", "--batch_size", "2", "--variants", "dropped", "--out", str(out)]
    assert benchmark.main(flags) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text())
    assert found["machine"]["platform"] == jax.default_backend()
    dropped = found["variants"]["dropped"]
    config = benchmark.make_config("tiny", "dropped", batch_size=2)
    assert dropped["flops_per_image"] == flops.flops_per_image(config, texts_per_image=24)
    # XLA also counts the optimiser, which two images share here.
    assert 1 < dropped["xla_over_formula"] < 1.2
    median = dropped["step_seconds"]["median"]
    assert dropped["cpu_seconds"]["min"] > 0
    assert dropped["step_seconds"]["min"] <= median <= dropped["step_seconds"]["max"]
    assert dropped["images_per_second"] == pytest.approx(2 / median)
    matching = dropped["matching_seconds"]["median"]
    assert matching > 0
    assert dropped["matching_share"] == pytest.approx(matching / median)
    # At the least the token embedding is held (it is frozen, and has no moments).
    assert dropped["memory_bytes"]["step_total"] > 4 * 49408 * 64
    assert dropped["memory_bytes"]["process_peak"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image_size", "63"], "config.model.image_size"),
        (["--batch_size", "0"], "config.batch_size"),
        (["--variants", "dense,thin"], "--variants: thin"),
        (["--steps", "0"], "--steps"),
        (["--clip_microbatch", "0"], "config.optimizer.clip.microbatch"),
    ],
)
def test_bad_arguments_are_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
