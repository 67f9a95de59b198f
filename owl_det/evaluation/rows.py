"""Rows of numbers that come image by image and are read category by category.

Few rows stay in memory; more go to a temporary file (in TMPDIR), so that memory does not grow with
the number of images.
"""

import tempfile
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from owl_det.errors import DataError

_BYTES_IN_MEMORY = 32 * 2**20
_ROWS_AT_ONCE = 200_000


class RowFile:
    """An array of one structured dtype that grows at its end.

    The temporary file is deleted with the object.
    """

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self._count = 0
        self._file = tempfile.SpooledTemporaryFile(max_size=_BYTES_IN_MEMORY)
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return self._count

    def append(self, rows: Shaped[np.ndarray, " x"]) -> None:
        """Raises `DataError` if the temporary folder is full."""
        self._write(self._count, rows)
        self._count += len(rows)

    def read(self, start: int, stop: int) -> Shaped[np.ndarray, " x"]:
        """Rows `start` to `stop`, read-only."""
        size = self.dtype.itemsize
        self._file.seek(start * size)
        return np.frombuffer(self._file.read((stop - start) * size), self.dtype)

    def blocks(self) -> Iterator[Shaped[np.ndarray, " x"]]:
        """All rows in order, some at a time."""
        for start in range(0, self._count, _ROWS_AT_ONCE):
            yield self.read(start, min(start + _ROWS_AT_ONCE, self._count))

    def grouped(self, field: str, values: Int[np.ndarray, " c"]) -> "GroupedRows":
        """A copy with the rows of each value of a field together, in their order.

        `values` are sorted, and every row's value is among them.
        """
        counts = np.zeros(len(values), np.int64)
        for block in self.blocks():
            counts += np.bincount(np.searchsorted(values, block[field]), minlength=len(values))
        bounds = np.concatenate([[0], np.cumsum(counts)])
        copy, position = RowFile(self.dtype), bounds[:-1].copy()
        for block in self.blocks():
            groups = np.searchsorted(values, block[field])
            order = np.argsort(groups, kind="stable")
            present, starts = np.unique(groups[order], return_index=True)
            for group, rows in zip(present, np.split(block[order], starts[1:]), strict=True):
                copy._write(int(position[group]), rows)
                position[group] += len(rows)
        copy._count = self._count
        return GroupedRows(copy, bounds)

    def _write(self, position: int, rows: Shaped[np.ndarray, " x"]) -> None:
        try:
            self._file.seek(position * self.dtype.itemsize)
            self._file.write(rows.astype(self.dtype, copy=False).tobytes())
        except OSError as error:
            raise DataError(
                f"{tempfile.gettempdir()}: no room for the detections ({error.strerror})"
                "; set TMPDIR to a folder on a larger disk"
            ) from error


class GroupedRows:
    """Rows of a `RowFile` by group."""

    def __init__(self, rows: RowFile, bounds: Int[np.ndarray, " d"]) -> None:
        self.counts = np.diff(bounds)
        self._rows = rows
        self._bounds: list[int] = bounds.tolist()

    def of(self, groups: Sequence[int]) -> Shaped[np.ndarray, " y"]:
        """The rows of some groups, one group after the other."""
        parts = [self._rows.read(self._bounds[g], self._bounds[g + 1]) for g in groups]
        return np.concatenate([np.zeros(0, self._rows.dtype), *parts])
