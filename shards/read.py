"""One box of one stored image: only the inner chunks it touches are read and decoded."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from catalog.errors import SetupError
from catalog.store import (
    Location,
    RemotePath,
    store_error,
    tensorstore_context,
    tensorstore_kvstore,
)
from shards.layout import METADATA_FILE, Shape, refuse_newer_layout

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""(start, stop) along depth, height and width, in voxels."""

_CONTEXT: dict[str, Any] = {
    # Decoded chunks kept in memory made random crops slower, and each worker would hold its own.
    "cache_pool": {"total_bytes_limit": 0},
    # Parallelism comes from worker processes; more threads in each would only compete.
    "data_copy_concurrency": {"limit": 1},
    "file_io_concurrency": {"limit": 4},
}
_REMOTE_CONTEXT: dict[str, Any] = {
    # Room for the indexes of the arrays in use: each read anew would be a request of its own.
    "cache_pool": {"total_bytes_limit": 32 << 20},
    "data_copy_concurrency": {"limit": 1},
    "s3_request_concurrency": {"limit": 16},
}
_DAMAGE = re.compile("NOT_FOUND|DATA_LOSS|INVALID_ARGUMENT|FAILED_PRECONDITION|OUT_OF_RANGE")
"""How TensorStore begins what it says of an object that is there and wrong, or not there."""
_first_user: int | None = None


def refuse_fork() -> None:
    """Call before any use of TensorStore: its threads do not survive a fork, and it aborts the child.

    Raises RuntimeError in a process forked from one that has used TensorStore.
    """
    global _first_user
    if _first_user is None:
        _first_user = os.getpid()
    if _first_user != os.getpid():
        raise RuntimeError(
            f"shards were used in process {_first_user} before it forked process {os.getpid()}, and cannot be "
            "used in both. Start workers by 'spawn' or 'forkserver' "
            "(DataLoader(multiprocessing_context='spawn'))."
        )


class ShardReader:
    """Reads boxes of the arrays below `shards_root`. Cheap to make, to pickle and to send to a worker.

    Handles of the `open_limit` arrays used last stay open: about 0.2 MB of memory each, no file descriptor.
    """

    def __init__(self, shards_root: Location, open_limit: int = 128) -> None:
        self._root = shards_root
        self._open_limit = open_limit
        self._open = functools.lru_cache(maxsize=open_limit)(self._open_array)

    def __reduce__(self) -> tuple[type[ShardReader], tuple[Location, int]]:
        return type(self), (self._root, self._open_limit)

    def read(
        self, path: str, shape: Shape, dtype: npt.DTypeLike, index: int | None, box: Box
    ) -> npt.NDArray[Any]:
        """Return the voxels of a box as a new C-contiguous array (C, d, h, w) of `dtype`.

        `path`, `shape`, `dtype` and `index` are the catalog's shard_path, shard_shape, stored_dtype and
        shard_index. `index` is None for a volume (C, D, H, W); in a pack (N, C, H, W) it names the image,
        whose depth is 1.

        Raises SetupError if the array is missing, damaged, not what the catalog says or of a later version,
        OSError if the operating system, or StoreError if an object store, refuses to read it, ValueError if the
        box or the index lies outside it, RuntimeError after a fork.
        """
        channels = shape[0] if index is None else shape[1]
        voxels = np.empty((channels, *(max(stop - start, 0) for start, stop in box)), dtype)
        self.begin(path, shape, dtype, index, box, voxels)()
        return voxels

    def begin(
        self,
        path: str,
        shape: Shape,
        dtype: npt.DTypeLike,
        index: int | None,
        box: Box,
        into: npt.NDArray[Any],
    ) -> Callable[[], None]:
        """Start to read a box into an array (C, d, h, w) of `dtype`; the call of what is returned waits for it.

        While one box is decoded, those begun after it are read. The arguments and errors are those of `read`;
        what concerns the array as a whole is raised at once, what concerns its voxels by the call.
        """
        refuse_fork()
        depth, height, width = (slice(start, stop) for start, stop in box)
        if index is None:
            extent, where = shape[1:], (slice(None), depth, height, width)
        else:
            extent, where = (1, *shape[2:]), (slice(index, index + 1), slice(None), height, width)
        inside = all(0 <= start < stop <= size for (start, stop), size in zip(box, extent, strict=True))
        if not inside or not 0 <= (index or 0) < shape[0]:
            raise ValueError(f"{path}: box {box} of image {index} is not inside the array of shape {shape}")
        import tensorstore

        folder = self._root / path
        with _explained(folder):
            array = self._open(path, tuple(shape), np.dtype(dtype).name)
            # Decoded straight to where it belongs: what its own `read` returns would have to be copied.
            target = tensorstore.array(into if index is None else into.transpose(1, 0, 2, 3), context=context())
            reading = target.write(array[where])

        def wait() -> None:
            with _explained(folder):
                reading.result()

        return wait

    def _open_array(self, path: str, shape: Shape, dtype: str) -> Any:
        import tensorstore  # 50 ms that a listing of the catalog need not pay

        folder = self._root / path
        spec = {
            "driver": "zarr3",
            "kvstore": _kvstore(folder),
            "open": True,
            # Every chunk is stored, so a missing one is damage and not background.
            "fill_missing_data_reads": False,
            # An array never changes under its name.
            **({"recheck_cached_data": False} if isinstance(folder, RemotePath) else {}),
        }
        try:
            array = tensorstore.open(spec, context=context(remote=isinstance(folder, RemotePath))).result()
        except ValueError:
            with contextlib.suppress(OSError):
                refuse_newer_layout(folder, (folder / METADATA_FILE).read_bytes())
            raise
        refuse_newer_layout(folder, array.spec().to_json()["metadata"])
        if array.shape != shape or array.dtype.name != dtype:
            found = f"it holds {array.dtype.name} {array.shape} where the catalog says {dtype} {shape}"
            raise SetupError(_complaint(folder, found))
        return array


@functools.cache
def context(*, remote: bool = False) -> Any:
    """The limits of memory and threads that all of a process's uses of TensorStore share."""
    import tensorstore

    return tensorstore.Context(_REMOTE_CONTEXT | tensorstore_context() if remote else _CONTEXT)


def _kvstore(folder: Location) -> dict[str, Any]:
    if isinstance(folder, RemotePath):
        return tensorstore_kvstore(folder)
    return {"driver": "file", "path": str(folder)}


@contextlib.contextmanager
def _explained(folder: Location) -> Iterator[None]:
    """What TensorStore says of an array, as an error that says what to do."""
    try:
        yield
    except ValueError as error:
        reason = str(error).split(" [", 1)[0]  # the rest repeats the whole specification
        raise _outer_error(error, folder) or SetupError(_complaint(folder, reason)) from error


def _outer_error(error: ValueError, folder: Location) -> OSError | None:
    """What kept TensorStore from reading, if that is no fault of the array."""
    if isinstance(folder, RemotePath):
        return None if _DAMAGE.match(str(error)) else store_error(folder, str(error))
    return system_error(error, folder)


def system_error(error: ValueError, path: Location) -> OSError | None:
    """The OSError that TensorStore hides in the text of a ValueError, if there is one: disk full, say."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1])), str(path)) if found else None


def _complaint(folder: Location, found: str) -> str:
    return (
        f"cannot read the shard {folder}: {found}. "
        f"Delete that folder and run `pumit-data ingest {folder.parent.name}` again, which writes it anew."
    )
