"""Which module may import which; imports within functions count as those at the top do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("tensorflow", "tensorflow_datasets", "clu", "ml_collections", "beartype")
LIGHT = (
    "owl_det.modeling.build",
    "owl_det.assigners.assigner",
    "owl_det.config.resolve",
    "owl_det.training.train_step",
    "owl_det.inference.predictor",
    "benchmarks.train_step",
)

# From the bottom up. A module may import from its own row and from those above it in this table.
ROWS: tuple[tuple[str, ...], ...] = (
    ("errors", "optional"),
    ("files",),
    ("config", "stop_signal"),
    ("console",),
    ("types",),
    ("boxes", "scoring", "path_rules"),
    ("data_pipelines",),
    ("presets",),
    ("modeling", "sharding"),
    ("checkpoints",),
    ("inference",),  # so that neither knows a loss, an assigner or a step
    ("losses",),
    ("assigners",),
    ("distillation",),
    ("viz",),
    ("evaluation",),
    ("training",),
    ("convert",),
    ("annotate",),
    ("cli", "main"),
)
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}
OF_DATA_PIPELINES = {"errors", "optional", "config", "files"}  # all that it may know of owl_det


def _modules(root: Path) -> dict[str, Path]:
    found = [*(root / "owl_det").rglob("*.py"), *(root / "data_pipelines").rglob("*.py")]
    names = (".".join(path.relative_to(root).with_suffix("").parts) for path in found)
    return {name.removesuffix(".__init__"): path for name, path in zip(names, found, strict=True)}


def _imports(path: Path) -> set[str]:
    """Modules imported at the top of a file or anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.fixture(scope="module")
def imports(repository_root: Path) -> dict[str, set[str]]:
    """What of ours each module imports: the most specific names alone."""
    modules = _modules(repository_root)
    found = {}
    for name, path in modules.items():
        ours = {other for other in _imports(path) if other in modules and other != name}
        inner = {other for other in ours if any(x.startswith(f"{other}.") for x in ours)}
        found[name] = ours - {x for x in inner if not _takes_a_name(path, x, modules)}
    return found


def _takes_a_name(path: Path, package: str, modules: dict[str, Path]) -> bool:
    """Whether a file imports something of a package that is not one of its modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            if any(f"{package}.{alias.name}" not in modules for alias in node.names):
                return True
        if isinstance(node, ast.Import) and any(alias.name == package for alias in node.names):
            return True
    return False


def _room(module: str) -> str:
    """`owl_det.losses.focal` → losses; data_pipelines is one room."""
    parts = module.split(".")
    return parts[0] if parts[0] == "data_pipelines" or len(parts) == 1 else parts[1]


def test_every_room_has_a_row(imports: dict[str, set[str]]) -> None:
    assert {_room(module) for module in imports} - {"owl_det"} == set(ROW_OF)


def test_imports_point_one_way(imports: dict[str, set[str]]) -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in imports.items()
        for other in others
        if module != "owl_det" and other != "owl_det"
        if ROW_OF[_room(other)] > ROW_OF[_room(module)]
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_no_imports_form_a_circle(imports: dict[str, set[str]]) -> None:
    """Modules whose imports are all settled are settled; a circle never is."""
    left = {name: set(others) for name, others in imports.items()}
    while settled := [name for name, others in left.items() if not others & left.keys()]:
        for name in settled:
            del left[name]
    assert not left, {name: others & left.keys() for name, others in left.items()}


def test_data_pipelines_know_little_of_owl_det_and_no_jax(
    imports: dict[str, set[str]], repository_root: Path
) -> None:
    for name, path in _modules(repository_root).items():
        if _room(name) != "data_pipelines":
            continue
        known = {_room(other) for other in imports[name]} - {"data_pipelines"}
        assert known <= OF_DATA_PIPELINES, name
        roots = {other.split(".")[0] for other in _imports(path)}
        assert not roots & {"jax", "flax", "optax"}, name


def test_only_modeling_imports_linen(repository_root: Path) -> None:
    for name, path in _modules(repository_root).items():
        if _room(name) != "modeling":
            assert not any(other.startswith("flax") for other in _imports(path)), name


def test_the_root_stays_small_and_files_stay_short(repository_root: Path) -> None:
    assert len(list((repository_root / "owl_det").glob("*.py"))) <= 14
    for name, path in _modules(repository_root).items():
        assert len(path.read_text().splitlines()) <= 450, name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 60, f"{name}.{node.name}"


def test_inference_and_the_step_need_no_heavy_packages(repository_root: Path) -> None:
    code = (
        "import sys, importlib\n"
        f"for name in {HEAVY!r}: sys.modules[name] = None\n"
        f"for name in {LIGHT!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository_root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_inference_and_conversion_load_nothing_of_training(repository_root: Path) -> None:
    """Loading weights, predicting, annotating and converting run no loss, assigner or step."""
    code = (
        "import sys, owl_det, owl_det.checkpoints.load, owl_det.annotate.run\n"
        "import owl_det.convert.formats, owl_det.evaluation.benchmark\n"
        "import owl_det.inference.predictor\n"
        "owl_det.Predictor\n"
        "parts = ('losses', 'assigners', 'training', 'distillation')\n"
        "ours = [name.split('.') for name in sys.modules if name.startswith('owl_det.')]\n"
        "print(['.'.join(name) for name in ours if name[1] in parts])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository_root, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stdout + done.stderr[-2000:]
