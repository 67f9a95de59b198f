"""Checks the shapes and dtypes of our functions at every call, while tests run.

Functions are checked whose signatures name an array type of jaxtyping. All other annotations are
the type checker's: to check them at calls as well would make tests import for seconds. Fields of
dataclasses are not checked, since `jax.tree.map` and `jax.vmap` fill them with placeholders.
"""

import ast
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import beartype
from jaxtyping import jaxtyped

PACKAGES = ("owl_det", "data_pipelines")

_ARRAYS = {
    *("Bool", "Complex", "Float", "Float32", "Float64", "Inexact", "Int", "Int32", "Int64"),
    *("Integer", "Key", "Num", "Real", "Shaped", "UInt", "UInt8", "UInt32"),
}
# An int where a float is asked for is no mistake (PEP 484).
_CONFIGURATION = beartype.BeartypeConf(is_pep484_tower=True)
_TYPE_CHECKER = beartype.beartype(conf=_CONFIGURATION)


def check(checked: Any) -> Any:
    """Decorates a function."""
    return jaxtyped(checked, typechecker=_TYPE_CHECKER)


def install() -> None:
    """Has all modules of `PACKAGES` checked that are imported from now on."""
    imported = [name for name in sys.modules if name.split(".")[0] in PACKAGES]
    if imported:
        raise RuntimeError(f"{', '.join(imported)} imported before their checks were installed")
    sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] not in PACKAGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """Compiled anew: the bytecode beside the file is that without checks."""
        tree = ast.parse(Path(self.path).read_bytes(), self.path)
        return compile(with_checks(tree), self.path, "exec", dont_inherit=True)


def with_checks(tree: ast.Module) -> ast.Module:
    """The module with `check` as the innermost decorator where arrays are annotated."""
    aliases = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and _names_array(node.value, _ARRAYS)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    arrays = _ARRAYS | aliases
    is_changed = False
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any(
            _names_array(annotation, arrays) for annotation in _annotations(node)
        ):
            node.decorator_list.append(_decorator(node))
            is_changed = True
    if is_changed:
        start = 1 if ast.get_docstring(tree) is not None else 0
        start += sum(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in tree.body)
        tree.body.insert(start, ast.Import([ast.alias("tests.shape_checks", "_shape_checks")]))
        ast.fix_missing_locations(tree)
    return tree


def _annotations(node: ast.FunctionDef) -> list[ast.expr | None]:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    rest = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    return [*(argument.annotation for argument in [*named, *rest]), node.returns]


def _names_array(annotation: ast.expr | None, arrays: set[str]) -> bool:
    if annotation is None:
        return False
    return any(isinstance(n, ast.Name) and n.id in arrays for n in ast.walk(annotation))


def _decorator(node: ast.FunctionDef) -> ast.expr:
    decorator = ast.parse("_shape_checks.check", mode="eval").body
    for part in ast.walk(decorator):
        ast.copy_location(part, node)
    return decorator
