"""Weight-space ensembles of a self-trained and a fine-tuned detector (WiSE-FT).

θ = (1 − w) θ_self-trained + w θ_fine-tuned: fine-tuning gains on what it was tuned for and loses in
the open world; between the two weights lie models that keep most of both (arXiv 2306.09683,
section 4.6, where w = 0.4 is best for L/14 on ODinW; Wortsman et al., arXiv 2109.01903).
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from owl_det import sharding
from owl_det.checkpoints.adapt import adapt
from owl_det.checkpoints.load import load_detector, load_model, save_model
from owl_det.config import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
)
from owl_det.config.roles import keys_of
from owl_det.errors import CheckpointError, ConfigError, DataError
from owl_det.modeling.build import detector_of
from owl_det.modeling.towers import without_contrastive
from owl_det.types import LoadedModel

BATCH_SIZE = 32  # of evaluation

# Keys of the model that change what is trained or how fast, but not what the parameters mean.
_FREE = {*keys_of(ModelConfig, "training", "execution")} - {"contrastive"}  # has parameters


def interpolate(self_trained: LoadedModel, fine_tuned: LoadedModel, weight: float) -> LoadedModel:
    """(1 − weight) of the first and `weight` of the second, in float32.

    All that is no parameter comes from the fine-tuned model. Raises `CheckpointError` unless both
    are one architecture with one preprocessing, `ConfigError` for a weight outside [0, 1].
    """
    if not 0 <= weight <= 1:
        raise ConfigError(f"--weight: {weight}, but must be in [0, 1]")
    check_same_architecture(self_trained, fine_tuned)

    def mix(a: jax.Array, b: jax.Array) -> jax.Array:
        mixed = (1 - weight) * a.astype(jnp.float32) + weight * b.astype(jnp.float32)
        return mixed.astype(b.dtype)

    params = jax.tree.map(mix, self_trained.params, fine_tuned.params)
    return dataclasses.replace(fine_tuned, params=params)


def check_same_architecture(a: LoadedModel, b: LoadedModel) -> None:
    """Raises `CheckpointError` naming the first key in which the two models differ.

    Loading has compared the parameters with these keys already.
    """
    ours, theirs = (
        _leaves(dataclasses.asdict(x.config), "model")
        | _leaves(dataclasses.asdict(x.preprocess), "preprocess")
        for x in (a, b)
    )
    for key, value in ours.items():
        if key.removeprefix("model.") not in _FREE and theirs[key] != value:
            raise CheckpointError(
                f"--self_trained and --fine_tuned are not of one architecture: {key} is "
                f"{value!r} in the first and {theirs[key]!r} in the second"
            )


def save(
    self_trained: str | os.PathLike[str],
    fine_tuned: str | os.PathLike[str],
    weight: float,
    out: str | os.PathLike[str],
) -> None:
    """Writes the ensemble of two checkpoints, of detectors or of towers, as a checkpoint.

    Of towers the first may have another image size, as a distillation's teacher has: its positions
    are resized. Raises `CheckpointError` if they do not fit each other or `out` exists.
    """
    if Path(out).exists():
        raise CheckpointError(f"{out}: exists already; name a new folder with --out")
    first, second = (load_model(path) for path in (self_trained, fine_tuned))
    for path, model in ((self_trained, first), (fine_tuned, second)):
        if model.is_resnet:
            raise CheckpointError(f"{path}: a ResNet is a teacher, no part of an ensemble")
    if first.kind != second.kind:
        raise CheckpointError(
            f"{self_trained} is of kind {first.kind}, {fine_tuned} of kind {second.kind}: give two "
            "detectors or two pairs of towers"
        )
    if second.kind == "towers":
        first = _fitted(first, second, str(self_trained))
    else:
        first, second = _with_the_same_parts(first, second)
    save_model(out, interpolate(first, second, weight))


def _fitted(towers: LoadedModel, like: LoadedModel, path: str) -> LoadedModel:
    """The towers with the positions of `like`, whose description they get."""
    config = Config(
        task="contrastive",
        model=like.config,
        preprocess=like.preprocess,
        checkpoint=CheckpointConfig(init_from=path),
    )
    return dataclasses.replace(like, params=adapt(towers, config))


def _with_the_same_parts(a: LoadedModel, b: LoadedModel) -> tuple[LoadedModel, LoadedModel]:
    """Two detectors, neither with contrastive parameters where one of them has none.

    Converted weights have them, and detection training leaves them out.
    """
    if "none" not in (a.config.contrastive, b.config.contrastive):
        return a, b
    bare = []
    for model in (a, b):
        params, dropped = without_contrastive(model.params)
        if dropped:
            logging.warning(
                "%s: in one of the two checkpoints only, and left out", ", ".join(dropped)
            )
        config = dataclasses.replace(model.config, contrastive="none")
        bare.append(dataclasses.replace(model, params=params, config=config))
    return bare[0], bare[1]


def parse_weights(text: str) -> list[float]:
    """`0,0.5,1` → numbers. Raises `ConfigError` if one is none, or out of [0, 1]."""
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--sweep: {text!r} is no list of numbers such as 0,0.2,0.4") from None
    if not all(0 <= weight <= 1 for weight in weights):
        raise ConfigError(f"--sweep: {text!r} holds a weight outside [0, 1]")
    return weights


def sweep(
    self_trained: str | os.PathLike[str],
    fine_tuned: str | os.PathLike[str],
    weights: Sequence[float],
    out: str | os.PathLike[str],
    *,
    in_domain: str,
    out_of_domain: str,
    max_images: int,
) -> list[dict[str, float]]:
    """AP of each weight in and out of domain; writes sweep.json and trade_off.png into `out`.

    The evaluations are texts as for `parse_source`. Raises `UserError` if a checkpoint, a
    source or a group cannot be used.
    """
    from data_pipelines import pseudo_records
    from owl_det.viz import plots

    a, b = _with_the_same_parts(load_detector(self_trained), load_detector(fine_tuned))
    check_same_architecture(a, b)
    domains = {"in_domain": in_domain, "out_of_domain": out_of_domain}
    evaluation = _SweepEvaluation(b, domains, max_images)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    points: list[dict[str, float]] = []
    content = {**domains, "points": points}
    for weight in weights:
        points.append({"weight": weight, **evaluation(interpolate(a, b, weight))})
        logging.info("%s", points[-1])
        pseudo_records.write_json(folder / "sweep.json", content)  # a point may take an hour
    plots.plot_trade_off(
        folder / "trade_off.png",
        [(f"{p['weight']:g}", p["out_of_domain_AP"], p["in_domain_AP"]) for p in points],
        f"AP out of domain: {out_of_domain}",
        f"AP in domain: {in_domain}",
    )
    return points


class _SweepEvaluation:
    """AP of one model after the other on the same evaluations."""

    def __init__(self, model: LoadedModel, evaluations: dict[str, str], max_images: int):
        from data_pipelines.open_source import open_source
        from data_pipelines.source_text import parse_source
        from owl_det.evaluation.evaluate import DetectionEvaluator

        parsed = {
            name: parse_source(text, f"config.data.eval.{name}")
            for name, text in evaluations.items()
        }
        self._mesh = sharding.make_mesh(MeshConfig())
        detector = detector_of(model.config, model.preprocess)
        self._texts = evaluations
        self._groups = {name: group for name, (_, group) in parsed.items()}
        self._evaluate: dict[str, Any] = {}  # by source: both may be groups of one
        self._source: dict[str, str] = {}
        for name, (source, _) in parsed.items():
            key = repr(source)
            self._source[name] = key
            if key not in self._evaluate:
                opened = open_source(source, "")
                self._evaluate[key] = DetectionEvaluator(
                    detector,
                    opened,
                    self._mesh,
                    name,
                    settings=EvaluationConfig(
                        batch_size=BATCH_SIZE, max_images=max_images, num_pictures=0
                    ),
                    eval_prompts=model.eval_prompts,
                    tokenizer_file=model.tokenizer,
                )
            known = {g for c in self._evaluate[key].source.categories for g in c.groups}
            if self._groups[name] and self._groups[name] not in known:
                raise ConfigError(
                    f"{evaluations[name]!r}: no group {self._groups[name]!r} there; "
                    f"it has {', '.join(sorted(known)) or 'none'}"
                )

    def __call__(self, model: LoadedModel) -> dict[str, float]:
        whole = sharding.replicated(self._mesh)
        params = jax.tree.map(lambda x: jax.device_put(np.asarray(x), whole), model.params)
        results = {key: evaluate(params).metrics for key, evaluate in self._evaluate.items()}
        values: dict[str, float] = {}
        for name, key in self._source.items():
            group = self._groups[name]
            if group and group not in results[key].groups:
                raise DataError(
                    f"{self._texts[name]!r}: no object of group {group!r} in the images measured; "
                    "raise --max_images"
                )
            found = results[key].groups[group] if group else results[key]
            values[f"{name}_AP"], values[f"{name}_AP50"] = found.AP, found.AP50
        return values


def _leaves(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Dotted keys of nested mappings."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}"
        leaves.update(_leaves(value, name) if isinstance(value, dict) else {name: value})
    return leaves
