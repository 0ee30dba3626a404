"""Arrays that processes share: one copy, in memory without a name, whoever maps it.

What is too large for every worker to hold is written to an anonymous file in memory and mapped. The operating
system frees it when the last process that has it ends, however that ends: there is no name to collide with and
nothing to clean up. Where a system has no such files (Linux has), a deleted temporary file does the same.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable
from multiprocessing import reduction
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from catalog.errors import SetupError


class _Descriptor(Protocol):
    """A file descriptor on its way to another process."""

    def detach(self) -> int: ...


class SharedArray:
    """A read-only array of one axis. Pickled to a worker process, it travels as a file descriptor."""

    def __init__(self, descriptor: int, dtype: npt.DTypeLike) -> None:
        """Takes over an open file that holds items of `dtype` and nothing else."""
        self._file = os.fdopen(descriptor, "rb", buffering=0)
        size = os.fstat(descriptor).st_size
        # An empty file cannot be mapped.
        content = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) if size else b""
        self.values: npt.NDArray[Any] = np.frombuffer(content, dtype)

    def __len__(self) -> int:
        return len(self.values)

    def __reduce__(self) -> tuple[Callable[..., SharedArray], tuple[Any, ...]]:
        return _received, (reduction.DupFd(self._file.fileno()), self.values.dtype)


class ArrayWriter:
    """Takes a SharedArray piece by piece; nothing of it stays in the memory of the process."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._dtype = np.dtype(dtype)
        self._file = _anonymous_file()

    def append(self, values: npt.NDArray[Any]) -> None:
        """Raises SetupError if there is no room."""
        rest = memoryview(np.ascontiguousarray(values, self._dtype).view(np.uint8).data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise SetupError(
                f"no room for the catalog's training rows in memory that processes share: {error}. "
                "Some 200 bytes an image are needed, once for all workers of a process"
            ) from error

    def finish(self) -> SharedArray:
        """The array. To be called once, after the last `append`."""
        with self._file:
            return SharedArray(os.dup(self._file.fileno()), self._dtype)


def _anonymous_file() -> BinaryIO:
    if hasattr(os, "memfd_create"):
        # A quarter of the time that a file on a disk takes, even one that stays in the cache.
        return os.fdopen(os.memfd_create("pumit-data"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _received(descriptor: _Descriptor, dtype: np.dtype[Any]) -> SharedArray:
    return SharedArray(descriptor.detach(), dtype)
