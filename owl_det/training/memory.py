"""Memory of this process."""

import ctypes
import sys


def give_back_freed() -> None:
    """Returns to the system what was freed and the C library still keeps (glibc's `malloc_trim`).

    Compiling a training step leaves hundreds of megabytes free in the heaps of XLA's threads, which
    glibc keeps for good: the arrays of a step are too large to go there. Does nothing where the C
    library has no such function.
    """
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
