"""Which optional packages are there; asked before they are imported, never by trying."""

from importlib.util import find_spec


def is_installed(package: str) -> bool:
    """True if `package` can be found. A finder that hides it by raising counts as absent."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False
