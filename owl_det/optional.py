"""Which optional packages can be used."""

import importlib

from absl import logging


def is_installed(package: str) -> bool:
    """True if `package` can be imported (this does so); one that is there but broken is logged."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError:
        return False
    except ImportError as error:
        logging.warning("%s cannot be imported and is not used: %s", package, error)
        return False
    return True
