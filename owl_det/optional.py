"""Which optional packages can be used, and how."""

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


def installation(extra: str) -> str:
    """The command that installs an extra of this package, for messages."""
    return f"pip install -e '.[{extra}]' in your clone of owl_det"


def leave_accelerators_to_jax() -> None:
    """To be called before TensorFlow does any work: it would take the memory of every GPU."""
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
