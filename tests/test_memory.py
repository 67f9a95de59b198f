"""Memory that was freed."""

import sys

import pytest

from benchmarks.inference import peak_resident, reset_peak
from owl_det.training import memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, needs glibc")
def test_freed_memory_goes_back() -> None:
    """Small blocks below one that is still held: nothing but a trim returns them."""
    blocks = [bytearray(50_000) for _ in range(4_000)]
    held = blocks[-1]
    reset_peak()
    before = peak_resident()
    del blocks
    memory.give_back_freed()
    reset_peak()
    assert len(held) == 50_000
    assert before - peak_resident() > 150_000_000
