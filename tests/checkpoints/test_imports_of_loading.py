"""Loading a checkpoint imports what loading needs."""

import subprocess
import sys
from pathlib import Path

OTHERS = ("adapt", "store", "same_run", "inherited_model", "image_size", "identity")


def test_loading_imports_nothing_of_training_or_adapting(repository_root: Path) -> None:
    code = (
        "import sys, owl_det.checkpoints.load\n"
        "ours = [name for name in sys.modules if name.startswith('owl_det.')]\n"
        f"adapting = {[f'owl_det.checkpoints.{name}' for name in OTHERS]!r}\n"
        "above = ('losses', 'matching', 'training', 'distillation', 'evaluation', 'inference')\n"
        "print([x for x in ours if x in adapting or x.split('.')[1] in above])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository_root, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stdout + done.stderr[-2000:]


def test_the_config_is_resolved_without_arrays(repository_root: Path) -> None:
    code = (
        "import sys\n"
        "from owl_det.config.resolve import resolve\n"
        "resolve({'data': {'train': {'a': {'kind': 'shapes_world'}}}})\n"
        "print([name for name in ('jax', 'numpy', 'data_pipelines') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository_root, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stdout + done.stderr[-2000:]
