"""The built wheel, installed: what lies in it, and that its configs are found by name."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

OWN = """\
from owl_det import presets
from owl_det.config import ShapesWorldSource

from configs import shared

def get_config():
    config = presets.base()
    config.name = shared.NAME
    presets.add_source(config.data.train, "shapes", ShapesWorldSource())
    return config
"""
READ = """\
import sys
from pathlib import Path
import owl_det
from owl_det.config import config_file

print(Path(owl_det.__file__).parent)
for name in sys.argv[1:]:
    print(config_file.read(name).name)
"""


@pytest.fixture(scope="module")
def wheel(repository_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(folder)]
    subprocess.run([*command, str(repository_root)], check=True, timeout=600)
    (file,) = folder.glob("owl_det-*.whl")
    return file


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that has the wheel, and this one's dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    places = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", vars=places))
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(site)
    # Behind the wheel, and without the .pth files there: the checkout is not on the path.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Path(sysconfig.get_path("scripts", vars=places)) / "python"


def _run(python: Path, folder: Path, *arguments: str) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [python, *arguments], cwd=folder, env=environment, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().splitlines()


@pytest.mark.nightly
def test_two_packages_are_installed_and_configs_lie_in_one(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"owl_det", "data_pipelines"}
    assert "owl_det/configs/quickstart.py" in names


@pytest.mark.nightly
def test_shipped_configs_are_found_from_any_folder_and_shadow_nobodys_own(
    python: Path, tmp_path: Path
) -> None:
    own = tmp_path / "configs"
    own.mkdir()
    (own / "__init__.py").touch()
    (own / "shared.py").write_text("NAME = 'own'\n")
    (own / "mine.py").write_text(OWN)
    names = ["quickstart", "configs/quickstart.py", "configs.densevlm_shapes", "configs/mine.py"]
    package, *found = _run(python, tmp_path, "-c", READ, *names)
    assert Path(package).is_relative_to(python.parents[1])
    assert found == ["quickstart", "quickstart", "densevlm_shapes", "own"]


@pytest.mark.nightly
def test_the_command_trains_by_name(python: Path, tmp_path: Path) -> None:
    arguments = ["--config=quickstart", "--workdir=w", "--dry_run", "--nodry_run_compile"]
    shown = _run(python, tmp_path, "-m", "owl_det.main", *arguments)
    assert any("quickstart" in line for line in shown)
    assert list(tmp_path.iterdir()) == []
