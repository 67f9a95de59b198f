"""What a run that goes on must have in common with the run that was saved."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from owl_det.config import ModelConfig
from owl_det.config.roles import keys_of
from owl_det.errors import CheckpointError

# The parameters mean the same whatever these are.
_FREE = keys_of(ModelConfig, "training", "execution")
_SHOWN = 3  # keys named in one message
_REMEDY = "use a new workdir, with config.checkpoint.init_from for its weights"

Json = dict[str, Any]


def check_same_model(saved: Json, current: Json, folder: Path) -> None:
    """Settings that no shape shows; those of training alone may change.

    `saved` and `current` are run files. Raises `CheckpointError` naming the first key.
    """
    # Tuples become lists, as in the file.
    saved, current = (json.loads(json.dumps(run)) for run in (saved, current))
    for part in ("model", "preprocess"):
        before, now = _architecture(saved[part]), _architecture(current[part])
        for key, value in now.items():
            if key in before and before[key] != value:
                raise CheckpointError(
                    f"{folder}: another architecture; config.{part}.{key} is {before[key]!r} there "
                    f"and {value!r} now; {_REMEDY}"
                )


def _architecture(tree: Json) -> Json:
    """Dotted keys, without those that concern training or execution only."""
    return {key: value for key, value in leaves_of(tree).items() if key not in _FREE}


def check_same_input(
    saved: Json, current: Json, folder: Path, explain: Callable[[str], str]
) -> None:
    """The examples that come next must be those that would have come.

    `explain` of a section of the config says which of its keys changed, as far as that is known.
    Raises `CheckpointError` naming the keys.
    """
    if saved.get("tokenizer") != current["tokenizer"]:
        raise CheckpointError(
            f"{folder}: was trained with another tokeniser (config.data.tokenizer); {_REMEDY}"
        )
    # Files from before the ids were written have none.
    if saved.get("teachers", current["teachers"]) != current["teachers"]:
        raise CheckpointError(
            f"{folder}: was trained with other teachers (config.distill.teacher, dense_teacher or "
            f"cache); {_REMEDY}"
        )
    before, now = saved.get("input", {}), current["input"]
    for key in ("batch_size", "seed"):
        if before.get(key) != now[key]:
            raise CheckpointError(
                f"{folder}: config.{key} is {before.get(key)} there and {now[key]} now; set it as "
                f"it was, or {_REMEDY}"
            )
    if before.get("data_config") != now["data_config"]:
        told = explain("data") or "config.data: a key that changes the examples is another now"
        raise CheckpointError(f"{folder}: was trained on other examples; {told}; {_REMEDY}")
    if before.get("sources") != now["sources"]:
        raise CheckpointError(
            f"{folder}: was trained on other data; the images, labels or names of a source in "
            f"config.data.train have changed ({before.get('sources')} there, {now['sources']} "
            f"now); {_REMEDY}"
        )
    if before.get("next_example") != now["next_example"]:
        raise CheckpointError(
            f"{folder}: its run file is damaged; next_example is {before.get('next_example')}, not "
            f"{now['next_example']}"
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> str:
    """`config.data.flip is False there and True now; …` of two trees; empty = there are none."""
    ours, theirs = leaves_of(dict(before), prefix), leaves_of(dict(now), prefix)
    changed = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    parts = [
        f"{key} is {_shown(ours, key)} there and {_shown(theirs, key)} now"
        for key in changed[:_SHOWN]
    ]
    more = len(changed) - _SHOWN
    return "; ".join([*parts, *([f"{more} keys more"] if more > 0 else [])])


def _shown(leaves: Json, key: str) -> str:
    return repr(leaves[key]) if key in leaves else "absent"


def leaves_of(tree: Json, prefix: str = "") -> Json:
    """Dotted keys of nested mappings, behind `prefix`."""
    leaves: Json = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= leaves_of(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
