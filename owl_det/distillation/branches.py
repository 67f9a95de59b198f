"""The distillation branches by name, and their weighted sum."""

import dataclasses
import importlib
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from owl_det.config import Config, DistillConfig
from owl_det.distillation import clipself, densevlm, gridclip, hierkd
from owl_det.distillation.branch import Branch, BranchInputs
from owl_det.errors import ConfigError
from owl_det.types import Params

# What branches ask for (`Branch.needs`), by the checkpoint that answers.
OF_TEACHER = frozenset({"tiles", "regions", "instances", "captions", "embed_boxes"})
OF_DENSE_TEACHER = frozenset({"dense_regions", "names"})
NEEDS = OF_TEACHER | OF_DENSE_TEACHER

# By the name of their entry in `config.distill`. Others come in by `config.distill.custom`.
BRANCHES: dict[str, Branch] = {
    "gridclip_grid": gridclip.GRID_BRANCH,
    "gridclip_image": gridclip.IMAGE_BRANCH,
    "clipself": clipself.BRANCH,
    "densevlm": densevlm.BRANCH,
    "hierkd_instance": hierkd.INSTANCE_BRANCH,
    "hierkd_global": hierkd.GLOBAL_BRANCH,
}


def active(distill: DistillConfig) -> dict[str, tuple[Branch, Any]]:
    """The branches whose weight is not 0, with their entries.

    Raises `ConfigError` if a module of `custom` cannot be imported or defines no `BRANCH`.
    """
    return {
        name: (BRANCHES[name] if name in BRANCHES else _import(name, entry.module), entry)
        for name, entry in distill.active().items()
    }


def needs(distill: DistillConfig) -> frozenset[str]:
    """What the active branches need of teachers."""
    return frozenset(n for branch, entry in active(distill).values() for n in branch.needed(entry))


def couple_examples(distill: DistillConfig) -> bool:
    """Whether an active branch compares the examples of a batch with each other."""
    return any(branch.couples(entry) for branch, entry in active(distill).values())


def providing(distill: DistillConfig, field: str) -> tuple[Branch, Any] | None:
    """The branch, with its entry, that declares `name_texts` or `instances`; active ones first.

    One that is switched off can still provide what a branch of one's own reads.
    """
    ours = [(branch, getattr(distill, name)) for name, branch in BRANCHES.items()]
    found = [
        (branch, entry)
        for branch, entry in [*active(distill).values(), *ours]
        if getattr(branch, field) is not None
    ]
    return found[0] if found else None


def for_cache(distill: DistillConfig) -> DistillConfig:
    """The entries that a cache of the teacher's vectors is made with (`Branch.cached`)."""
    changed = {
        name: branch.cached(getattr(distill, name))
        for name, branch in BRANCHES.items()
        if branch.cached is not None
    }
    return dataclasses.replace(distill, **changed)


def name_texts(distill: DistillConfig) -> list[str]:
    """The texts that "names" are, in the order of the scores for them; [] if no branch has any."""
    provider = providing(distill, "name_texts")
    if provider is None:
        return []
    branch, entry = provider
    assert branch.name_texts is not None
    return list(branch.name_texts(entry))


def check(config: Config) -> None:
    """Raises `ConfigError` if an active branch cannot run under the other keys of the config.

    The schema checks an entry's own keys, `config.resolve` what every distillation asks; the rest
    is asked here, before any data is read.
    """
    for name, (branch, entry) in active(config.distill).items():
        _check_branch(name, branch, entry, config)
        if branch.check is not None:
            branch.check(entry, config)


def _check_branch(name: str, branch: Branch, entry: Any, config: Config) -> None:
    """What a branch's declaration asks for."""
    wanted = set(branch.needed(entry))
    if unknown := wanted - NEEDS:
        raise ConfigError(
            f"config.distill.{name}: needs {sorted(unknown)[0]!r}; known are "
            f"{', '.join(sorted(NEEDS))}"
        )
    if "captions" in wanted and not config.data.with_captions:
        raise ConfigError(f"config.data.with_captions: distill.{name} needs captions")
    if wanted & {"names", "dense_regions"} and not name_texts(config.distill):
        raise ConfigError(f"config.distill.densevlm: distill.{name} needs its things or stuff")
    if branch.needs_heads and not config.has_heads:
        raise ConfigError(f"config.distill.{name}: needs a detector's heads (task detection)")
    if branch.couples(entry) and config.optimizer.clip.is_per_example:
        raise ConfigError(
            f"config.optimizer.clip.scope: distill.{name} couples the examples of a batch: "
            f"none or global, not {config.optimizer.clip.scope}"
        )


def init(distill: DistillConfig, key: Key[Array, ""], student_dim: int, teacher_dim: int) -> Params:
    """Parameters of the branches that have any, by branch. None of them is part of a detector.

    `teacher_dim` is 0 if no branch needs the image or text vectors of `distill.teacher`.
    """
    made: Params = {}
    # A branch's start does not depend on which others are on.
    for name, (branch, entry) in active(distill).items():
        if branch.init is not None:
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            made[name] = branch.init(entry, own, student_dim, teacher_dim)
    return made


def distill_losses(
    distill: DistillConfig, params: Params, inputs: BranchInputs
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """Weighted sum of the active branches, and the unweighted value of each, `distill/<name>`."""
    total, parts = jnp.zeros(inputs.tile_boxes.shape[0]), {}
    for name, (branch, entry) in active(distill).items():
        value = branch.loss(entry, params.get(name, {}), inputs).astype(jnp.float32)
        total = total + entry.weight * value
        parts[f"distill/{name}"] = value
    return total, parts


def _import(name: str, module: str) -> Branch:
    try:
        branch = importlib.import_module(module).BRANCH
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"config.distill.custom.{name}.module: {error}") from None
    if not isinstance(branch, Branch):
        raise ConfigError(f"config.distill.custom.{name}.module: BRANCH of {module} is no Branch")
    return branch
