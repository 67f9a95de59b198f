"""The schema of a config: every key and its default.

`configs/*.py` edit a locked `ml_collections.ConfigDict` made from `Config()`; `config.resolve`
checks the result and turns it into these frozen dataclasses, and everything below `main.py` reads
only those. Each section checks its own keys beside them; `between_sections` has the other rules.
Zero means "off" or "no limit" where a key says so, so that every key has one type on the command
line.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from owl_det.config.checks import not_negative, positive
from owl_det.config.data import (
    AugmentConfig,
    CocoSource,
    DataConfig,
    ImageTextSource,
    PseudoBoxesSource,
    ShapesWorldSource,
    SourceConfig,
    TfdsSource,
    VocSource,
    YoloSource,
)
from owl_det.config.distill import (
    ClipSelfConfig,
    CustomBranchConfig,
    DenseVlmConfig,
    DistillConfig,
    GridClipGridConfig,
    GridClipImageConfig,
    HierKdGlobalConfig,
    HierKdInstanceConfig,
    RegionsConfig,
)
from owl_det.config.model import (
    ImageTowerConfig,
    ModelConfig,
    PreprocessConfig,
    ResNetConfig,
    TextTowerConfig,
    VitConfig,
)
from owl_det.config.training import (
    Assigner,
    CheckpointConfig,
    ClipConfig,
    EvaluationConfig,
    HungarianAssigner,
    LogConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    Protocol,
    ScheduleConfig,
    SelectionConfig,
)

__all__ = [
    "Assigner",
    "AugmentConfig",
    "CheckpointConfig",
    "ClipConfig",
    "ClipSelfConfig",
    "CocoSource",
    "Config",
    "CustomBranchConfig",
    "DataConfig",
    "DenseVlmConfig",
    "DistillConfig",
    "EvaluationConfig",
    "GridClipGridConfig",
    "GridClipImageConfig",
    "HierKdGlobalConfig",
    "HierKdInstanceConfig",
    "ImageTextSource",
    "ImageTowerConfig",
    "LogConfig",
    "HungarianAssigner",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PreprocessConfig",
    "Protocol",
    "PseudoBoxesSource",
    "RegionsConfig",
    "ResNetConfig",
    "VitConfig",
    "ScheduleConfig",
    "SelectionConfig",
    "ShapesWorldSource",
    "SourceConfig",
    "TextTowerConfig",
    "TfdsSource",
    "VocSource",
    "YoloSource",
    "digest",
    "to_json",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str = "unnamed"
    # contrastive: pretraining of the two towers on images and captions (config.model.contrastive);
    # distill: fine-tuning of such towers by distillation branches alone
    task: Literal["detection", "contrastive", "distill"] = "detection"
    seed: int = 0
    batch_size: int = 256  # images (or mosaics) per step, over all devices
    num_steps: int = 1000
    model: ModelConfig = field(default_factory=ModelConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def has_heads(self) -> bool:
        """Whether the model is a detector; other tasks train two towers alone."""
        return self.task == "detection"

    def check(self, where: str) -> None:
        """Raises `ConfigError` for a value out of range; `resolve` compares the sections."""
        positive(self, where, "batch_size", "num_steps")
        not_negative(self, where, "seed")


def to_json(config: Any) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2)


def digest(value: Any) -> str:
    """Twelve hex digits that change with any part of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
