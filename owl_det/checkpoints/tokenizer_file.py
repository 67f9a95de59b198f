"""The tokeniser's file of a checkpoint: it lies in `tokenizer/`, there or in the workdir."""

from pathlib import Path
from typing import Any

from data_pipelines import tokenizer
from owl_det import files
from owl_det.errors import CheckpointError

MAX_BYTES = 2**28  # the largest published one has 34 MB


def entry_of(file: str) -> dict[str, str] | None:
    """Name and SHA-256 of a tokeniser's file, for the run file; None for the built-in one.

    Raises `CheckpointError` for a file of another name and one that cannot be read.
    """
    if not file:
        return None
    path = Path(file)
    if path.name not in tokenizer.FILES.values():
        names = " or ".join(sorted(set(tokenizer.FILES.values())))
        raise CheckpointError(f"{path}: a tokeniser file is called {names}")
    return {"file": path.name, "sha256": _sha256(path)}


def copy(file: Path, folder: Path) -> None:
    """Copies the file to its place in a checkpoint or workdir. Raises `OSError`."""
    target = folder / "tokenizer" / file.name
    if target.exists() and target.samefile(file):
        return
    files.write_atomic(target, files.read_bytes(file))


def find(folder: Path, entry: Any) -> str:
    """The file that a run file's entry means: in the checkpoint `folder`, or in its workdir.

    Empty for the built-in tokeniser. Raises `CheckpointError` if the file is not there, or is
    another one.
    """
    if entry is None:
        return ""
    if not isinstance(entry, dict) or entry.get("file") not in tokenizer.FILES.values():
        raise CheckpointError(f"{folder}/run: tokenizer {entry!r} is no known file")
    places = (folder, folder.absolute().parent.parent)
    for path in (place / "tokenizer" / entry["file"] for place in places):
        if path.is_file():
            if _sha256(path) != entry.get("sha256"):
                raise CheckpointError(f"{path}: not the tokeniser of this checkpoint")
            return str(path)
    raise CheckpointError(
        f"{folder}: its tokeniser {entry['file']} is not there; copy the workdir's folder "
        "tokenizer into the checkpoint"
    )


def _sha256(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path}: more than {MAX_BYTES} bytes")
        return files.sha256(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
