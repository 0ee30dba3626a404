"""Rows of one type that wait on disk, where memory would not hold those of all images."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt


class RowFile:
    """A file without a name: rows are appended, and read by their numbers or in order."""

    def __init__(self, kind: npt.DTypeLike, folder: Path | None = None) -> None:
        """`folder`: where the file lies; by default that of temporary files."""
        self.kind = np.dtype(kind)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._rows = 0

    def __enter__(self) -> RowFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self._rows

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Append (n,) rows, or (n, ...) of a type that is an array itself."""
        self._file.write(np.ascontiguousarray(rows).data)
        self._rows += len(rows)

    def at(self, numbers: npt.NDArray[np.integer[Any]]) -> npt.NDArray[Any]:
        """The rows of these numbers, in any order."""
        self._file.flush()
        size, file = self.kind.itemsize, self._file.fileno()
        each, where = np.unique(numbers, return_inverse=True)
        read = b"".join([os.pread(file, size, number * size) for number in each.tolist()])
        return np.frombuffer(read, self.kind)[where]

    def parts(self, rows: int) -> Iterator[npt.NDArray[Any]]:
        """All rows in order, so many at a time."""
        self._file.flush()
        for start in range(0, self._rows, rows):
            count = min(rows, self._rows - start)
            size = self.kind.itemsize
            yield np.frombuffer(os.pread(self._file.fileno(), count * size, start * size), self.kind)
