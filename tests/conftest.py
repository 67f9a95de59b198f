"""What every test runs under: eight CPU devices, strict shapes, warnings as errors.

The variables are set before JAX is imported and reach the subprocesses of tests too. A session on
an accelerator sets JAX_PLATFORMS itself.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from absl import logging

from tests import shape_checks

if TYPE_CHECKING:
    from owl_det.types import LoadedModel

_DEVICES = "--xla_force_host_platform_device_count"
# Tests compile far more than they run.
_FAST_COMPILE = ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A broadcast between arrays of different rank is a mistake until it is written out.
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# Sharded code needs several devices; code for one device runs on the first at the same speed.
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = " ".join([given, f"{_DEVICES}=8", *_FAST_COMPILE]).strip()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("MPLBACKEND", "agg")
# Equal programs are compiled once: tests, their subprocesses and the other workers find them here.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.mkdtemp(prefix="owl_det_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

shape_checks.install()

ROOT = Path(__file__).resolve().parents[1]

# A file is one worker's: the longest start first, so that no worker ends alone with one of them.
_LONGEST = ("test_train.py", "test_step.py", "test_export.py", "test_clipping.py")

# What every supported interpreter runs: seconds each, of all that differs between interpreters.
_FAST = (
    *(
        "assigners",
        "annotate/test_label_spaces.py",
        "cli",
        "data_pipelines",
        "evaluation/test_coco.py",
    ),
    *("losses", "modeling/test_detector.py", "studies/test_report.py", "test_boxes.py"),
    *("test_checkpoint.py", "test_config.py", "test_console.py", "test_files.py"),
    *("test_imports.py", "test_optim.py", "test_predictor.py"),
    *("test_train_step.py", "test_viz.py"),
)


def pytest_configure() -> None:
    """Stops where a file that is named above has another name by now."""
    missing = [name for name in _FAST if not (ROOT / "tests" / name).exists()]
    missing += [name for name in _LONGEST if not any((ROOT / "tests").rglob(name))]
    if missing:
        raise pytest.UsageError(f"tests/conftest.py names {', '.join(missing)}: no such tests")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the fast tests, before `-m` chooses, and puts the longest files first."""
    for item in items:
        where = item.path.relative_to(ROOT / "tests").as_posix()
        is_long = item.get_closest_marker("slow") or item.get_closest_marker("nightly")
        if not is_long and where.startswith(_FAST):
            item.add_marker("fast")
    items.sort(key=lambda item: item.path.name not in _LONGEST)


@pytest.fixture(scope="session")
def repository_root() -> Path:
    """The directory of `pyproject.toml`."""
    return ROOT


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Commands that end within a test's process leave no setting of their logging to the next."""
    logger, verbosity = logging.get_absl_logger(), logging.get_verbosity()
    handlers, propagates, level = list(logger.handlers), logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate = handlers, propagates
    logging.set_verbosity(verbosity)  # which sets a level where there was none
    logger.setLevel(level)


@pytest.fixture(scope="session")
def tiny_model() -> "LoadedModel":
    """The tiny detector with random parameters; `tiny.loaded` makes others."""
    from tests import tiny  # it imports JAX, which reads the variables above

    return tiny.loaded()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model` as a checkpoint, not to be written to; `tiny.save` makes others."""
    from tests import tiny

    return tiny.save(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tiny towers of their own size, as a checkpoint."""
    from tests import tiny_distillation

    return tiny_distillation.save_towers(tmp_path_factory.mktemp("teacher") / "towers")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data that lies beside a checkout, in ../shared/data; the test is skipped without it."""
    path = (ROOT / "../shared/data").resolve()
    if not path.is_dir():
        pytest.skip("needs the real data of ../shared/data beside the checkout, which is absent")
    return path
