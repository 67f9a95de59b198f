"""Rows that are appended and read back, in memory and on disk."""

import numpy as np
import pytest

from owl_det.errors import DataError
from owl_det.evaluation import rows
from owl_det.evaluation.rows import RowFile

DTYPE = np.dtype([("key", "i4"), ("value", "f4")])


def made(keys) -> np.ndarray:
    table = np.zeros(len(keys), DTYPE)
    table["key"], table["value"] = keys, np.arange(len(keys))
    return table


@pytest.fixture(params=["memory", "disk"])
def file(request, monkeypatch) -> RowFile:
    if request.param == "disk":
        monkeypatch.setattr(rows, "_BYTES_IN_MEMORY", 1)
    monkeypatch.setattr(rows, "_ROWS_AT_ONCE", 7)
    return RowFile(DTYPE)


def test_rows_come_back_in_order(file):
    table = made(np.arange(20))
    for start in (0, 3, 3, 19):
        file.append(table[start : start + 1])
    np.testing.assert_array_equal(file.read(1, 4), table[[3, 3, 19]])
    file.append(table)  # after a read, still at the end
    np.testing.assert_array_equal(
        np.concatenate(list(file.blocks())), table[[0, 3, 3, 19, *range(20)]]
    )
    assert len(file) == 24 and [len(block) for block in file.blocks()] == [7, 7, 7, 3]


def test_groups_hold_their_rows_in_order(file):
    table = made(np.random.default_rng(0).choice([3, 5, 90], 50))
    file.append(table)
    grouped = file.grouped("key", np.array([3, 4, 5, 90]))
    for group, key in enumerate([3, 4, 5, 90]):
        np.testing.assert_array_equal(grouped.of([group]), table[table["key"] == key])
    assert grouped.counts.tolist() == [np.count_nonzero(table["key"] == k) for k in (3, 4, 5, 90)]
    together = np.concatenate([table[table["key"] == 90], table[table["key"] == 3]])
    np.testing.assert_array_equal(grouped.of([3, 1, 0]), together)
    np.testing.assert_array_equal(file.read(0, 50), table)  # the original stays as it was


def test_nothing_to_read(file):
    assert not list(file.blocks())
    assert len(file.grouped("key", np.array([1, 2])).of([0, 1])) == 0


def test_a_full_disk_is_one_clear_error(monkeypatch):
    file = RowFile(DTYPE)

    def fail(data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file._file, "write", fail)
    with pytest.raises(DataError, match="No space left on device.*set TMPDIR"):
        file.append(made([1]))
