"""Which module may import which."""

import ast
import subprocess
import sys
from pathlib import Path

HEAVY = ("tensorflow", "tensorflow_datasets", "clu", "ml_collections", "beartype")
LIGHT = (
    "owl_det.modeling.detector",
    "owl_det.assigners",
    "owl_det.config",
    "owl_det.training.train_step",
    "owl_det.inference.predictor",
    "benchmarks.train_step",
)


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
    """Loading weights, predicting, annotating and converting run no loss, matching or step."""
    code = (
        "import sys, owl_det, owl_det.checkpoints.load, owl_det.annotate.run\n"
        "import owl_det.inference.predictor\n"
        "import owl_det.convert.formats, owl_det.evaluation.benchmark\n"
        "owl_det.Predictor\n"
        "parts = ('losses', 'matching', 'training', 'distillation', 'optim', 'train')\n"
        "ours = [name.split('.') for name in sys.modules if name.startswith('owl_det.')]\n"
        "print(['.'.join(name) for name in ours if name[1] in parts])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository_root, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stdout + done.stderr[-2000:]


def _imports(path: Path) -> set[str]:
    """Modules imported at the top of a file or anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_imports_point_one_way(repository_root: Path) -> None:
    order = ["types", "boxes", "matching", "losses", "distillation", "training", "train", "main"]
    library = repository_root / "owl_det"
    for position, name in enumerate(order):
        is_package = (library / name).is_dir()
        files = library.glob(f"{name}/*.py") if is_package else [library / f"{name}.py"]
        later = {f"owl_det.{other}" for other in order[position + 1 :]}
        for path in files:
            found = {".".join(module.split(".")[:2]) for module in _imports(path)}
            assert not found & later, path
    for path in (library / "modeling").glob("*.py"):
        wrong = {"owl_det.losses", "owl_det.assigners", "owl_det.training.train_step"}
        assert not _imports(path) & wrong, path


def test_data_pipelines_import_no_jax(repository_root: Path) -> None:
    for path in (repository_root / "data_pipelines").rglob("*.py"):
        roots = {name.split(".")[0] for name in _imports(path)}
        assert not roots & {"jax", "flax", "optax"}, path


def test_only_modeling_imports_linen(repository_root: Path) -> None:
    for path in (repository_root / "owl_det").rglob("*.py"):
        if path.parent.name != "modeling":
            assert not any(name.startswith("flax") for name in _imports(path)), path
