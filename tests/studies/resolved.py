"""The config that an arm's command trains with."""

import runpy

import pytest
from absl import flags
from ml_collections import config_flags

from owl_det.config import Config
from owl_det.config.resolve import resolve
from studies.study import ROOT, Arm


def resolved(arm: Arm, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The config as the arm's command leaves it."""
    places = {needed: f"/{needed}" for needed in arm.needs} | {"out": "/out", "seed": "7"}
    _, file, workdir, *overrides = (part.format_map(places) for part in arm.commands[0])
    assert workdir == "--workdir=/out"
    argv = ["main", *overrides]
    monkeypatch.setattr("sys.argv", argv)  # where ml_collections looks for overrides
    tree = runpy.run_path(str(ROOT / file.removeprefix("--config=")))["get_config"]()
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_dict("config", tree, flag_values=values, lock_config=True)
    values(argv)
    return resolve(holder.value.to_dict())
