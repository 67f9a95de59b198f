"""How the folder of an export is recognised, without loading what runs it."""

import os
from pathlib import Path

METADATA = "export.json"


def is_export(path: str | os.PathLike[str]) -> bool:
    """True if the folder holds an export, of whatever format."""
    return (Path(path) / METADATA).is_file()
