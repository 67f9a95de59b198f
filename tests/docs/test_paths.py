"""Files and modules of ours that documents and docstrings name are there."""

import re
from pathlib import Path

import pytest

PLACES = ("", "owl_det", "data_pipelines", "docs", "tests")
OUR_MODULE = re.compile(r"\b((?:owl_det|data_pipelines)(?:\.[a-z_0-9]+)+)")
OUR_FILE = re.compile(
    r"`([a-z_0-9]+(?:/[a-z_0-9]+)*\.py)`|\b((?:owl_det|data_pipelines)/[\w/]+\.py)\b"
)
# Files of a reader's own, in examples.
EXAMPLES = {"my_branch.py", "mine.py", "x.py"}


def _documents(root: Path) -> list[Path]:
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md"))]


def _sources(root: Path) -> list[Path]:
    folders = ("owl_det", "data_pipelines", "configs", "benchmarks", "studies")
    return [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]


def _missing_files(text: str, root: Path) -> set[str]:
    named = {a or b for a, b in OUR_FILE.findall(text)} - EXAMPLES
    return {
        name
        for name in named
        if not any((root / place / name).is_file() for place in PLACES)
        and not list((root / "owl_det").rglob(name))
        and not list((root / "data_pipelines").rglob(name))
    }


def _missing_modules(text: str, root: Path) -> set[str]:
    """Dotted names whose start is no package and no module."""
    missing = set()
    for name in set(OUR_MODULE.findall(text)) - {"owl_det.__file__"}:
        package, part = (root / piece for piece in name.split(".")[0:1] * 2)
        for piece in name.split(".")[1:]:
            package, part = part, part / piece
            if part.is_dir():
                continue
            is_attribute = (package / "__init__.py").is_file() and piece in (
                package / "__init__.py"
            ).read_text()
            if not part.with_suffix(".py").is_file() and not is_attribute:
                missing.add(name)
            break
    return missing


@pytest.mark.parametrize("kind", ["documents", "sources"])
def test_what_is_named_is_there(kind: str, repository_root: Path) -> None:
    files = (_documents if kind == "documents" else _sources)(repository_root)
    missing = {}
    for path in files:
        text = path.read_text()
        found = _missing_files(text, repository_root) | _missing_modules(text, repository_root)
        if found:
            missing[path.name] = sorted(found)
    assert not missing
