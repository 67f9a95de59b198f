"""Config files: Python with a function `get_config`, or JSON such as a run's own config.json.

Changes are those of the command line, `--config.batch_size=8`; a key is found whether its words are
joined by `_` or by `-`.
"""

import dataclasses
import difflib
import importlib.util
import json
import re
import sys
import sysconfig
import textwrap
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import owl_det
from owl_det import files
from owl_det.config import Config
from owl_det.config.resolve import resolve, typed, without_former_keys
from owl_det.errors import ConfigError, UserError

_CHANGE = re.compile(r"(?P<dashes>--?)(?P<no>no)?config\.(?P<key>[^=]*)(?P<value>=.*)?", re.DOTALL)
_WIDTH = 300  # characters kept of an error in somebody's config file


def read(path: str, changes: Sequence[str] = ()) -> Config:
    """The checked config of a file, a shipped config's name, or a run's config.json.

    `changes` are arguments as of the command line, `--config.KEY=VALUE` or the two as a pair.
    `x.py:text` calls `get_config("text")`. Raises `ConfigError` for a file that is missing or
    fails, naming its line, for keys that are not there, and as `resolve`.
    """
    tree = load(path)
    if changes:
        try:
            complete = dataclasses.asdict(typed(tree))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        return resolve(changed(complete, changes))
    try:
        return resolve(tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


# --- files ---------------------------------------------------------------------------------------


def load(path: str) -> dict[str, Any]:
    """What a config file says, as nested mappings. Raises `ConfigError` as `read`."""
    name, colon, argument = path, "", ""
    if found := re.fullmatch(r"(.+\.py):(.*)", path):
        name, colon, argument = found[1], ":", found[2]
    file = _find(name)
    if file.suffix == ".json":
        return _load_json(file)
    if file.suffix != ".py":
        raise ConfigError(f"--config: {name} is neither a .py nor a .json file")
    return _as_mapping(_run_python(file, [argument] if colon else []), file)


def _find(name: str) -> Path:
    """The file, of a path or of a shipped config's name."""
    file = files.local(name, "--config")
    if file.is_file():
        return file
    if file.is_dir():
        inside = file / "config.json"
        remedy = f"; did you mean {inside}?" if inside.is_file() else ""
        raise ConfigError(f"--config: {name} is a folder, not a file{remedy}")
    shipped = _shipped()
    stem = re.sub(r"^configs[./]|\.py$", "", re.sub(r"\.py$", "", name))
    if stem in shipped:
        return shipped[stem]
    near = difflib.get_close_matches(stem, shipped, n=1)
    meant = files.did_you_mean(name) or (f"; did you mean {near[0]}?" if near else "")
    raise ConfigError(f"--config: {name}: no such file{meant or _listed(shipped)}")


def _listed(shipped: Mapping[str, Path]) -> str:
    return f"; shipped configs: {', '.join(shipped)}" if shipped else ""


def _shipped() -> dict[str, Path]:
    """The configs of this package by name: a wheel has them inside, a checkout beside it."""
    inside = _PACKAGE / "configs"
    folder = inside if inside.is_dir() else _PACKAGE.parent / "configs"
    return {file.stem: file for file in sorted(folder.glob("*.py")) if file.stem != "__init__"}


def _load_json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(files.read_text(file, "utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}, line {error.lineno}: no JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # not UTF-8; a number or nesting without end
        raise ConfigError(f"{file}: no JSON ({error})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected a JSON object, got {type(tree).__name__}")
    if isinstance(model := tree.get("model"), dict):
        return tree | {"model": without_former_keys(model)}
    return tree


def _run_python(file: Path, arguments: Sequence[str]) -> Any:
    """What the file's `get_config` returns."""
    name = f"_config_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # of a .py file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        return _function(module, file)(*arguments)
    except UserError:
        raise
    except Exception as error:  # anything may go wrong in a file that somebody writes
        raise ConfigError(_described(error, file)) from None
    finally:
        del sys.modules[name]


def _function(module: ModuleType, file: Path) -> Any:
    function = getattr(module, "get_config", None)
    if not callable(function):
        raise ConfigError(f"{file}: defines no function get_config()")
    return function


def _described(error: Exception, file: Path) -> str:
    """`configs/mine.py, line 12: NameError: name 'foo' is not defined`."""
    kind = type(error).__name__
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{_short(error.filename)}, line {error.lineno}: {kind}: {error.msg}"
    message = str(error.args[0]) if error.args else ""
    # ConfigDict lists every key there is.
    if key := re.search(r"Key \"(.+?)\" does not exist", message):
        near = re.search(r'Did you mean "(.+?)"', message)
        message = f"no such key {key[1]!r}" + (f"; did you mean {near[1]!r}?" if near else "")
    message = textwrap.shorten(message, _WIDTH, placeholder=" …")
    # The last line that its writer may have written: no library's, and no preset's.
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == file.absolute()
        or not frame.filename.startswith((_LIBRARIES, _STANDARD, str(_PACKAGE), "<frozen"))
    ]
    place = f"{_short(own[-1].filename)}, line {own[-1].lineno}" if own else str(file)
    return f"{place}: {kind}: {message}" if message else f"{place}: {kind}"


_LIBRARIES, _STANDARD = sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")
_PACKAGE = Path(owl_det.__file__).parent


def _short(path: str) -> str:
    """As seen from the working directory, if it lies there."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path


def _as_mapping(config: Any, file: Path) -> dict[str, Any]:
    from ml_collections import ConfigDict

    if isinstance(config, ConfigDict):
        try:
            return config.to_dict()
        except Exception as error:  # a placeholder that was never filled in
            raise ConfigError(_described(error, file)) from None
    if isinstance(config, Config):
        return dataclasses.asdict(config)
    if isinstance(config, Mapping):
        return dict(config)
    kind = type(config).__name__
    raise ConfigError(f"{file}: get_config() returns {kind}, not a ConfigDict or a mapping")


# --- changes -------------------------------------------------------------------------------------


def changed(tree: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """A complete config with the values of `changes`, each of the type that was there.

    Raises `ConfigError` for a key that the config lacks, or a value of another type.
    """
    from absl import flags
    from ml_collections import ConfigDict, config_flags

    given = [_in_full(argument, tree) for argument in changes]
    values = flags.FlagValues()
    try:
        holder = config_flags.DEFINE_config_dict(
            "config", ConfigDict(tree), flag_values=values, lock_config=True, sys_argv=["", *given]
        )
        unknown = values(["", *given])[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        text = str(error.args[0]) if error.args else type(error).__name__
        text = textwrap.shorten(text.removeprefix("flag "), _WIDTH, placeholder=" …")
        raise ConfigError(text) from None
    if unknown:
        raise ConfigError(f"unknown argument {unknown[0]!r}")
    return holder.value.to_dict()


def _in_full(argument: str, tree: Mapping[str, Any]) -> str:
    """`--config.num-steps=3` as `--config.num_steps=3`; values that stand alone as they are."""
    found = _CHANGE.fullmatch(argument)
    if not found:
        return argument
    node: Any = tree
    path: list[str] = []
    for key in found["key"].split("."):
        where = ".".join(["config", *path])
        if not isinstance(node, Mapping):
            raise ConfigError(f"--{where}.{key}: no such key; {where} is one value")
        name = key if key in node else key.replace("-", "_")
        if name not in node:
            raise ConfigError(f"--{where}.{key}: no such key{_meant(where, name, node)}")
        path.append(name)
        node = node[name]
    return f"{found['dashes']}{found['no'] or ''}config.{'.'.join(path)}{found['value'] or ''}"


def _meant(where: str, name: str, node: Mapping[str, Any]) -> str:
    if not node:
        return f"; {where} is empty"
    near = difflib.get_close_matches(name, node, n=1)
    return f"; did you mean --{where}.{near[0]}?" if near else f"; known: {', '.join(node)}"
