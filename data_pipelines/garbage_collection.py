"""Python's collection of garbage, paused where it finds none."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """For work that makes millions of objects, all of which stay and none of which is in a cycle.

    To look through all of them again and again takes longer than to read a large file.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
