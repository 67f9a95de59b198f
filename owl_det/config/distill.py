"""Distillation: the regions, the branches and their teachers.

A branch is on where its weight is not 0; any of them go together. See docs/distillation.md.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from owl_det.config.checks import positive, require


@dataclass(frozen=True, kw_only=True)
class RegionsConfig:
    """The regions that CLIPSelf and DenseVLM teach: one set of each image, for both."""

    # patches: the cells of a random grid over the image, and the tiles of a mosaic; proposals: the
    # boxes of the data source.
    kind: Literal["patches", "proposals"] = "patches"
    # Which grids (arXiv 2310.01403 and 2412.06244, as their code draws them): 24 of up to 6 x 6
    # cells, or 17 of at least 2 rows. "whole", a control: the one cell of a 1 x 1 grid.
    grids: Literal["clipself", "densevlm", "whole"] = "clipself"
    max_regions: int = 20  # of one image; a random choice where there are more
    crop_scale: float = 1.0  # the teacher's crops are so much larger; 1.5 for proposals

    def check(self, where: str) -> None:
        """Raises `ConfigError` for a value out of range."""
        positive(self, where, "max_regions", "crop_scale")


@dataclass(frozen=True, kw_only=True)
class GridClipGridConfig:
    """GridCLIP, grid level: every token against the queries (arXiv 2303.09252)."""

    weight: float = 0.0  # 1 in the paper
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0


@dataclass(frozen=True, kw_only=True)
class GridClipImageConfig:
    """GridCLIP, image level: pooled tokens, through an adapter, against the image's embedding."""

    weight: float = 0.0  # 10 in the paper


@dataclass(frozen=True, kw_only=True)
class ClipSelfConfig:
    """CLIPSelf: pooled tokens of a region against its crop's embedding (arXiv 2310.01403)."""

    weight: float = 0.0  # 1 in the paper


@dataclass(frozen=True, kw_only=True)
class DenseVlmConfig:
    """DenseVLM: names that a frozen model retrieves for regions (arXiv 2412.06244)."""

    weight: float = 0.0  # 1 in the paper
    things: tuple[str, ...] = ()
    stuff: tuple[str, ...] = ()
    template: str = "a photo of a {}."  # of every name, for teacher and student
    threshold: float = 0.3  # regions whose best name is not more probable are left out
    temperature: float = 0.01
    # What a region is held against: see losses/densevlm.py.
    contrast: Literal["decoupled", "all", "separate"] = "decoupled"

    def check(self, where: str) -> None:
        """Raises `ConfigError` for names and numbers that the branch cannot work with."""
        if self.weight <= 0:
            return
        names = (*self.things, *self.stuff)
        require(len(names) > 1, f"{where}.things, .stuff: give at least two names")
        require(len(set(names)) == len(names), f"{where}: a name stands twice in things and stuff")
        require(self.template.count("{}") == 1, f"{where}.template: needs one {{}} for the name")
        require(0 <= self.threshold <= 1, f"{where}.threshold: must be in [0, 1]")
        positive(self, where, "temperature")
        require(
            self.contrast == "all" or bool(self.things and self.stuff),
            f"{where}.contrast: {self.contrast} needs both things and stuff",
        )


@dataclass(frozen=True, kw_only=True)
class HierKdInstanceConfig:
    """HierKD, instance level: matched tokens against crops of objects (arXiv 2203.10593)."""

    weight: float = 0.0  # 1 in the paper
    norm: Literal["l1", "l2"] = "l1"
    boxes: Literal["truth", "predicted"] = "truth"  # what is cropped; only "truth" can be cached
    min_iou: float = 0.5  # of a matched token's box with the true one
    crop_scale: float = 1.0  # 1.5 shows more of the surroundings (table 2 of the paper)
    max_crops: int = 20  # of one image, chosen at random; every slot costs a pass of the teacher

    def check(self, where: str) -> None:
        """Raises `ConfigError` for a value out of range."""
        require(
            self.max_crops > 0 and self.crop_scale > 0,
            f"{where}: max_crops and crop_scale must be positive",
        )


@dataclass(frozen=True, kw_only=True)
class HierKdGlobalConfig:
    """HierKD, global level: cells of the image against its caption, over the global batch."""

    weight: float = 0.0  # 1 in the paper
    grid_side: int = 3
    pooling: Literal["max", "mean"] = "max"
    objective: Literal["contrastive", "positive"] = "contrastive"

    def check(self, where: str) -> None:
        """Raises `ConfigError` for a value out of range."""
        require(self.grid_side > 0, f"{where}.grid_side: positive")


@dataclass(frozen=True, kw_only=True)
class CustomBranchConfig:
    """A branch of your own: an importable module that defines `BRANCH` (docs/add_a_branch.md)."""

    module: str = ""
    weight: float = 0.0
    options: dict[str, float] = field(default_factory=dict)

    def check(self, where: str) -> None:
        """Raises `ConfigError` if no module is named."""
        require(bool(self.module), f"{where}.module: name a module that defines BRANCH")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation from frozen models."""

    teacher: str = ""  # checkpoint of towers or a ResNet: image and text vectors of the targets
    dense_teacher: str = ""  # towers whose tokens DenseVLM asks for names; empty = `teacher`
    dense_image_size: int = 0  # of the dense teacher's input, pixels; 0 = model.image_size
    # Of the dense teacher; see model.image.last_block. Where tokens are pooled by their mean,
    # "full" is what they were trained with.
    dense_last_block: Literal["full", "values"] = "values"
    cache: str = ""  # folder of `owl-det cache-teacher`: training runs no teacher
    # Branches that set tokens beside the teacher's vectors need a text tower that starts as the
    # teacher's; False = you know better.
    require_same_text: bool = True
    # Control: every image, or mosaic, gets what the teacher says of another one of the batch.
    shuffle_targets: bool = False
    regions: RegionsConfig = field(default_factory=RegionsConfig)
    gridclip_grid: GridClipGridConfig = field(default_factory=GridClipGridConfig)
    gridclip_image: GridClipImageConfig = field(default_factory=GridClipImageConfig)
    clipself: ClipSelfConfig = field(default_factory=ClipSelfConfig)
    densevlm: DenseVlmConfig = field(default_factory=DenseVlmConfig)
    hierkd_instance: HierKdInstanceConfig = field(default_factory=HierKdInstanceConfig)
    hierkd_global: HierKdGlobalConfig = field(default_factory=HierKdGlobalConfig)
    custom: dict[str, CustomBranchConfig] = field(default_factory=dict)

    def branches(self) -> dict[str, Any]:
        """The entry of every branch, by name."""
        named = {key.name: getattr(self, key.name) for key in dataclasses.fields(self)}
        known = {name: entry for name, entry in named.items() if hasattr(entry, "weight")}
        return {**known, **self.custom}

    def active(self) -> dict[str, Any]:
        """The entries whose weight is not 0."""
        return {name: entry for name, entry in self.branches().items() if entry.weight != 0}

    def check(self, where: str) -> None:
        """Raises `ConfigError` for a negative weight or size, or two branches of one name."""
        for name, entry in self.branches().items():
            require(entry.weight >= 0, f"{where}.{name}.weight: must not be negative")
        for name in self.custom:
            key = f"{where}.custom.{name}"
            require(not hasattr(self, name), f"{key}: there is a branch of that name already")
        require(self.dense_image_size >= 0, f"{where}.dense_image_size: not negative")
