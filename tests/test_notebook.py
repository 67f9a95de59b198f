"""The notebook runs from its first cell to its last, and is stored without outputs."""

import json
import os
from pathlib import Path

import pytest

# Jupyter's packages leave event loops and sockets to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def path(repository_root: Path) -> Path:
    return repository_root / "notebooks" / "inference.ipynb"


def test_it_is_stored_without_outputs(path: Path) -> None:
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.slow
def test_it_runs(
    path: Path,
    repository_root: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs the extra notebook")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra notebook")
    pytest.importorskip("ipykernel", reason="needs the extra notebook")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [c for c in notebook.cells if "install" not in c.metadata.get("tags", [])]
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    parameters.source = f"CHECKPOINT = {str(tiny_checkpoint)!r}"
    for cell in notebook.cells:  # random weights score about 0.01
        cell.source = cell.source.replace(", nms_iou=0.5", "")
        cell.source = cell.source.replace("threshold=0.3", "threshold=0.0, top_k=4")
    search = os.pathsep.join([str(repository_root), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", search)
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": tmp_path}}
    ).execute()
    outputs = {cell.id: cell.get("outputs", []) for cell in notebook.cells}
    assert outputs["detect"][0]["text"].count("picture") == 4 * 4
    assert any("image/png" in output.get("data", {}) for output in outputs["draw"])
    assert outputs["image-queries"][-1]["text"].strip() == "[4, 4, 4, 4]"
    assert "checkpoint, export: 16 16" in outputs["export"][-1]["text"]
