"""The evaluator's memory does not follow the number of boxes."""

import tracemalloc

from benchmarks import evaluator as benchmark
from owl_det.evaluation import coco, rows


def test_memory_does_not_follow_the_number_of_images(monkeypatch):
    monkeypatch.setattr(rows, "_BYTES_IN_MEMORY", 1 << 16)
    monkeypatch.setattr(rows, "_ROWS_AT_ONCE", 3000)
    monkeypatch.setattr(coco, "_ROWS_AT_ONCE", 3000)
    monkeypatch.setattr(coco, "_PAIRS_AT_ONCE", 3000)
    peaks = []
    for num_images in (60, 400):  # 24,000 detections, as dictionaries some 15 MiB
        tracemalloc.start()
        benchmark.measure(
            num_images=num_images,
            num_categories=20,
            num_detections=60,
            protocol="fixed",
            is_federated=True,
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2**20
