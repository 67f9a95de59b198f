"""Results of finished arms, one small JSON each, and whether they are those of the present arms.

A result is current if it names the same commands and configs, and if what its arm started from has
not been run again with another outcome.
"""

import dataclasses
import hashlib
import json
import runpy
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from owl_det import config as schema
from owl_det import files
from owl_det.errors import UserError
from studies.study import ROOT, Arm, Study

SPEEDS = ("images_per_second",)  # metrics that no two runs share


def result_file(study: Study, arm: Arm, seed: int) -> Path:
    return study.results / f"{arm.name}-seed{arm.seed(seed)}.json"


def is_finished(study: Study, arm: Arm, seed: int) -> bool:
    """True if the arm's result is there, and is current."""
    file = result_file(study, arm, seed)
    return file.exists() and is_current(study, read_result(file))


def is_current(study: Study, result: Mapping[str, Any]) -> bool:
    """True if a result is of these commands and configs, and of the needed arms' present results.

    An arm that is run again elsewhere may come out otherwise; what started from it is then of other
    weights than its result says.
    """
    arm, seed = study.arm(result["arm"]), result["seed"]
    if result["digest"] != digest(study, arm):
        return False
    for name, outcome in result.get("needs", {}).items():
        file = result_file(study, study.arm(name), seed)
        if not file.exists():
            continue
        needed = read_result(file)
        if outcome_digest(needed) != outcome or not is_current(study, needed):
            return False
    return True


def outcome_digest(result: Mapping[str, Any]) -> str:
    """Twelve hex digits of an arm's numbers, but for its speed."""
    kept = {key: x for key, x in result["metrics"].items() if key not in SPEEDS}
    return schema.digest(kept)


def write_result(study: Study, result: Mapping[str, Any]) -> None:
    """Writes the file of a finished arm: complete or absent."""
    file = result_file(study, study.arm(result["arm"]), result["seed"])
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(file, as_json(result))


def as_json(content: Any) -> str:
    """How results and the states of arms are written."""
    return json.dumps(content, indent=1) + "\n"


def read_result(file: Path) -> dict[str, Any]:
    """Raises `UserError` if the file is no result of an arm."""
    try:
        result = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: no JSON ({error}); remove it") from None
    keys = {"arm": str, "seed": int, "digest": str, "metrics": dict, "seconds": int | float}
    keys |= {"commit": str, "is_dirty": bool, "machine": str, "commands": list}
    for key, kind in keys.items():
        if not isinstance(result, dict) or not isinstance(result.get(key), kind):
            raise UserError(f"{file}: {key!r} is missing or of a wrong type; remove the file")
    return result


def digest(study: Study, arm: Arm) -> str:
    """Twelve hex digits of all that decides an arm's result but seed, code and machine.

    Its commands and configs, and those of the arms that it needs.
    """
    needed = [digest(study, study.arm(name)) for name in arm.needs]
    files = [
        part.removeprefix("--config=")
        for command in arm.commands
        for part in command
        if part.startswith("--config=")
    ]
    parts = [needed, arm.commands, [_config_digest(file) for file in files]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


@cache
def _config_digest(file: str) -> str:
    """Of the keys that a config sets: a new key of the schema, off by default, changes nothing."""
    tree = runpy.run_path(str(ROOT / file))["get_config"]().to_dict()
    told = _differences(tree, dataclasses.asdict(schema.Config()))
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _differences(tree: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of nested mappings that are not as in the defaults."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            default = defaults.get(key)
            found[key] = _differences(value, default if isinstance(default, Mapping) else {})
        elif key not in defaults or value != defaults[key]:
            found[key] = value
    return {key: value for key, value in found.items() if value != {}}
